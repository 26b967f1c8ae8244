# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading of `.h5ad` files and `.zarr` stores of anndata, piece by piece: matrices, and columns of obs and var."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, INDEX, BadInput
from tahoex1_hf.cells.readers.by_gene import read_spooled
from tahoex1_hf.cells.readers.csr import AlignedArray, matrix_format, matrix_shape, read_rows
from tahoex1_hf.cells.readers.hdf5_bounds import check_hdf5, check_zarr
from tahoex1_hf.cells.readers.unreadable import as_bad_input


@contextmanager
def open_store(path: str) -> Iterator[Any]:
    """Open a file or store, and raise BadInput if h5py or zarr cannot read it."""
    with as_bad_input():
        if Path(path).is_dir():
            import zarr  # not for .h5ad files: it takes 0.3 s

            store: Any = zarr.open_group(path, mode="r")
            _check_parts(store)
            check_zarr(store, path)
            yield store
        else:
            import h5py

            with h5py.File(path, "r") as file:
                check_hdf5(file, path)
                _check_parts(file)
                yield file


def _check_parts(store: Any) -> None:
    missing = [name for name in ("obs", "var") if name not in store]
    if missing:
        raise BadInput(f"it is not a complete AnnData: it lacks {', '.join(missing)}.")


def matrix_blocks(
    matrix: Any, start: int, stop: int, spooled: Path | None = None, elements: int | None = None
) -> Iterator[Any]:
    """Yield rows `start` to `stop` of a matrix on disk, as CSR or dense matrices of bounded size.

    Args:
        matrix: Group or dataset of h5py or zarr.
        start: Number of the first row.
        stop: Number after the last row.
        spooled: Folder with the pieces of a CSC matrix, sorted by cell by `by_gene.spool_entries`; None for other
            matrices.
        elements: Approximate number of entries of a block; `CHUNK_ELEMENTS` by default, and always for CSC.

    Raises:
        BadInput: If a column number does not exist.
    """
    kind, num_genes = matrix_format(matrix), matrix_shape(matrix)[1]
    if kind == "csr":
        yield from read_rows(matrix, start, stop, num_genes, elements)
    elif kind == "csc":
        if spooled is None:
            raise ValueError("a CSC matrix must be sorted by cell before it is read.")
        yield from read_spooled(spooled, start, stop, num_genes)
    else:
        rows = AlignedArray(matrix)
        step = max(1, (CHUNK_ELEMENTS if elements is None else elements) // num_genes)
        for low in range(start, stop, step):
            yield np.asarray(rows.read(low, min(low + step, stop)))


def csc_entries(matrix: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield all entries of a CSC matrix, in chunks of three arrays: cells, genes and counts."""
    indptr = np.asarray(matrix["indptr"][:], dtype=np.int64)
    for start in range(0, int(indptr[-1]), CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, int(indptr[-1]))
        genes = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
        yield np.asarray(matrix["indices"][start:stop], dtype=np.int64), genes, matrix["data"][start:stop]


def is_legacy(frame: Any) -> bool:
    """Return whether a data frame is a compound dataset, the format of anndata before 0.7."""
    return hasattr(frame, "dtype") and bool(frame.dtype.names)


def index_of(frame: Any) -> Any:
    """Return the names of a data frame's rows, as they are on disk; None if they are no element of their own."""
    return None if is_legacy(frame) or _index_key(frame) not in frame else frame[_index_key(frame)]


def _index_key(frame: Any) -> str:
    key = frame.attrs.get("_index", "_index")
    return key.decode() if isinstance(key, bytes) else str(key)


class Frame:
    """A data frame on disk, whose columns are read when they are first requested."""

    def __init__(self, frame: Any):
        self._frame = frame
        self._read: dict[str, pd.Series] = {}
        self.columns = column_names(frame)

    def __getitem__(self, name: str) -> pd.Series:
        if name not in self._read:
            self._read[name] = read_column(self._frame, name)
        return self._read[name]

    @cached_property
    def index(self) -> pd.Index:
        """Names of the rows, as text."""
        return pd.Index(read_column(self._frame, INDEX).astype(str))


def read_frame(frame: Any) -> pd.DataFrame:
    """Read a complete data frame from disk, with the names of its rows as text."""
    whole = Frame(frame)
    return pd.DataFrame({name: whole[name].to_numpy() for name in whole.columns}, index=whole.index)


def zarr_for_writing(path: Any, new: bool) -> Any:
    """Open a zarr store for writing.

    Args:
        path: Path of the store.
        new: Whether to make a new store in anndata's current format; otherwise an existing one is opened.
    """
    import anndata
    import zarr

    if new:
        with warnings.catch_warnings():
            # anndata 0.13 announces that the setting will go, and that it will then write zarr's format 3 alone.
            warnings.simplefilter("ignore", DeprecationWarning)
            zarr_format: Literal[2, 3] = 2 if getattr(anndata.settings, "zarr_write_format", 3) == 2 else 3
        return zarr.open_group(path, mode="w", zarr_format=zarr_format)
    return zarr.open_group(path, mode="r+", use_consolidated=False)


def writable_group(file: Any, name: str) -> Any:
    """Return a group of a file, such as obsm; a table of columns written by anndata before 0.7 is turned into a group.

    Args:
        file: File of h5py or group of zarr, open for writing.
        name: Name of the group.
    """
    if name in file and hasattr(file[name], "dtype"):
        table = file[name][:]
        del file[name]
        for column in table.dtype.names or ():
            file.require_group(name)[column] = table[column]
            file[name][column].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    group = file.require_group(name)
    if "encoding-type" not in group.attrs:
        group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    return group


def num_rows(frame: Any) -> int:
    """Return the number of rows of a data frame stored by anndata."""
    if is_legacy(frame):
        return int(frame.shape[0])
    names = frame[_index_key(frame)]
    if not hasattr(names, "shape"):  # nullable strings, as anndata 0.13 writes them with pandas 3, or categories
        names = names["codes"] if "codes" in names else names["values"]
    return int(names.shape[0])


def column_names(frame: Any) -> list[str]:
    """Return the names of the columns of a data frame stored by anndata, in order and without the index."""
    if is_legacy(frame):
        return [name for name in frame.dtype.names if name != _legacy_index(frame)]
    order = [name.decode() if isinstance(name, bytes) else str(name) for name in frame.attrs.get("column-order", ())]
    names = [name for name in frame if name not in ("__categories", _index_key(frame))]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def read_column(frame: Any, name: str, start: int = 0, stop: int | None = None) -> pd.Series:
    """Read rows `start` to `stop` of a column of a data frame stored by anndata.

    Raises:
        BadInput: If there is no such column; the message lists the columns.
    """
    if is_legacy(frame):
        return _legacy_column(frame, name, start, stop)
    key = _index_key(frame) if name == INDEX else name
    if key not in frame:
        raise BadInput(f"it has no column {name!r}; there are {sorted(column_names(frame))}.")
    element = frame[key]
    if not hasattr(element, "shape"):
        return _encoded_column(element, start, stop)
    values = _plain(element, start, stop)
    if "__categories" in frame and key in frame["__categories"]:  # anndata 0.7
        return _categorical(values, _plain(frame["__categories"][key], 0, None))
    return pd.Series(values)


def _encoded_column(element: Any, start: int, stop: int | None) -> pd.Series:
    if "codes" in element and "categories" in element:
        categories = element["categories"]
        categories = categories["values"] if not hasattr(categories, "shape") else categories
        codes, ordered = _plain(element["codes"], start, stop), bool(element.attrs.get("ordered", False))
        return _categorical(codes, _plain(categories, 0, None), ordered)
    if "values" in element and "mask" in element:
        values = pd.Series(_plain(element["values"], start, stop))
        kind = {"b": "boolean", "i": "Int64", "u": "Int64", "f": "Float64"}.get(values.dtype.kind, "string")
        missing = _plain(element["mask"], start, stop).astype(bool)
        return values.astype(object).mask(missing, None).astype(kind)  # keeps the type even if all values are missing
    raise BadInput(f"a column of its obs or var is stored as {dict(element.attrs)}, an unknown format.")


def _categorical(codes: np.ndarray, categories: np.ndarray, ordered: bool = False) -> pd.Series:
    return pd.Series(pd.Categorical.from_codes(codes.astype(np.int64), pd.Index(categories), ordered=ordered))


def _plain(array: Any, start: int, stop: int | None) -> np.ndarray:
    values = np.asarray(array[start:stop])
    if values.dtype.kind == "S" or (values.dtype.kind == "O" and len(values) and isinstance(values[0], bytes)):
        return np.array([value.decode() for value in values], dtype=object)
    return values.astype(object) if values.dtype.kind in "UT" else values


def _legacy_column(frame: Any, name: str, start: int, stop: int | None) -> pd.Series:
    key = _legacy_index(frame) if name == INDEX else name
    if key not in frame.dtype.names:
        raise BadInput(f"it has no column {name!r}; there are {sorted(frame.dtype.names)}.")
    values = _plain(frame[key], start, stop)
    categories = _legacy_categories(frame, name)
    return pd.Series(values) if categories is None else _categorical(values, categories)


def _legacy_categories(frame: Any, name: str) -> np.ndarray | None:
    """Return the categories of a column of integer codes, which anndata before 0.7 stored in uns; None without any."""
    uns, key = frame.parent.get("uns"), f"{name}_categories"
    if uns is None or key not in uns or frame.dtype[name].kind not in "iu":
        return None
    return np.atleast_1d(
        _plain(uns[key], 0, None) if uns[key].shape else np.asarray(uns[key].asstr()[()], dtype=object)
    )


def _legacy_index(frame: Any) -> str:
    return str(next((known for known in ("index", "_index") if known in frame.dtype.names), frame.dtype.names[0]))
