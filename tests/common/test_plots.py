"""Classes and names in figures can be told apart, also by readers with colour blindness."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from tahoex1_hf.common.plots import class_marks, draw_joint_umap, import_umap, label_points, umap_places

# What is seen of linear RGB by readers who lack one kind of cones (Machado et al. 2009, severity 1).
SEEN = {
    "all cones": np.eye(3),
    "no L": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no M": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no S": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
JUST_SEEN = 2.3  # distance in CIELAB of two colours that lie side by side


def lab(color: str, seen: np.ndarray) -> np.ndarray:
    """Return the coordinates of a colour in CIELAB, as a reader sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ (np.asarray(seen) @ linear).clip(0, 1) / TO_XYZ.sum(1)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("reader", SEEN)
def test_classes_of_one_shape_have_colours_that_everyone_tells_apart(reader: str) -> None:
    colors = {color for color, marker in class_marks(63) if marker == "o"}
    assert len(colors) == 7
    for one, other in combinations([*colors, "#ffffff"], 2):
        distance = np.linalg.norm(lab(one, SEEN[reader]) - lab(other, SEEN[reader]))
        assert distance > 5 * JUST_SEEN, (one, other)


def test_no_two_classes_look_alike() -> None:
    assert len(set(class_marks(63))) == 63
    assert class_marks(70)[63:] == class_marks(7)


def test_a_joint_umap_draws_every_cell_in_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.random.default_rng(0).random((90, 2))
    monkeypatch.setattr("tahoex1_hf.common.plots.umap_places", lambda embeddings, seed: places)
    drawn: Counter[str] = Counter()
    scatter = Axes.scatter

    def counted(axes: Axes, x: Sequence[float], y: Sequence[float], marker: str, **options: Any) -> Any:
        drawn[marker] += len(x)
        return scatter(axes, x, y, marker=marker, **options)

    monkeypatch.setattr(Axes, "scatter", counted)
    names = np.array([f"type {number % 9}" for number in range(90)])
    draw_joint_umap(np.zeros((90, 4)), [("cells", names)], tmp_path / "umap.png", 0)
    assert drawn == {"o": 70, "^": 20}
    assert (tmp_path / "umap.png").stat().st_size > 1000


def test_cells_without_a_class_are_grey_and_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.random.default_rng(0).random((30, 2))
    monkeypatch.setattr("tahoex1_hf.common.plots.umap_places", lambda embeddings, seed: places)
    legends: list[list[str]] = []
    drawn: Counter[str] = Counter()
    scatter, legend = Axes.scatter, Axes.legend

    def counted(axes: Axes, x: Sequence[float], y: Sequence[float], **options: Any) -> Any:
        drawn.update(options.get("c", ()))
        return scatter(axes, x, y, **options)

    def noted(axes: Axes, **options: Any) -> Any:
        legends.append(axes.get_legend_handles_labels()[1])
        return legend(axes, **options)

    monkeypatch.setattr(Axes, "scatter", counted)
    monkeypatch.setattr(Axes, "legend", noted)
    names = np.array(["T", "unknown", "zygote"] * 10)
    draw_joint_umap(np.zeros((30, 4)), [("label", names)], tmp_path / "umap.png", 0, "unknown")
    [(blue, _), (orange, _)] = class_marks(2)
    assert drawn == {blue: 10, "0.7": 10, orange: 10}
    assert legends == [["T", "zygote", "unknown"]]


def test_names_of_points_lie_side_by_side_and_inside_the_axes() -> None:
    """Of many points at one place only those are named for which there is room, the first before the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 3), layout="constrained")
    axis = figure.subplots()
    places = np.concatenate([np.full((8, 2), 0.5), [[0, 0], [1, 1], [0.2, 0.8]]])
    axis.scatter(*places.T)
    names = [f"GENE{number}" for number in range(len(places))]
    written = label_points(axis, names, places)
    shown = [text.get_text() for text in written]
    assert shown[0] == names[0]
    assert 4 <= len(shown) < len(names)
    assert {"GENE8", "GENE9", "GENE10"} <= set(shown)
    boxes = [text.get_window_extent() for text in written]
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    frame = axis.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_umaps_loops_are_kept_on_disk() -> None:
    """So that each process but the first loads them in place of compiling for seconds."""
    pytest.importorskip("umap")
    umap = import_umap()
    places = umap_places(np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32), seed=0)
    assert places.shape == (40, 2)
    loops = [umap.utils.fast_knn_indices, umap.umap_.smooth_knn_dist, umap.umap_.compute_membership_strengths]
    if hasattr(umap.layouts, "_nb_optimize_layout_euclidean_single_epoch"):  # older versions compile it when called
        loops.append(umap.layouts._nb_optimize_layout_euclidean_single_epoch)
    for loop in loops:
        assert list(Path(loop.stats.cache_path).glob(f"*{loop.py_func.__name__}-*.nbi"))
