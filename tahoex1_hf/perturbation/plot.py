# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A figure of ranked perturbations: their shifts beside the shifts of genes of similar expression."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.plots import label_points

if TYPE_CHECKING:
    from pandas import DataFrame

_MOST_GROUPS = 12
_MOST_NAMES = 10  # in the volcano
_BLUE, _ORANGE, _GREY = "#4e79a7", "#f28e2b", "#9a9a9a"


def check_plot(path: str | Path) -> None:
    """Raise ValueError before any work is done if the figure could not be written."""
    if Path(path).suffix != ".png":
        raise ValueError(f"{path}: a plot must end in .png.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"The folder {Path(path).parent} of {path} does not exist.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("A plot needs matplotlib: pip install 'tahoex1_hf[demo]'.") from None


def plot_ranking(table: "DataFrame", path: str | Path, most: int = 20) -> None:
    """Draw the genes that shift each group of cells most, as bars, with the null distribution beside each bar.

    Perturbations of too few cells to be compared with controls are left out if others were compared. A single group
    also gets a volcano plot of all its genes: shift against p value, with the names of the most extreme.

    Args:
        table: Table that `perturb_genes` returns.
        path: Path of the PNG.
        most: Number of genes in a group; several groups get half as many each.

    Raises:
        ValueError: For a table in which no perturbation changed a cell.
    """
    from matplotlib.figure import Figure

    measure = "target_change" if "target_change" in table.columns else "cosine_distance"
    table = table[table[measure].notna()]
    if table["n_null"].any():
        table = table[table["n_null"] > 0]
    if not len(table):
        raise ValueError("There is nothing to draw: no perturbation changed a cell.")
    groups = list(dict.fromkeys(table["group"]))[:_MOST_GROUPS]
    alone = len(groups) == 1
    points = alone and len(table) > 2 and table["p_value"].notna().sum() > 2
    columns = (2 if points else 1) if alone else min(4, len(groups))
    rows = 1 if alone else math.ceil(len(groups) / columns)
    shown = most if alone else most // 2
    tallest = min(shown, int(table.groupby("group").size().max()))
    figure = Figure(figsize=(4.4 * columns + 0.6, rows * (1.6 + 0.24 * tallest)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, group in zip(axes, groups, strict=False):
        _bars(axis, _strongest(table[table["group"] == group], measure, shown), measure, str(group))
    if points:
        _volcano(axes[1], table, measure)
    for axis in axes[len(groups) + points :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=130)


def _strongest(rows: "DataFrame", measure: str, number: int) -> "DataFrame":
    """Return the first rows; with a target, rows from both ends of the ranking."""
    if measure != "target_change" or len(rows) <= number:
        return rows.head(number)
    return rows.iloc[[*range(number - number // 2), *range(len(rows) - number // 2, len(rows))]]


def _axis_label(measure: str) -> str:
    return {"target_change": "change of cosine to the target", "cosine_distance": "cosine distance"}[measure]


def _bars(axis: Any, rows: "DataFrame", measure: str, title: str) -> None:
    places = np.arange(len(rows))
    values, errors = rows[measure].to_numpy(), rows[f"{measure}_se"].fillna(0).to_numpy()
    colors = [_BLUE if value >= 0 else _ORANGE for value in values]
    axis.barh(places, values, xerr=errors, color=colors, error_kw={"elinewidth": 1})
    mean, sd = rows["null_mean"].to_numpy(), rows["null_sd"].to_numpy()
    if np.isfinite(mean).any():
        axis.errorbar(
            mean, places, xerr=np.nan_to_num(sd), fmt="|", color="black", ecolor=_GREY, elinewidth=3, alpha=0.8,
            markersize=8, label="null: mean ± sd",
        )  # fmt: skip
        axis.legend(fontsize=7, loc="lower right", frameon=False)
    if measure == "cosine_distance":
        axis.set_xlim(left=0)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in rows["gene"]]
    labels = [f"{name} ({cells})" for name, cells in zip(names, rows["n_cells_changed"], strict=True)]
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(f"{_axis_label(measure)} (mean ± s.e.)", fontsize=8)
    axis.set_title(title if title != "all" else "genes (cells changed)", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _volcano(axis: Any, table: "DataFrame", measure: str) -> None:
    rows = table[table["p_value"].notna()]
    heights = -np.log10(rows["p_value"].to_numpy())
    extreme = rows["q_value"].lt(0.1).to_numpy()
    for chosen, color, label in ((~extreme, _GREY, "q ≥ 0.1"), (extreme, _BLUE, "q < 0.1")):
        if chosen.any():
            axis.scatter(rows[measure][chosen], heights[chosen], s=10, color=color, alpha=0.7, label=label)
    if measure == "cosine_distance":
        axis.set_xscale("log")
    axis.set_xlabel(_axis_label(measure), fontsize=8)
    axis.set_ylabel("−log10 p value against genes of similar expression", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    strongest = np.lexsort((-rows["z_score"].abs().fillna(0).to_numpy(), -heights))[:_MOST_NAMES]
    places = np.column_stack([rows[measure].to_numpy()[strongest], heights[strongest]])
    label_points(axis, rows["gene"].iloc[strongest].tolist(), places)
