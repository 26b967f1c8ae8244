# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of different lengths, and compiled loops over them for which numpy would need arrays as large as the data."""

from dataclasses import dataclass

import numba
import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows


@dataclass(frozen=True)
class RowViews:
    """Rows of `GeneRows` where they lie in larger arrays, in any order.

    They are not copied, since with a copy a batch of training cells takes 1.5 times as long.

    Attributes:
        genes: Token ids of any integer type.
        gene_starts: `(cells,)` int64 position in `genes` at which each cell starts.
        counts: Counts above zero, uint16 or float32.
        count_starts: `(cells,)` int64 position in `counts` at which each cell starts.
        lengths: `(cells,)` int64 number of genes of each cell.
    """

    genes: np.ndarray
    gene_starts: np.ndarray
    counts: np.ndarray
    count_starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: GeneRows, numbers: np.ndarray) -> "RowViews":
        """Return views of the cells with these row numbers."""
        starts = rows.offsets[numbers]
        return cls(rows.tokens, starts, rows.counts, starts, rows.offsets[numbers + 1] - starts)

    def select(self, numbers: np.ndarray) -> "RowViews":
        """Return views of the cells with these row numbers."""
        genes, counts = self.gene_starts[numbers], self.count_starts[numbers]
        return RowViews(self.genes, genes, self.counts, counts, self.lengths[numbers])


@numba.njit(nogil=True, cache=True)
def compact_csr(
    indptr: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    token_ids: np.ndarray,
    tokens: np.ndarray,
    counts: np.ndarray,
    offsets: np.ndarray,
) -> tuple[bool, bool, float]:
    """Copy the non-zero entries of a CSR matrix whose columns are known genes.

    Three simple loops are faster than one loop that does everything: the processor then handles eight numbers at a
    time.

    Args:
        indptr: `(cells + 1,)` positions at which the rows begin and end.
        columns: `(stored,)` column of each entry.
        values: `(stored,)` values of any real type.
        token_ids: `(columns,)` int32 token of every column; -1 for unknown genes.
        tokens: Output array, at least `(stored,)`.
        counts: Output array, float32, at least `(stored,)`.
        offsets: Output array, `(cells + 1,)`.

    Returns:
        Three values: whether the columns of every row exist and are in rising order and all copied values are finite
        and not negative (if not, the output must not be used); whether all values are whole numbers; and the sum of
        the values of unknown columns.
    """
    place, unknown, whole = np.uint64(0), 0.0, True
    offsets[0] = 0
    for cell in range(len(indptr) - 1):
        row, row_values = columns[indptr[cell] : indptr[cell + 1]], values[indptr[cell] : indptr[cell + 1]]
        length = np.uint64(len(row))
        offsets[cell + 1] = place
        if not length:
            continue
        in_order = True
        for i in range(np.uint64(1), length):
            in_order &= row[i] > row[i - np.uint64(1)]
        # In a damaged matrix, column numbers may lie outside the table of genes.
        if not in_order or row[0] < 0 or row[length - np.uint64(1)] >= len(token_ids):
            return False, False, 0.0
        good, every = True, True
        for i in range(length):
            value = np.float32(row_values[i])
            good &= value > 0 and value < np.inf
            whole &= value == np.floor(value)
            counts[place + i] = value
        for i in range(length):
            token = token_ids[np.uint64(row[i])]
            tokens[place + i] = token
            every &= token >= 0
        if good and every:
            place += length
        else:
            for i in range(length):
                value, token = np.float32(row_values[i]), token_ids[np.uint64(row[i])]
                if token < 0:
                    unknown += value
                elif value != 0:
                    if not (value > 0 and value < np.inf):
                        return False, False, 0.0
                    tokens[place], counts[place] = token, value
                    place += np.uint64(1)
        offsets[cell + 1] = place
    return True, whole, unknown


@numba.njit(nogil=True, cache=True)
def gather_rows(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, target: np.ndarray) -> None:
    """Copy rows into `target`, one after the other; row `i` is `values[starts[i] : starts[i] + lengths[i]]`."""
    place = 0
    for i in range(len(starts)):
        target[place : place + lengths[i]] = values[starts[i] : starts[i] + lengths[i]]
        place += lengths[i]


@numba.njit(nogil=True, cache=True)
def row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the float64 sum of every row."""
    sums = np.zeros(len(offsets) - 1, np.float64)
    for row in range(len(sums)):
        total = 0.0
        for i in range(offsets[row], offsets[row + 1]):
            total += values[i]
        sums[row] = total
    return sums
