# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What an HDF5 file or zarr store may not do: name content outside itself, or declare far more than it holds."""

import os
from collections.abc import Iterator
from typing import Any

from tahoex1_hf.cells.readers.base import BadInput

# An array above this size must store at least a ten-thousandth of it; zeros compress to a thousandth.
_LARGE_BYTES, _MOST_TIMES = 2**30, 10_000
_checked: set[tuple[str, int, int, int]] = set()  # files that this process has looked through


def check_hdf5(file: Any, path: str) -> None:
    """Look through a file of h5py, once unless it changes.

    Raises:
        BadInput: for links to other files, storage in them, virtual datasets, and arrays that would fill the memory.
    """
    key = _key(path)
    if key in _checked:
        return
    for name, dataset in _datasets(file):
        if dataset.external or dataset.is_virtual:
            raise _outside(name)
        _check_size(name, dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size())
    _checked.add(key)


def _key(path: str) -> tuple[str, int, int, int]:
    state = os.stat(path)
    return os.path.abspath(path), state.st_ino, state.st_size, state.st_mtime_ns


def _datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the dataset of every one in a file, without following a link out of it."""
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
                continue  # leads to what is found elsewhere in this file, or nowhere
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
    """Look through a zarr store, once unless its folder changes.

    Raises:
        BadInput: for an array that declares far more than it stores.
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
    if nbytes > _LARGE_BYTES:  # counting what is stored lists all files of the array
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
            f"{name} declares {declared} bytes, and stores {stored}: it is damaged, or made to fill memory."
        )
