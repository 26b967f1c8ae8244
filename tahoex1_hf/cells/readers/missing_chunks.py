# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Check that all chunks of sparse counts and of names are there.

A chunk that is missing, as after a copy of a `.zarr` store that was cut off, is no error for zarr and h5py: they take
it for zeros, or for empty text. Counts and names would be wrong without a word. Of dense counts it cannot be told,
since zarr leaves out chunks of nothing but zeros.
"""

import os
from typing import Any

import numpy as np

from tahoex1_hf.cells.readers.base import BadInput


def check_sparse_chunks(group: Any, path: str) -> None:
    """Check a sparse matrix on disk.

    Args:
        group: Group of h5py or zarr with `data`, `indices` and `indptr` that fit one another.
        path: Path of the file or store.

    Raises:
        BadInput: If a chunk is missing.
    """
    _refuse(group["data"], missing_chunks(group["data"], path))
    gone = missing_chunks(group["indices"], path)
    if gone:
        indptr = np.asarray(group["indptr"][:], dtype=np.int64)
        # Without it, all its entries are in column 0: so it may be only where each is of another row.
        rows = [np.searchsorted(indptr, np.arange(start, stop), side="right") for start, stop in gone]
        _refuse(group["indices"], [chunk for chunk, of in zip(gone, rows, strict=True) if (np.diff(of) == 0).any()])


def check_name_chunks(names: Any, path: str) -> None:
    """Check the names of cells or genes on disk.

    Args:
        names: Array of h5py or zarr; or a group, of which the `values` of nullable strings are checked. Codes of
            categories are not, since zarr leaves out chunks of nothing but zeros. None where an old file has none.
        path: Path of the file or store.

    Raises:
        BadInput: If a chunk is missing.
    """
    if names is not None and not hasattr(names, "shape") and "values" in names:
        names = names["values"]
    if hasattr(names, "shape"):
        _refuse(names, missing_chunks(names, path))


def missing_chunks(array: Any, path: str) -> list[tuple[int, int]]:
    """Return the missing chunks of an array with one dimension, by their first entry and the entry after the last.

    Args:
        array: Array of h5py or zarr.
        path: Path of the file or store.
    """
    sizes = getattr(array, "shards", None) or array.chunks
    if not sizes or len(array.shape) != 1:
        return []
    size, total = int(sizes[0]), int(array.shape[0])
    starts = range(0, total, size)
    if hasattr(array, "id"):
        if array.id.get_num_chunks() >= len(starts):
            return []
        there: set[int] = set()
        array.id.chunk_iter(lambda chunk: there.add(int(chunk.chunk_offset[0])))
        gone = [start for start in starts if start not in there]
    else:
        folder, key_of = os.path.join(path, array.path), array.metadata.encode_chunk_key
        gone = [start for start in starts if not os.path.exists(os.path.join(folder, key_of((start // size,))))]
    return [(start, min(start + size, total)) for start in gone]


def _refuse(array: Any, gone: list[tuple[int, int]]) -> None:
    if gone:
        start, stop = gone[0]
        raise BadInput(
            f"{len(gone)} chunks of {str(array.name).strip('/')} are missing, the first with the entries {start} to "
            f"{stop - 1}: it was not copied whole; copy it again."
        )
