# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures of the page, as PNGs that a page holds, in colours that readers with colour blindness tell apart.

Classes have colours of Okabe and Ito (2008), and from the ninth on other marks; the larger ones bear their names, so
that nothing hangs on colour alone.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tahoex1_hf.common.plots import write_name

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
_MARKS = ("o", "^", "s", "P", "X", "D", "v", "*")
_SIDES = [(0, 0, side, "center") for side in ("center", "left", "right")]
_NAMED = 0.02  # share of the cells from which on a class bears its name
_AROUND = 15  # cells around a name, most of which must be of its class


@dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Attributes:
        alt: Text for readers who do not see it.
        caption: Text below it.
        png: The PNG, in base64.
    """

    alt: str
    caption: str
    png: str


def places_figure(
    panels: Sequence[tuple[str, np.ndarray]], labels: np.ndarray, classes: Sequence[str], alt: str, caption: str
) -> Figure:
    """Draw the same cells at several places, side by side, marked by class.

    Args:
        panels: Heading and `(cells, 2)` places of each panel.
        labels: `(cells,)` class numbers.
        classes: Names of the classes.
        alt: Text for readers who do not see it.
        caption: Text below it.
    """
    columns = 1 + len(classes) // 26
    figure = _blank((4.7 * len(panels) + 0.6 + 1.7 * columns, 4.7))
    size = float(np.clip(9000 / max(len(labels), 1), 4, 22))
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for each, (heading, places) in zip(axes, panels, strict=True):
        for number, name in enumerate(classes):
            mine = labels == number
            style = {"color": _COLORS[number % 8], "marker": _MARKS[number // 8 % 8]}
            each.scatter(*places[mine].T, s=size, linewidths=0, label=_short(name), **style)
        each.set(title=heading, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
        each.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right center", fontsize=8, frameon=False, ncols=columns, markerscale=1.6
    )
    figure.draw_without_rendering()  # which lays it out
    for each, (_, places) in zip(axes, panels, strict=True):
        _write_names(each, places, labels, classes)
    return Figure(alt, caption, _encoded(figure))


def histogram_figure(values: np.ndarray, label: str, alt: str, caption: str) -> Figure:
    """Draw how many cells have which value.

    Args:
        values: `(cells,)` finite values.
        label: Label of the axis.
        alt: Text for readers who do not see it.
        caption: Text below it.
    """
    figure = _blank((6.2, 2.9))
    axes = figure.subplots()
    axes.hist(values, bins=40, color=_COLORS[0])
    middle = float(np.median(values))
    axes.axvline(middle, color=_COLORS[3], linewidth=2, linestyle="--", label=f"median {middle:.3g}")
    axes.set(xlabel=label, ylabel="cells")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return Figure(alt, caption, _encoded(figure))


def _write_names(axes: Any, places: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Write the names of classes on a light ground, the largest first, in a figure that has been laid out.

    A name stands at the cell nearest to the middle of its class. It is left out where most cells around are of other
    classes, and where there is no room for it.
    """
    extent = np.maximum(np.ptp(places, axis=0), 1e-9)
    sizes = np.bincount(labels, minlength=len(classes))
    ground = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.95}
    written: list[Any] = []
    for number in np.argsort(-sizes, kind="stable"):
        if sizes[number] < max(_NAMED * len(labels), 1):
            break
        own = places[labels == number]
        place = own[np.argmin(((own - np.median(own, axis=0)) ** 2).sum(1))]
        around = np.argsort((((places - place) / extent) ** 2).sum(1), kind="stable")[:_AROUND]
        if (labels[around] == number).mean() >= 0.5:
            write_name(axes, _short(classes[number]), place, _SIDES, written, fontsize=8, weight="bold", bbox=ground)


def _short(name: str) -> str:
    """Return a name as matplotlib shows it, without its formulas, and not too long."""
    name = name if len(name) <= 28 else f"{name[:27]}…"
    return name.replace("$", r"\$").lstrip("_") or "–"


def _blank(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _encoded(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()
