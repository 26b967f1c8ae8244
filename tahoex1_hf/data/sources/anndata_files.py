# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""`.h5ad` files and `.zarr` stores, read in chunks of cells: only the counts, and the columns that are asked for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tahoex1_hf.data.config import AnnDataSource
from tahoex1_hf.data.sources.base import (
    CHUNK_ELEMENTS,
    INDEX,
    BadInput,
    CellChunk,
    CellSource,
    FileReport,
    chunk_of_matrix,
    matched_genes,
)
from tahoex1_hf.data.sources.by_gene import read_spooled, spool_entries
from tahoex1_hf.data.sources.csr import check_indptr, read_rows
from tahoex1_hf.data.sources.files import expand_paths, is_zarr_store, local_fingerprint
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch
from tahoex1_hf.reading import read_gene_symbols


class AnnDataFiles(CellSource):
    """Files that anndata writes."""

    config: AnnDataSource

    def list_files(self) -> list[str]:
        """The `.h5ad` files and `.zarr` stores, sorted."""
        return expand_paths(self.config.paths, is_anndata, ".h5ad files or .zarr stores")

    def inspect(self, path: str) -> FileReport:
        """Check shapes and genes; the counts are not read."""
        with _open(path) as store:
            matrix = self._matrix(store)
            genes = self._match(store)
            shape = _shape(matrix)
            num_cells = len(_column(store["obs"], INDEX))
            if not num_cells:
                raise BadInput("it has no cells.")
            if shape != (num_cells, genes.num_genes):
                raise BadInput(f"its counts have the shape {shape} for {num_cells} cells and {genes.num_genes} genes.")
            if _format(matrix) != "dense":
                check_indptr(matrix, shape[0] if _format(matrix) == "csr" else shape[1])
            return FileReport(
                num_cells=num_cells,
                fingerprint=local_fingerprint(path),
                num_genes=genes.num_genes,
                num_genes_known=genes.num_genes - genes.num_unknown,
                unknown_genes=list(genes.unknown_examples),
                by_gene=_format(matrix) == "csc",
            )

    def cell_names(self, path: str) -> np.ndarray:
        """`obs_names`."""
        with _open(path) as store:
            return _column(store["obs"], INDEX).to_numpy()

    def spool(self, path: str, piece_cells: int) -> None:
        """Sort a CSC matrix by cell."""
        with _open(path) as store:
            matrix = self._matrix(store)
            spool_entries(_csc_entries(matrix), _shape(matrix)[0], piece_cells, self._spooled(path))

    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[CellChunk]:
        """Read in chunks of about `CHUNK_ELEMENTS` stored (or, of a dense matrix, all) entries."""
        with _open(path) as store:
            genes = self._match(store)
            metadata = pd.DataFrame(
                {name: _column(store["obs"], name, start, stop) for name in columns}, index=range(stop - start)
            )
            done = start
            for matrix in self._rows(store, path, start, stop, genes.num_genes):
                end = done + matrix.shape[0]
                part = metadata.iloc[done - start : end - start].reset_index(drop=True)
                yield chunk_of_matrix(matrix, genes, part, done, self.tokenizer)
                done = end

    def _rows(self, store: Any, path: str, start: int, stop: int, num_genes: int) -> Iterator[Any]:
        matrix = self._matrix(store)
        kind = _format(matrix)
        if kind == "csc":
            yield from read_spooled(self._spooled(path), start, stop, num_genes)
        elif kind == "csr":
            yield from read_rows(matrix, start, stop, num_genes)
        else:
            step = max(1, CHUNK_ELEMENTS // num_genes)
            for low in range(start, stop, step):
                yield np.asarray(matrix[low : min(low + step, stop)])

    def _matrix(self, store: Any) -> Any:
        layer = self.config.layer
        place = "X" if layer is None else "raw/X" if layer == "raw" else f"layers/{layer}"
        if place not in store:
            layers = [*store.get("layers", ()), *(["raw"] if "raw" in store else [])]
            raise BadInput(f"it has no {place}; layer= can be one of {layers}, or left out for X.")
        return store[place]

    def _match(self, store: Any) -> GeneMatch:
        column, symbols = self.config.gene_id_column, self.config.gene_symbols
        var = store["raw/var" if self.config.layer == "raw" else "var"]
        names = _column(var, INDEX if column is None else column).astype(str)
        return matched_genes(self.tokenizer, names.tolist(), self.config, read_gene_symbols(symbols))

    def _spooled(self, path: str) -> Path:
        return self.spool_folder / sha256(f"{path}\n{self.config.layer}".encode()).hexdigest()[:24]


def is_anndata(path: Path) -> bool:
    """Whether a path is an `.h5ad` file or a `.zarr` store."""
    return (path.suffix == ".h5ad" and path.is_file()) or is_zarr_store(path)


@contextmanager
def _open(path: str) -> Iterator[Any]:
    """Open a file; what h5py and zarr find wrong with it is bad input."""
    import h5py
    import zarr

    try:
        if Path(path).is_dir():
            store: Any = zarr.open_group(path, mode="r")
            _check_parts(store)
            yield store
        else:
            with h5py.File(path, "r") as file:
                _check_parts(file)
                yield file
    except (OSError, RuntimeError, KeyError, zarr.errors.BaseZarrError) as error:
        raise BadInput(f"it cannot be read: {type(error).__name__}: {error}") from error


def _check_parts(store: Any) -> None:
    missing = [name for name in ("obs", "var") if name not in store]
    if missing:
        raise BadInput(f"it is not a complete AnnData: it lacks {', '.join(missing)}.")


def _format(matrix: Any) -> str:
    """How the counts are stored: "csr", "csc" or "dense"."""
    if hasattr(matrix, "shape"):
        return "dense"
    kind = matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "?"))
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if kind[:3] not in ("csr", "csc"):
        raise BadInput(f"its counts are stored as {kind!r}: CSR, CSC and dense matrices can be read.")
    return kind[:3]


