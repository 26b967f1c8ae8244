"""Draw charts of a run: speed beside the reference and the hardware (results.png), and scaling (scaling.png)."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.measuring import Row
from benchmarks.table import number

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS, SECOND = "#1f6fb4", "#9a9a9a", "#f0a030"
RATE_PARTS = ("tokenizing", "embedding", "genes", "training", "feeding")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
}


def draw_results(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Draw the speed as a multiple of the reference's, and as a share of the hardware limit.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in rows if row.part in RATE_PARTS and row.unit == "cells/s" and row.reference]
    if not rows:
        return False
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(12.5, 1.7 + 0.36 * len(rows)), sharey=True, layout="constrained"
        )
        places = range(len(rows))
        ratios = [row.ratio or 0.0 for row in rows]
        left.barh(places, [ratio - 1 for ratio in ratios], left=1, color=OURS, height=0.62)
        for place, ratio in zip(places, ratios, strict=True):
            left.annotate(f"{ratio:.1f}×", (max(ratio, 1), place), (4, 0), textcoords="offset points", va="center")
        left.set_xscale("log")
        left.set_xlim(min(0.8, 0.9 * min(ratios)), 2 * max(*ratios, 1.5))
        left.axvline(1, color="black", linewidth=0.8)
        _plain_ticks(left.xaxis, [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick < 2 * max(ratios)])
        left.set_yticks(places, [f"{row.part}: {row.name}" for row in rows])
        left.set_xlabel("speed as a multiple of the reference's\n(median of the ratios within rounds)")
        left.set_title("Beside the original's algorithm")
        _draw_fractions(right, rows)
        left.invert_yaxis()
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return True


def _draw_fractions(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        values = {count: 100 * value for count, value in row.fractions.items()}
        wide = max(values.values(), default=0)
        if not values:
            continue
        color = THEIRS if "copy" in values else OURS
        axes.barh(place, wide, color=color, height=0.62)
        text = f"{wide:.0f} %"
        if "performed" in values:
            axes.plot([values["performed"]] * 2, [place - 0.31, place + 0.31], color=SECOND, linewidth=3)
            text += f" ({values['performed']:.0f} %)"
        axes.annotate(text, (wide, place), (5, 0), textcoords="offset points", va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    most = max((100 * value for row in rows for value in row.fractions.values()), default=100)
    axes.set_xlim(0, 1.3 * max(most, 85))
    axes.axvline(100, color="black", linewidth=0.8, zorder=0)
    axes.set_xlabel(
        "% of the rate of a plain matrix product (blue)\n"
        "or memory copy (grey); in orange and brackets,\n"
        "only what was performed counts"
    )
    axes.set_title("Beside the hardware")


def draw_scaling(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Draw the speed by length, number of cells and number of processes.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in rows if row.part == "scaling" and row.values]
    panels: list[tuple[Callable[..., None], list[Row]]] = [
        (draw, chosen)
        for draw, key in ((_draw_lengths, "length"), (_draw_cells, "seconds"), (_draw_processes, "processes"))
        if (chosen := [row for row in rows if key in row.details])
    ]
    if not panels:
        return False
    with plt.rc_context(STYLE):
        figure, all_axes = plt.subplots(
            1, len(panels), figsize=(4.6 * len(panels), 4.2), squeeze=False, layout="constrained"
        )
        for axes, (draw, chosen) in zip(all_axes[0], panels, strict=True):
            draw(axes, chosen)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return True


def _draw_lengths(axes: Any, rows: Sequence[Row]) -> None:
    lengths = [row.details["length"] for row in rows]
    for label, color, all_series in (
        ("tahoex1_hf", OURS, [row.series for row in rows]),
        ("reference", THEIRS, [row.reference for row in rows]),
    ):
        values = [series.values for series in all_series if series]
        axes.plot(lengths, [statistics.median(v) for v in values], "o-", color=color, label=label)
        lowest, highest = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(lengths, lowest, highest, color=color, alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    _plain_ticks(axes.xaxis, lengths)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set(xlabel="tokens of a cell", ylabel="tokens per second", title="Length (line: median, band: all rounds)")
    axes.legend(frameon=False)


def _draw_cells(axes: Any, rows: Sequence[Row]) -> None:
    cells = [row.details["cells"] for row in rows]
    values = [row.median for row in rows]
    axes.plot(cells, values, "o-", color=OURS)
    for row, value in zip(rows, values, strict=True):
        axes.annotate(f"{row.details['seconds']:.0f} s", (row.details["cells"], value), (-6, 4),
                      textcoords="offset points", ha="right")  # fmt: skip
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, cells)
    axes.margins(x=0.15, y=0.15)
    axes.set(xlabel="cells in the file", ylabel="cells per second, start included", title="tahoex1 embed, one file")


def _draw_processes(axes: Any, rows: Sequence[Row]) -> None:
    labels = [row.name.replace(", ", "\n").replace(" launch", "\nlaunch") for row in rows]
    values = [row.median for row in rows]
    axes.bar(labels, values, color=[OURS if row.details["processes"] > 1 else THEIRS for row in rows], width=0.55)
    for place, row in enumerate(rows):
        text = number(row.median) + (f"\n({row.ratio:.2f}×)" if row.ratio else "")
        axes.annotate(text, (place, row.median), (0, 3), textcoords="offset points", ha="center")
    axes.margins(y=0.2)
    axes.set_xlim(-0.7, max(1, len(rows) - 1) + 0.7)
    axes.set(ylabel="cells per second, start included", title="Processes of one thread each")


def _plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    axis.set_ticks(list(ticks), [f"{tick:,g}" if tick < 1e6 else f"{tick / 1e6:g} M" for tick in ticks])
    axis.set_minor_locator(NullLocator())
