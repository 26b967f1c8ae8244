# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Ragged rows, and loops over them for which numpy would need arrays of the size of the data."""

from dataclasses import dataclass

import numba
import numpy as np


@dataclass(frozen=True)
class CountRows:
    """Cells as views into flat arrays: genes and counts need not lie side by side, nor the cells in order.

    Attributes:
        genes: token ids of any integer type.
        gene_starts: `(cells,)` int64, where each cell's genes start.
        counts: counts above zero, uint16 or float32.
        count_starts: `(cells,)` int64, where each cell's counts start.
        lengths: `(cells,)` int64, genes of each cell.
    """

    genes: np.ndarray
    gene_starts: np.ndarray
    counts: np.ndarray
    count_starts: np.ndarray
    lengths: np.ndarray


@numba.njit(nogil=True, cache=True)
def compact_csr(
    indptr: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    token_ids: np.ndarray,
    tokens: np.ndarray,
    counts: np.ndarray,
    offsets: np.ndarray,
) -> tuple[bool, float, bool]:
    """Keep the known, stored, non-zero entries of a CSR matrix.

    Args:
        indptr: `(cells + 1,)` from 0.
        columns: `(stored,)`.
        values: `(stored,)` of any real type.
        token_ids: token of every column, -1 for none.
        tokens: at least `(stored,)`, written.
        counts: at least `(stored,)`, float32, written.
        offsets: `(cells + 1,)`, written.

    Returns:
        Whether the columns of every row exist and rise; the sum of the values of unknown columns; whether all values
        kept are finite and not negative.
    """
    place = 0
    in_order, good, unknown = True, True, 0.0
    offsets[0] = 0
    for cell in range(len(indptr) - 1):
        last = -1
        for i in range(indptr[cell], indptr[cell + 1]):
            column = np.int64(columns[i])
            inside = 0 <= column < len(token_ids)  # a damaged matrix must not be read beyond its genes
            in_order &= inside and column > last
            last = column
            value = np.float32(values[i])
            token = token_ids[column if inside else 0]
            if token < 0:
                unknown += value
            elif value != 0:
                good &= 0 <= value < np.inf
                tokens[place] = token
                counts[place] = value
                place += 1
        offsets[cell + 1] = place
    return in_order, unknown, good


@numba.njit(nogil=True, cache=True)
def gather_rows(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, target: np.ndarray) -> None:
    """Copy rows behind each other: row `i` is `values[starts[i] : starts[i] + lengths[i]]`."""
    place = 0
    for i in range(len(starts)):
        target[place : place + lengths[i]] = values[starts[i] : starts[i] + lengths[i]]
        place += lengths[i]


@numba.njit(nogil=True, cache=True)
def row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of every row, float64."""
    sums = np.zeros(len(offsets) - 1, np.float64)
    for row in range(len(sums)):
        total = 0.0
        for i in range(offsets[row], offsets[row + 1]):
            total += values[i]
        sums[row] = total
    return sums
