# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What the nearest cells are, column by column, beside what the cells of the index are."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tahoex1_hf.runs.report import markdown_table

_SHOWN = 5  # values of a column
_MOST_KINDS = 10_000  # values from which on a column counts as names
_QUARTILES = (25, 50, 75)
_KEPT = 100_000  # numbers of a column that are kept for its quartiles
MISSING = "missing"


@dataclass
class _Column:
    """What has been seen of a column.

    Attributes:
        counts: Value -> number of neighbours with it.
        agreement: Shares of each query cell's neighbours that have their commonest value.
        numbers: Values of a column of numbers.
    """

    counts: Counter[str] = field(default_factory=Counter)
    agreement: list[float] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)


class Summary:
    """What the neighbours of cells are.

    Args:
        background: Columns of a random sample of the index's cells that pass the filter.
    """

    def __init__(self, background: pa.Table):
        self.background = background
        self._seen = {name: _Column() for name in background.column_names}
        self._number = 0

    def add(self, columns: pa.Table, per_cell: np.ndarray) -> None:
        """Add the neighbours of cells.

        Args:
            columns: Columns of the neighbours, those of the first cell first.
            per_cell: Number of neighbours of each cell, `(cells,)`.
        """
        ends = np.cumsum(per_cell)
        self._number += int(ends[-1])
        for name, seen in self._seen.items():
            values = columns[name].combine_chunks()
            if _is_number(values.type):
                if sum(map(len, seen.numbers)) < _KEPT:
                    seen.numbers.append(_numbers(values))
            elif len(seen.counts) <= _MOST_KINDS:
                codes, kinds = _coded(values)
                seen.counts.update(
                    {
                        kinds[code]: int(number)
                        for code, number in zip(*np.unique(codes, return_counts=True), strict=True)
                    }
                )
                for low, high in zip(ends - per_cell, ends, strict=True):
                    if high > low:
                        seen.agreement.append(float(np.bincount(codes[low:high]).max() / (high - low)))

    def text(self) -> str:
        """Return a Markdown table."""
        rows = []
        for name, seen in self._seen.items():
            given = self.background[name].combine_chunks()
            if _is_number(given.type):
                mine = np.concatenate([*seen.numbers, np.zeros(0)])
                rows.append([name, _quartiles(mine), _quartiles(_numbers(given)), "-"])
            elif len(seen.counts) > min(_MOST_KINDS, max(1, self._number // 2)):
                rows.append([name, f"{len(seen.counts)} values or more", "-", "-"])
            else:
                codes, kinds = _coded(given)
                shares = dict(zip(kinds, np.bincount(codes, minlength=len(kinds)) / max(1, len(codes)), strict=True))
                best = seen.counts.most_common(_SHOWN)
                of_index = [f"{shares.get(kind, 0):.1%}" for kind, _ in best]
                rows.append(
                    [
                        name,
                        ", ".join(f"{kind} {number / self._number:.1%}" for kind, number in best),
                        ", ".join(of_index),
                        f"{np.mean(seen.agreement):.1%}",
                    ]
                )
        header = ["column", "neighbours", "the same in the index", "of a cell's neighbours agree"]
        return markdown_table(header, rows)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _numbers(values: pa.Array) -> np.ndarray:
    found = np.asarray(pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    return found[np.isfinite(found)]


def _quartiles(values: np.ndarray) -> str:
    if not len(values):
        return MISSING
    low, middle, high = np.percentile(values, _QUARTILES)
    return f"{middle:.4g} [{low:.4g}, {high:.4g}]"


def _coded(values: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Return the number of each value's kind, and the kinds as text."""
    texts = pc.fill_null(pc.cast(values, pa.string()), MISSING).dictionary_encode()
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    return texts.indices.to_numpy(), texts.dictionary.to_pylist()
