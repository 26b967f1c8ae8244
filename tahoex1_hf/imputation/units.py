# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Units of expected expression: the model's own, and counts of the cell.

A model that was trained on bins predicts a place in the order of the counts of its cell, which no table turns into
molecules. What can be said is which count stands at that place in this cell.
"""

from typing import Literal, get_args

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

Unit = Literal["model", "counts"]


def check_unit(unit: str) -> None:
    """Raise ValueError for a unit that does not exist."""
    if unit not in get_args(Unit):
        raise ValueError(f"unit={unit!r} (--unit): pass one of {get_args(Unit)}.")


def unit_name(unit: str, tokenizer: TahoeX1Tokenizer) -> str:
    """Return a unit in words, for reports."""
    if unit == "counts":
        return "counts of the cell"
    names = {"bins": "bins", "log1p": f"log1p of counts per {tokenizer.target_sum:,.0f}", "raw": "counts"}
    return names[tokenizer.value_encoding]


def as_counts(values: np.ndarray, owners: np.ndarray, rows: GeneRows, tokenizer: TahoeX1Tokenizer) -> np.ndarray:
    """Turn predictions into counts of their cells.

    Args:
        values: `(values,)` predictions in the tokenizer's unit.
        owners: `(values,)` row number of the cell of each.
        rows: Genes and counts of the cells.
        tokenizer: Tokenizer, which knows the unit.

    Returns:
        `(values,)` float32. Of bins, the count that stands at the bin's place among the counts of the genes that the
        cell expresses, between two counts in proportion: never more than the cell's largest count. Bin 0 is a count of
        0, and less than bin 1 is as much of the smallest count. NaN for cells that express no known gene.
    """
    lengths = np.diff(rows.offsets)
    if tokenizer.value_encoding == "raw":
        return values.astype(np.float32)
    if tokenizer.value_encoding == "log1p":
        totals = np.bincount(rows.cells(), weights=rows.counts, minlength=rows.num_cells)
        return (np.expm1(values.astype(np.float64)) * totals[owners] / tokenizer.target_sum).astype(np.float32)
    counts = rows.counts[np.lexsort((rows.counts, rows.cells()))].astype(np.float64)
    # The edge number i of the bins is the quantile i / (num_bins - 2), and bin i + 1 begins behind it.
    share = np.clip((values.astype(np.float64) - 1) / (tokenizer.num_bins - 2), 0, 1)
    place = share * np.maximum(lengths[owners] - 1, 0)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(lengths[owners] - 1, 0))
    some = lengths[owners] > 0
    result = np.full(len(values), np.nan)
    first = rows.offsets[:-1][owners[some]]
    low, high = counts[first + below[some]], counts[first + above[some]]
    result[some] = (low + (high - low) * (place - below)[some]) * np.clip(values[some], 0, 1)
    return result.astype(np.float32)
