# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading of row ranges of compressed sparse matrices on disk (h5py or zarr groups with data, indices, indptr)."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, BadInput

# Number of rows that are read at once, however few entries they have: names and other columns of obs come with them.
_MOST_ROWS = 4096


class AlignedArray:
    """An array on disk (h5py or zarr) whose ranges are read one after the other.

    A compressed array can only be read in the chunks in which it was written. This class reads complete chunks and
    keeps the last one for the next range, so that each chunk is read only once.
    """

    def __init__(self, array: Any) -> None:
        chunks = getattr(array, "shards", None) or array.chunks
        self.array, self.step = array, int(chunks[0]) if chunks else None
        self._start = self._stop = 0
        self._kept = array[:0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return entries (or rows) `start` to `stop`, which must not be before the last range that was read."""
        if self.step is None or start == stop:
            return self.array[start:stop]
        low, high = start // self.step * self.step, min(-(-stop // self.step) * self.step, self.array.shape[0])
        if self._start <= low < self._stop:
            kept = self._kept[low - self._start :]
            fresh = self.array[self._stop : high] if self._stop < high else self._kept[:0]
            values = np.concatenate([kept, fresh]) if len(fresh) else kept
            high = max(high, self._stop)
        else:
            values = self.array[low:high]
        last = max(low, (stop // self.step) * self.step)  # where the next range may begin
        self._start, self._stop, self._kept = last, high, values[last - low :].copy()
        return values[start - low : stop - low]


def matrix_format(matrix: Any) -> str:
    """Return the format of the counts: "csr", "csc" or "dense"."""
    if hasattr(matrix, "shape"):
        return "dense"
    kind = matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "?"))
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if kind[:3] not in ("csr", "csc"):
        raise BadInput(f"its counts are stored as {kind!r}: CSR, CSC and dense matrices can be read.")
    return kind[:3]


def matrix_shape(matrix: Any) -> tuple[int, int]:
    """Return the numbers of cells and genes."""
    shape = matrix.shape if hasattr(matrix, "shape") else matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    if shape is None or len(shape) != 2:
        raise BadInput(f"its counts have the shape {shape}, not cells x genes.")
    return int(shape[0]), int(shape[1])


def check_indptr(group: Any, num_lines: int) -> None:
    """Check that the index of a matrix fits its entries.

    Raises:
        BadInput: If the index does not fit, because the file is cut off or corrupt.
    """
    for name in ("indices", "indptr"):
        kind = np.dtype(group[name].dtype)
        # R and MATLAB write whole numbers as float64, too; float16 holds none above 2,048.
        if kind.kind not in "iuf" or kind == np.float16:
            raise BadInput(f"{name} of its sparse counts are stored as {kind}, not as whole numbers: it is corrupt.")
    indptr = np.asarray(group["indptr"][:], dtype=np.int64)
    total = group["data"].shape[0]
    good = len(indptr) == num_lines + 1 and indptr[0] == 0 and indptr[-1] == total and (np.diff(indptr) >= 0).all()
    if not good or group["indices"].shape[0] != total:
        raise BadInput("the index of its sparse counts (indptr) does not fit them: the file is cut off or corrupt.")


def read_rows(
    group: Any, start: int, stop: int, num_columns: int, elements: int | None = None
) -> Iterator[csr_matrix]:
    """Yield rows `start` to `stop` in matrices of about `elements` entries at most, by default `CHUNK_ELEMENTS`.

    Raises:
        BadInput: If a column number does not exist.
    """
    indptr = np.asarray(group["indptr"][start : stop + 1], dtype=np.int64)
    all_data, all_indices = AlignedArray(group["data"]), AlignedArray(group["indices"])
    for low, high in chunk_bounds(indptr, elements):
        a, b = int(indptr[low]), int(indptr[high])
        data, indices = all_data.read(a, b), all_indices.read(a, b)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < num_columns:
            raise BadInput(f"column numbers of its counts lie outside 0..{num_columns - 1}: it is corrupt.")
        yield csr_matrix((data, indices, indptr[low : high + 1] - a), shape=(high - low, num_columns))


def chunk_bounds(indptr: np.ndarray, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows with at most `elements` stored entries and `_MOST_ROWS` rows, but at least one row."""
    most = CHUNK_ELEMENTS if elements is None else elements
    start, last = 0, len(indptr) - 1
    while start < last:
        stop = int(np.searchsorted(indptr, indptr[start] + most, side="right")) - 1
        stop = min(max(stop, start + 1), start + _MOST_ROWS, last)
        yield start, stop
        start = stop


class SparseOnDisk:
    """A sparse matrix in a file or store; anndata, half a second to import, reads its rows once some are asked for.

    Attributes:
        group: Group of h5py or zarr with data, indices and indptr.
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    @cached_property
    def format(self) -> str:
        """How the counts are stored, "csr" or "csc"."""
        return matrix_format(self.group)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Numbers of cells and genes."""
        return matrix_shape(self.group)

    def __getitem__(self, rows: Any) -> Any:
        """Read rows, given as a slice or as numbers."""
        return self._dataset[rows]

    def to_memory(self) -> Any:
        """Read the whole matrix."""
        return self._dataset.to_memory()

    @cached_property
    def _dataset(self) -> Any:
        from anndata.io import sparse_dataset

        return sparse_dataset(self.group)
