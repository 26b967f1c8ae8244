# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Ranges of rows of compressed sparse matrices on disk (h5py or zarr groups with data, indices, indptr)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from tahoex1_hf.data.sources.base import CHUNK_ELEMENTS, BadInput


def check_indptr(group: Any, num_lines: int) -> None:
    """Check that the index of a matrix fits its entries.

    Raises:
        BadInput: where it does not: the file is cut off or corrupt.
    """
    indptr = np.asarray(group["indptr"][:], dtype=np.int64)
    total = group["data"].shape[0]
    good = len(indptr) == num_lines + 1 and indptr[0] == 0 and indptr[-1] == total and (np.diff(indptr) >= 0).all()
    if not good or group["indices"].shape[0] != total:
        raise BadInput("the index of its sparse counts (indptr) does not fit them: the file is cut off or corrupt.")


def read_rows(group: Any, start: int, stop: int, num_columns: int) -> Iterator[csr_matrix]:
    """Rows `start` to `stop`, in matrices of at most about `CHUNK_ELEMENTS` entries.

    Raises:
        BadInput: for column numbers that do not exist.
    """
    indptr = np.asarray(group["indptr"][start : stop + 1], dtype=np.int64)
    for low, high in chunk_bounds(indptr):
        a, b = int(indptr[low]), int(indptr[high])
        data, indices = group["data"][a:b], group["indices"][a:b]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < num_columns:
            raise BadInput(f"column numbers of its counts lie outside 0..{num_columns - 1}: it is corrupt.")
        yield csr_matrix((data, indices, indptr[low : high + 1] - a), shape=(high - low, num_columns))


def chunk_bounds(indptr: np.ndarray, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of at most `elements` stored entries, but at least one row each."""
    most = CHUNK_ELEMENTS if elements is None else elements
    start, last = 0, len(indptr) - 1
    while start < last:
        stop = int(np.searchsorted(indptr, indptr[start] + most, side="right")) - 1
        stop = min(max(stop, start + 1), last)
        yield start, stop
        start = stop
