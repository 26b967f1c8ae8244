# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks that an HDF5 file or zarr store does not refer to other files or declare far more data than it holds."""

import os
from collections.abc import Iterator
from typing import Any

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.cells.readers.hdf5_heaps import check_heaps

# An array above this size must store at least a ten-thousandth of its size; zeros compress to a thousandth.
_LARGE_BYTES, _MOST_TIMES = 2**30, 10_000
_checked: set[tuple[str, int, int, int]] = set()  # files that this process has checked


def check_hdf5(file: Any, path: str) -> None:
    """Check a file opened by h5py; a file that has not changed is checked only once.

    Raises:
        BadInput: If the file has links to other files, data stored in other files, virtual datasets, arrays that
            would fill the memory, or heaps of strings that the library would read forever.
    """
    key = _key(path)
    if key in _checked:
        return
    datasets = []
    for name, dataset in _datasets(file):
        if dataset.external or dataset.is_virtual:
            raise _outside(name)
        _check_size(name, dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size())
        datasets.append(dataset)
    check_heaps(file, path, datasets)
    _checked.add(key)


def _key(path: str) -> tuple[str, int, int, int]:
    state = os.stat(path)
    return os.path.abspath(path), state.st_ino, state.st_size, state.st_mtime_ns


def _datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield every dataset of a file with its name, without following links to other files."""
    import h5py

    seen: set[int] = set()
    todo = [("", file)]
    while todo:
        place, group = todo.pop()
        for name in group:
            path = f"{place}/{name}"
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise _outside(path)
            if not isinstance(link, h5py.HardLink):
                continue  # leads to an element found elsewhere in this file, or nowhere
            element = group[name]
            address = h5py.h5o.get_info(element.id).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(element, h5py.Group):
                todo.append((path, element))
            elif isinstance(element, h5py.Dataset) and element.shape is not None:
                yield path, element


def check_zarr(store: Any, path: str) -> None:
    """Check a zarr store; a store whose folder has not changed is checked only once.

    Raises:
        BadInput: If an array declares far more data than it stores.
    """
    key = _key(path)
    if key not in _checked:
        _check_group(store)
        _checked.add(key)


def _check_group(store: Any) -> None:
    for name, array in store.arrays():
        _check_zarr_array(f"/{array.path}" if hasattr(array, "path") else name, array)
    for _, group in store.groups():
        _check_group(group)


def _check_zarr_array(name: str, array: Any) -> None:
    nbytes = array.size * array.dtype.itemsize
    if nbytes > _LARGE_BYTES:  # to measure the stored size, all files of the array are listed
        stored = array.nbytes_stored
        _check_size(name, nbytes, stored() if callable(stored) else stored)


def _outside(name: str) -> BadInput:
    return BadInput(
        f"{name} lies in another file (external link, external storage or virtual dataset), which is not followed: "
        "write the cells into one file."
    )


def _check_size(name: str, declared: int, stored: int) -> None:
    if declared > _LARGE_BYTES and declared > _MOST_TIMES * max(stored, 1):
        raise BadInput(
            f"{name} declares {declared} bytes, and stores {stored}: it is damaged, or made to fill the memory."
        )
