# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The figure of a comparison: distributions of cosines, and the causes that were tried."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.embedding.release.causes import FOUND, Cause
from tahoex1_hf.embedding.release.comparing import BEST_KNOWN, LOW, Comparison

# Okabe and Ito's colours, which the colour-blind can tell apart, each with its own line.
_LINES: list[tuple[str, str, str, Any, float]] = [
    ("public", "public embeddings with ours", "#D55E00", "-", 2.4),
    ("floor", "our own floor (samples, bfloat16)", "#000000", "--", 1.8),
    ("sampling", "samples alone", "#0072B2", ":", 1.6),
    ("precision", "precision alone", "#009E73", "-.", 1.6),
    ("without_drug", "ours with and without drug token", "#CC79A7", (0, (5, 1, 1, 1, 1, 1)), 1.6),
]
_SMALLEST = 1e-7  # departures below it are drawn there: the rounding of float32


def draw_comparison(comparison: Comparison, causes: Sequence[Cause] | None, path: Path) -> None:
    """Draw which share of the cells departs how far, and what the causes that were tried explain, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5 if causes else 7.2, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, width_ratios=[1.25, 1]) if causes else [figure.subplots()]
    _draw_departures(panels[0], comparison)
    if causes:
        _draw_causes(panels[1], causes)
    with WholeFile(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _draw_departures(axes: Any, comparison: Comparison) -> None:
    for name, label, color, style, width in _LINES:
        values = getattr(comparison, name)
        if values is not None:
            departures = np.sort(np.maximum(1 - np.ravel(values), _SMALLEST))
            shares = np.arange(1, len(departures) + 1) / len(departures)
            axes.step(departures, shares, where="post", color=color, linestyle=style, linewidth=width, label=label)
    axes.plot(1 - BEST_KNOWN.median, 0.5, "D", color="#E69F00", markeredgecolor="black", label="best known, median")
    axes.plot(
        1 - LOW,
        1 - BEST_KNOWN.below,
        "s",
        color="#E69F00",
        markeredgecolor="black",
        label=f"best known, share above {LOW}",
    )
    axes.set(
        xscale="log",
        xlabel="departure, 1 - cosine",
        ylabel="share of the cells with at most this departure",
        title="Public embeddings and ours",
        ylim=(0, 1.02),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _draw_causes(axes: Any, causes: Sequence[Cause]) -> None:
    places = np.arange(len(causes))[::-1]  # the likeliest at the top
    closed = [np.clip(cause.closed, 0, 1) for cause in causes]
    doubts = [(place, cause.doubt) for place, cause in zip(places, causes, strict=True) if cause.doubt is not None]
    axes.barh(places, closed, color="#56B4E9", edgecolor="black", height=0.5, label="gap that the best trial closes")
    axes.plot(
        [doubt for _, doubt in doubts],
        [place for place, _ in doubts],
        "o",
        color="#D55E00",
        markeredgecolor="black",
        label="doubt in what we take for true",
        linestyle="none",
    )
    axes.axvline(FOUND, color="0.5", linestyle="--", linewidth=1)
    axes.set_yticks(places, [cause.name for cause in causes])
    axes.set(xlim=(-0.02, 1.05), xlabel="share", title="Causes that were tried, the likeliest at the top")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
