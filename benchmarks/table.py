"""Render the table that a run prints."""

import statistics
from collections.abc import Sequence

from benchmarks.measuring import Row

HEADINGS = ("part", "measured", "unit", "median", "best", "reference", "ours / ref.", "of limit", "remarks")
_LEFT = (0, 1, 2, 8)


def number(value: float) -> str:
    """Return a number as text, with three digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells_of(row: Row) -> tuple[str, ...]:
    """Return the texts of a row's columns."""
    if row.not_measured:
        return (row.part, row.name, "", "", "", "", "", "", f"not measured: {row.not_measured}")
    theirs = number(statistics.median(row.reference.values)) if row.reference else ""
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
    limit = " / ".join(f"{100 * value:.0f} %" for value in row.fractions.values())
    return (row.part, row.name, row.unit, number(row.median), number(row.best), theirs, ratio, limit, row.remark)


def render(rows: Sequence[Row]) -> str:
    """Return the table as text, one line a row."""
    lines = [HEADINGS, *(cells_of(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    widths[-1] = 0
    text = [
        "  ".join(
            cell.ljust(width) if i in _LEFT else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * 150, *text[1:], "", *NOTES])


NOTES = (
    "median, best: over the rounds. reference: the original's algorithm in plain torch, median, unless a remark names",
    "another. ours / ref.: median over the rounds of the ratio within a round (of MB and s, smaller is better).",
    "of limit: share of the matrix-product rate (embedding, genes, training) or of the memory-copy rate (tokenizing,",
    "feeding) measured around the same work; where there are two, the first counts the whole transformer, the second",
    "the operations that ours performs where only <cls> is asked for.",
)