def _shape(matrix: Any) -> tuple[int, int]:
    shape = matrix.shape if hasattr(matrix, "shape") else matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    if shape is None or len(shape) != 2:
        raise BadInput(f"its counts have the shape {shape}, not cells x genes.")
    return int(shape[0]), int(shape[1])


def _csc_entries(matrix: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    indptr = np.asarray(matrix["indptr"][:], dtype=np.int64)
    for start in range(0, int(indptr[-1]), CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, int(indptr[-1]))
        genes = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
        yield np.asarray(matrix["indices"][start:stop], dtype=np.int64), genes, matrix["data"][start:stop]


def _column(frame: Any, name: str, start: int = 0, stop: int | None = None) -> pd.Series:
    """A range of a column of a data frame as anndata stores it (since 0.7; whole tables of older files).

    Raises:
        BadInput: where there is no such column, naming those that there are.
    """
    if hasattr(frame, "dtype") and frame.dtype.names:  # anndata < 0.7: one compound dataset
        return _legacy_column(frame, name, start, stop)
    key = frame.attrs.get("_index", "_index") if name == INDEX else name
    key = key.decode() if isinstance(key, bytes) else key
    if key not in frame:
        columns = [column for column in frame if column not in ("__categories", frame.attrs.get("_index"))]
        raise BadInput(f"it has no column {name!r}; there are {sorted(columns)}.")
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
        return _categorical(_plain(element["codes"], start, stop), _plain(categories, 0, None))
    if "values" in element and "mask" in element:
        values = pd.Series(_plain(element["values"], start, stop)).astype(object)
        return values.mask(_plain(element["mask"], start, stop).astype(bool), None).convert_dtypes()
    raise BadInput(f"a column of its obs or var is stored as {dict(element.attrs)}, which is not known here.")


def _categorical(codes: np.ndarray, categories: np.ndarray) -> pd.Series:
    return pd.Series(pd.Categorical.from_codes(codes.astype(np.int64), pd.Index(categories)))


def _plain(array: Any, start: int, stop: int | None) -> np.ndarray:
    values = np.asarray(array[start:stop])
    if values.dtype.kind == "S" or (values.dtype.kind == "O" and len(values) and isinstance(values[0], bytes)):
        return np.array([value.decode() for value in values], dtype=object)
    return values.astype(object) if values.dtype.kind in "UT" else values


def _legacy_column(frame: Any, name: str, start: int, stop: int | None) -> pd.Series:
    key = name
    if name == INDEX:
        key = next((known for known in ("index", "_index") if known in frame.dtype.names), frame.dtype.names[0])
    if key not in frame.dtype.names:
        raise BadInput(f"it has no column {name!r}; there are {sorted(frame.dtype.names)}.")
    return pd.Series(_plain(frame[key], start, stop))
