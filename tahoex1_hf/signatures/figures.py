# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A map of drugs, coloured by their mechanisms in colours and shapes that the colour-blind can tell apart."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tahoex1_hf.common import plots
from tahoex1_hf.signatures.shifts import unit

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito 2008, without black and the yellow that is hard to see on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
SHAPES = ("o", "s", "^", "D")
_OTHER = "#B0B0B0"
_UMAP_FROM = 100  # drugs; fewer are placed by their two main directions
_NAMED = 60  # drugs whose names are written, where there is room
_FEWEST = 2  # drugs of a mechanism with a colour of its own


def draw_map(
    path: Path, drugs: Sequence[str], kinds: Sequence[str], shifts: np.ndarray, table: "pd.DataFrame", seed: int
) -> None:
    """Draw a map of drugs: those near one another shift cells alike.

    Args:
        path: Path of the PNG.
        drugs: Names of the drugs.
        kinds: Mechanism of each, empty where it is not known.
        shifts: Their shifts, `(drugs, width)`.
        table: Signatures, with `drug`, `dose`, `effect` and `q_value`; the size of a dot is the drug's mean effect,
            and those without an effect (q above 0.05) are hollow.
        seed: Seed of UMAP.
    """
    names = [f"{drug} {dose}".strip() for drug, dose in zip(table["drug"], table["dose"], strict=True)]
    strength = table.assign(name=names).groupby("name")[["effect", "q_value"]].mean().loc[list(drugs)]
    effect = np.clip(strength["effect"].to_numpy(), 0, None)
    sizes = 20 + 120 * effect / max(float(effect.max()), 1e-9)
    solid = strength["q_value"].to_numpy() <= 0.05
    directions = unit(np.asarray(shifts, dtype=np.float64))
    by_umap = len(drugs) >= _UMAP_FROM
    places = plots.umap_places(directions, seed) if by_umap else _main_directions(directions)
    shown = [kind for kind, number in Counter(kinds).most_common() if kind and number >= _FEWEST]
    shown = shown[: len(COLORS) * len(SHAPES)]
    figure = plots.new_figure((10.5 if shown else 7.5, 6.5))
    axes = figure.subplots()
    for number, kind in enumerate([*shown, ""]):
        mine = np.array([each == kind if kind else each not in shown for each in kinds])
        color = COLORS[number % len(COLORS)] if kind else _OTHER
        shape = SHAPES[number // len(COLORS)] if kind else "o"
        for full in (True, False):
            some = np.flatnonzero(mine & (solid == full))
            face = color if full else "none"
            axes.scatter(
                *places[some].T, s=sizes[some], marker=shape, facecolors=face, edgecolors=color, linewidths=1.2
            )
        if mine.any():
            label = kind or ("other or unknown" if shown else "drugs")
            axes.scatter([], [], s=40, marker=shape, color=color, label=label)
    axes.scatter([], [], s=40, facecolors="none", edgecolors="black", label="no effect (q > 0.05)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    axis = "UMAP" if by_umap else "main direction"
    axes.set(xlabel=f"{axis} 1", ylabel=f"{axis} 2", xticks=[], yticks=[])
    axes.set_title("Drugs by the direction of their shift; size: effect")
    axes.spines[["top", "right"]].set_visible(False)
    order = np.argsort(-effect, kind="stable")[:_NAMED]
    plots.label_points(axes, [drugs[number] for number in order], places[order])
    figure.savefig(path, dpi=120)


def _main_directions(directions: np.ndarray) -> np.ndarray:
    left, sizes, _ = np.linalg.svd(directions, full_matrices=False)
    places = np.zeros((len(directions), 2))
    number = min(2, len(sizes))
    places[:, :number] = left[:, :number] * sizes[:number]
    return places
