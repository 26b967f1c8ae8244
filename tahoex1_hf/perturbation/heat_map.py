# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Heat maps: the strongest genes in every group, or the interactions of pairs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pandas import DataFrame

_MOST_GENES, _MOST_PANELS = 30, 4
_SIGNIFICANT = 0.1


def plot_heat_map(table: "DataFrame", path: str | Path, interactions: "DataFrame | None" = None) -> None:
    """Draw the p values of the strongest genes in every group, or, of pairs, the interaction of each two genes.

    A dot marks what has q < 0.1.

    Args:
        table: Table that `perturb_genes` returns.
        path: Path of the PNG.
        interactions: Its table of interactions, if there is one.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure

    if interactions is not None:
        panels = _of_pairs(interactions)
        label = "interaction,\nshare of the sum"
    else:
        panels = _of_groups(table)
        label = "−log10 p, negative for\nless than similar genes"
    if not panels:
        raise ValueError(
            "There is nothing to draw: no perturbation was compared with controls, nor a pair with its sum."
        )
    rows, columns = (max(panel[1].shape[axis] for panel in panels) for axis in (0, 1))
    size = (len(panels) * (2.0 + 0.32 * columns), max(3.4, 1.6 + 0.26 * rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    largest = max(float(np.nanmax(np.abs(panel[1]))) for panel in panels) or 1.0
    for axis, (title, values, marked, names, across) in zip(axes, panels, strict=True):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        axis.set_xticks(range(len(across)), across, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.plot(*np.nonzero(marked)[::-1], "o", color="black", markersize=3)
        axis.set_title(title, fontsize=9)
        axis.set_facecolor("#dddddd")
    bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.8)
    bar.set_label(f"{label} (dots: q < {_SIGNIFICANT})", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=130)


_Panel = tuple[str, np.ndarray, np.ndarray, list[str], list[str]]


def _of_groups(table: "DataFrame") -> list[_Panel]:
    known = table[np.isfinite(table["p_value"])]
    known = known.assign(height=-np.log10(known["p_value"]) * np.where(known["z_score"] < 0, -1, 1))
    strongest = known["height"].groupby(known["gene"]).max().sort_values(ascending=False, kind="stable")
    genes, groups = strongest.index[:_MOST_GENES].tolist(), list(dict.fromkeys(known["group"]))
    if not genes:
        return []
    of_gene = {gene: row for row, gene in enumerate(genes)}
    of_group = {group: column for column, group in enumerate(groups)}
    rows = known[known["gene"].isin(genes)]
    places = rows["gene"].map(of_gene).to_numpy(), rows["group"].map(of_group).to_numpy()
    return [("", *_filled((len(genes), len(groups)), places, rows, "height"), genes, list(map(str, groups)))]


def _of_pairs(interactions: "DataFrame") -> list[_Panel]:
    panels: list[_Panel] = []
    for group, rows in interactions.groupby("group", sort=False):
        rows = rows[np.isfinite(rows["interaction"])]
        names = rows["gene"].str.split("+", regex=False)
        genes = sorted(set(names.explode()))[:_MOST_GENES]
        place = {gene: number for number, gene in enumerate(genes)}
        kept = np.array([set(pair) <= set(genes) for pair in names])
        if not kept.any():
            continue
        first, second = (np.array([place[pair[which]] for pair in names[kept]]) for which in (0, 1))
        places = np.concatenate([first, second]), np.concatenate([second, first])
        both = rows[kept].iloc[np.tile(np.arange(kept.sum()), 2)]
        title = "" if group == "all" else str(group)
        panels.append((title, *_filled((len(genes), len(genes)), places, both, "interaction"), genes, genes))
    return panels[:_MOST_PANELS]


def _filled(
    shape: tuple[int, int], places: tuple[Any, Any], rows: "DataFrame", column: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return values in their places, NaN elsewhere, and which of them are significant."""
    values, marked = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    values[places] = rows[column].to_numpy()
    marked[places] = rows["q_value"].lt(_SIGNIFICANT).to_numpy()
    return values, marked
