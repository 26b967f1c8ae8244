"""Names beside points are readable."""

import numpy as np

from tahoex1_hf.common.plots import label_points


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
