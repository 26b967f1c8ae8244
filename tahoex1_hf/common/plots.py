# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures of embeddings and predictions, written as PNG without pyplot, so that any thread may draw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.common.own_thread import in_own_thread

_NEIGHBOURS = 15
_LAYERS = 16  # in which cells of different shapes are drawn, so that none hides the others
# Without their yellow, which hardly shows on white.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_SHAPES = "o^sDvPX*p"
_MOST_ANNOTATED = 12  # with more classes, the numbers in a confusion matrix are too small to read


def import_umap() -> Any:
    """Import UMAP, and have numba keep UMAP's slowest loops on disk once it has compiled them.

    UMAP leaves that to its users: without it, the first UMAP of every process compiles for 6 CPU seconds.

    Returns:
        The module `umap`.
    """
    import umap
    import umap.layouts
    import umap.umap_
    import umap.utils

    for module, name in (
        (umap.layouts, "_nb_optimize_layout_euclidean_single_epoch"),
        (umap.utils, "fast_knn_indices"),
        (umap.umap_, "smooth_knn_dist"),
        (umap.umap_, "compute_membership_strengths"),
    ):
        try:
            getattr(module, name).enable_caching()
        except (AttributeError, RuntimeError):  # no such loop in this version, or no folder that can be written
            continue
    return umap


def umap_places(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """Return the UMAP coordinates `(cells, 2)` of embeddings `(cells, width)`."""
    umap = import_umap()
    number = min(_NEIGHBOURS, len(embeddings) - 1)
    # UMAP's spectral start needs more cells than this; fewer start at random places.
    start = "spectral" if len(embeddings) > _NEIGHBOURS else "random"
    mapper = umap.UMAP(n_neighbors=number, random_state=seed, n_jobs=1, init=start)
    return np.asarray(in_own_thread(mapper.fit_transform, embeddings))


def draw_umap(embeddings: np.ndarray, labels: np.ndarray, title: str, path: Path, seed: int) -> None:
    """Draw a UMAP of embeddings `(cells, width)`, coloured by label."""
    draw_umaps([(title, embeddings)], labels, path, seed)


def draw_umaps(
    panels: Sequence[tuple[str, np.ndarray]], labels: np.ndarray, path: Path, seed: int, title: str | None = None
) -> None:
    """Draw UMAPs of the same cells, side by side.

    Args:
        panels: Heading and embeddings `(cells, width)` of each UMAP.
        labels: `(cells,)` names of classes, or floats, which get a colour bar.
        path: Path of the PNG.
        seed: Seed of UMAP.
        title: Title above all panels.
    """
    names = np.unique(labels) if labels.dtype.kind != "f" else np.zeros(0)
    figure = new_figure((1.5 + 4.6 * len(panels) + 1.9 * (1 + len(names) // 25), 5.2))
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for each, (heading, embeddings) in zip(axes, panels, strict=True):
        places = umap_places(embeddings, seed)
        if labels.dtype.kind == "f":
            drawn = each.scatter(places[:, 0], places[:, 1], s=_dot(len(labels)), c=labels, linewidths=0)
        else:
            for name, (color, marker) in zip(names, class_marks(len(names)), strict=True):
                each.scatter(
                    *places[labels == name].T,
                    s=_dot(len(labels)),
                    color=color,
                    marker=marker,
                    label=name,
                    linewidths=0,
                )
        each.set(title=heading, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
        each.spines[["top", "right"]].set_visible(False)
    if labels.dtype.kind == "f":
        figure.colorbar(drawn, ax=list(axes))
    else:
        handles, texts = axes[0].get_legend_handles_labels()
        columns = 1 + len(names) // 25
        figure.legend(handles, texts, loc="outside right center", fontsize=7, frameon=False, ncols=columns)
    if title is not None:
        figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw_joint_umap(
    embeddings: np.ndarray, panels: Sequence[tuple[str, np.ndarray]], path: Path, seed: int, unnamed: str = ""
) -> None:
    """Draw one UMAP of cells several times, each time coloured by other names.

    Args:
        embeddings: Embeddings of the cells, `(cells, width)`.
        panels: Heading and names `(cells,)` of each drawing.
        path: Path of the PNG.
        seed: Seed of UMAP, and of the order in which the cells are drawn, so that none hides the others.
        unnamed: Name that stands for no class, by default the empty one: its cells are grey, and it comes last.
    """
    places = umap_places(embeddings, seed)
    order = np.random.default_rng(seed).permutation(len(places))
    every = [np.unique(names.astype(str)) for _, names in panels]
    columns = [1 + len(names) // 25 for names in every]
    figure = new_figure((sum(5.0 + 1.9 * number for number in columns), 5.2))
    axes = np.atleast_1d(figure.subplots(1, len(panels), width_ratios=[5.0 + 1.9 * number for number in columns]))
    for each, (heading, names), kinds, number in zip(axes, panels, every, columns, strict=True):
        marks = class_marks(len(kinds) - (unnamed in kinds))
        if unnamed in kinds:
            marks.insert(int(np.searchsorted(kinds, unnamed)), ("0.7", "o"))
        colors, shapes = (np.array(column) for column in zip(*marks, strict=True))
        numbers = np.searchsorted(kinds, names.astype(str))
        for some in np.array_split(order, _LAYERS):  # a call draws one shape, so the shapes take turns
            for shape in dict.fromkeys(shapes):
                mine = some[shapes[numbers[some]] == shape]
                each.scatter(*places[mine].T, s=_dot(len(places)), c=colors[numbers[mine]], marker=shape, linewidths=0)
        for kind, (color, marker) in sorted(zip(kinds, marks, strict=True), key=lambda each: each[0] == unnamed):
            each.scatter([], [], s=18, color=color, marker=marker, label=kind)
        each.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False, ncols=number)
        each.set(title=heading, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_confusion(counts: np.ndarray, classes: Sequence[str], title: str, path: Path, of: str = "cells") -> None:
    """Draw a confusion matrix; the colours of a row are the shares of its class predicted as each class.

    Args:
        counts: `(classes, classes)` number of cells, by class and predicted class.
        classes: Names of the classes.
        title: Title above the matrix.
        path: Path of the PNG.
        of: Plural noun for the counted things.
    """
    number = len(classes)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = max(4.5, 0.62 * number if number <= _MOST_ANNOTATED else 0.24 * number + 2)
    figure = new_figure((side + 2.6, side + 1.6))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = 9 if number <= _MOST_ANNOTATED else 7
    axes.set_xticks(range(number), classes, rotation=90, fontsize=font)
    totals = counts.sum(axis=1)
    named = [f"{name} ({total})" for name, total in zip(classes, totals, strict=True)]
    axes.set_yticks(range(number), named, fontsize=font)
    axes.set(xlabel="predicted", ylabel=f"label ({of})", title=title)
    if number <= _MOST_ANNOTATED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, label=f"share of the label's {of}", shrink=0.7)
    figure.savefig(path, dpi=120)


def draw_predicted(truth: np.ndarray, predicted: np.ndarray, label: str, title: str, path: Path) -> None:
    """Draw predicted values against the true ones, both `(cells,)`."""
    figure = new_figure((5.6, 5.2))
    axes = figure.subplots()
    axes.scatter(truth, predicted, s=_dot(len(truth)), alpha=0.6, linewidths=0)
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    axes.plot(ends, ends, color="0.5", linewidth=1, linestyle="--", label="predicted = true")
    axes.set(xlabel=label, ylabel=f"predicted {label}", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def label_points(axis: Any, names: Sequence[str], places: np.ndarray, size: float = 7) -> list[Any]:
    """Write names beside points, so that none lies on another or outside the axes.

    Call it when the limits of the axes are final.

    Args:
        axis: Axes with the points.
        names: Names, the most important first; those for which there is no room are left out.
        places: Places of the points, `(names, 2)`, in the units of the axes.
        size: Size of the letters, in points.

    Returns:
        The texts that were written.
    """
    axis.figure.draw_without_rendering()  # a constrained layout moves the axes when it is drawn
    written: list[Any] = []
    sides: list[tuple[float, float, str, str]] = [(4, 0, "left", "center"), (-4, 0, "right", "center")]
    sides += [(0, size, "center", "bottom"), (0, -size, "center", "top")]
    for name, place in zip(names, places, strict=True):
        write_name(axis, name, place, sides, written, fontsize=size)
    return written


def write_name(
    axis: Any,
    name: str,
    place: np.ndarray,
    sides: Sequence[tuple[float, float, str, str]],
    written: list[Any],
    **style: Any,
) -> None:
    """Write a name at the first side where it lies inside the axes and on no other name, or nowhere.

    Args:
        axis: Axes of a figure that has been laid out.
        name: Name.
        place: `(2,)` place of what it names, in the units of the axes.
        sides: Sides in order: points to the right and up, and horizontal and vertical alignment.
        written: Texts that were written before, to which this one is added.
        **style: Further arguments of matplotlib's `annotate`.
    """
    frame = axis.get_window_extent()
    for right, up, horizontal, vertical in sides:
        text = axis.annotate(
            *(name, place, (right, up)), textcoords="offset points", ha=horizontal, va=vertical, **style
        )
        box = text.get_window_extent()
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if inside and not any(box.overlaps(other.get_window_extent()) for other in written):
            written.append(text)
            return
        text.remove()


def class_marks(number: int) -> list[tuple[str, str]]:
    """Return a colour and a shape of matplotlib for each of `number` classes; the first 63 pairs differ.

    Classes of one shape have colours of Okabe and Ito, which readers with any kind of colour blindness tell apart.
    """
    return [(_COLORS[place % len(_COLORS)], _SHAPES[place // len(_COLORS) % len(_SHAPES)]) for place in range(number)]


def _dot(num_cells: int) -> float:
    return float(np.clip(6000 / num_cells, 3, 18))


def new_figure(size: tuple[float, float]) -> Any:
    """Return a figure without pyplot, of a width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
