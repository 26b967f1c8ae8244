# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The cells of an AnnData, in memory or backed, and of the `.h5ad` files and `.zarr` stores that anndata writes."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.counts import NAMED, Place, counts_elsewhere, find_counts, in_memory
from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.cells.gene_names import text_of
from tahoex1_hf.cells.gene_search import FoundGenes, find_genes
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.looking import places_to_look
from tahoex1_hf.cells.readers.base import INDEX, BadInput, CellInput, gene_rows
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, to_csr

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# Number of cells that are sliced at once from a matrix in memory, or from a dense matrix on disk.
_SLICE_CELLS = 256
# Number of cells for which columns of obs on disk are read at once.
_OBS_CELLS = 16384


def find_matrix(
    adata: Any, options: GeneOptions, tokenizer: "TahoeX1Tokenizer"
) -> tuple[Any, FoundGenes, Place, Any, bool]:
    """Find the counts and the genes of an AnnData, or of an object with the same attributes.

    Returns:
        The `(cells, genes)` matrix, the genes of its columns, its place, its table of genes, and whether its genes are
        those of `var`.

    Raises:
        BadInput: If a layer or a column does not exist, or the genes are not in the vocabulary.
    """
    layers = [name for name in adata.layers if name is not None]  # since anndata 0.13, X is among them
    try:
        place = find_counts(adata, options.other_counts) if options.layer is None else Place(options.layer)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if place.layer == "X" and "X" not in layers:
        place = Place(None)
    holder = adata
    if place.layer == "raw" and "raw" not in layers and adata.raw is not None:
        holder, matrix = adata.raw, adata.raw.X
    elif place.layer is not None and place.layer not in layers:
        names = [*layers, *(["raw"] if adata.raw is not None and "raw" not in layers else [])]
        raise BadInput(f"it has no layers/{place.layer}; layer= (--layer) can be one of {names}, or left out for X.")
    else:
        matrix = adata.X if place.layer is None else adata.layers[place.layer]
    if matrix is None:
        raise BadInput(f"it has no X; name the counts with layer= (--layer), one of {layers}.")
    var = _frame(holder.var)
    found = find_genes(tokenizer, var, holder.var_names, options)
    own = holder is adata or found.names == [text_of(name) for name in adata.var_names]
    return matrix, found, place, var, own


class AnnDataInput(CellInput):
    """An AnnData, in memory or backed.

    Args:
        adata: Cells, which are not changed.
        tokenizer: Tokenizer whose vocabulary decides which genes are known.
        options: Options that say where genes and counts are.
    """

    genes: GeneMatch
    found: FoundGenes

    def __init__(self, adata: "AnnData", tokenizer: "TahoeX1Tokenizer", options: GeneOptions):
        self.adata, self.path, self.num_cells = adata, "adata", adata.n_obs
        self.tokenizer = tokenizer
        self.matrix, self.found, self.place, self._var, self.own_genes = find_matrix(adata, options, tokenizer)
        self.genes, self.counts_from = self.found.match, _path_of(self.place.layer, self.place.layer in adata.layers)
        if self.place.note:  # a warning, since Python does not show messages of lower levels by default
            way = ", or adata.raw.to_adata()" if self.counts_from == "raw/X" else ""
            note = f"{self.place.note} To choose them explicitly, pass layer={self.place.layer!r}{way}."
            self.found = replace(self.found, notes=((logging.WARNING, note), *self.found.notes))
        if getattr(self.matrix, "format", None) == "csc":
            self.matrix = to_csr(self.matrix.to_memory() if hasattr(self.matrix, "to_memory") else self.matrix)

    @property
    def var(self) -> "pd.DataFrame":
        """Table of the genes: `adata.var`, or `adata.raw.var` if the counts are those of `adata.raw`."""
        return self._var

    @property
    def obs_columns(self) -> list[str]:
        """Columns of `adata.obs`."""
        return [str(name) for name in self.adata.obs.columns]

    def column(self, name: str) -> "pd.Series":
        """Return a column of `adata.obs`, or the names of the cells."""
        return self._obs([name], 0, self.num_cells)[name]

    @cached_property
    def _whole_obs(self) -> "pd.DataFrame":
        """The table obs; a lazy one is read once."""
        return _frame(self.adata.obs)

    def _obs(self, columns: Sequence[str], start: int, stop: int) -> "pd.DataFrame":
        import pandas as pd

        obs = self._whole_obs
        missing = [name for name in columns if name != INDEX and name not in obs.columns]
        if missing:
            raise BadInput(f"adata.obs has no column {missing[0]!r}; there are {list(obs.columns)}.")
        parts = {name: (obs.index if name == INDEX else obs[name].array)[start:stop] for name in columns}
        return pd.DataFrame(parts, index=range(stop - start))

    def rows(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[GeneRows]:
        """Read a backed CSR matrix like a file; slice any other matrix, a few hundred cells at a time."""
        low = start
        for matrix in self._matrices(start, stop, elements):
            rows, unknown = gene_rows(matrix, self.genes, low, self.tokenizer, self.count_hint)
            obs = self._obs(columns, low, low + matrix.shape[0])
            yield rows._replace(first_cell=low, obs=obs, unknown_counts=unknown)
            low += matrix.shape[0]

    def _matrices(self, start: int, stop: int, elements: int | None = None) -> Iterator[Any]:
        if hasattr(self.matrix, "group"):
            from tahoex1_hf.cells.readers.stores import matrix_blocks

            yield from matrix_blocks(self.matrix.group, start, stop, elements=elements)
            return
        for low in range(start, stop, _SLICE_CELLS):
            yield in_memory(self.matrix[low : min(low + _SLICE_CELLS, stop)])

    def some_matrices(self) -> Iterator[Any]:
        """Slice the rows of the cells to check."""
        for start, stop in places_to_look(self.num_cells):
            yield from self._matrices(start, stop)

    def rows_at(self, numbers: np.ndarray) -> GeneRows:
        """Slice the matrix at these rows."""
        return gene_rows(in_memory(self.matrix[numbers]), self.genes, None, self.tokenizer)[0]

    def count_hint(self) -> str:
        """Look for whole numbers in `X`, the layers and `raw`."""
        return counts_elsewhere(self.adata, self.place.layer)


def _path_of(layer: str | None, is_layer: bool) -> str:
    """Return the place in a file of a layer of `GeneOptions`."""
    return "X" if layer is None else f"layers/{layer}" if is_layer else "raw/X"


def _frame(frame: Any) -> Any:
    """Return a data frame; a lazy one is read."""
    return frame.to_memory() if hasattr(frame, "to_memory") else frame


class StoredInput(CellInput):
    """An `.h5ad` file or a `.zarr` store.

    Args:
        path: Path of the file or store.
        tokenizer: Tokenizer whose vocabulary decides which genes are known.
        options: Options that say where genes and counts are.
        spool: Folder in which counts that are stored by gene are sorted by cell; None if there is none.
    """

    genes: GeneMatch
    found: FoundGenes

    def __init__(self, path: str, tokenizer: "TahoeX1Tokenizer", options: GeneOptions, spool: Path | None):
        from tahoex1_hf.cells.readers.missing_chunks import check_name_chunks, check_sparse_chunks
        from tahoex1_hf.cells.readers.stores import (
            column_names,
            index_of,
            matrix_format,
            matrix_shape,
            num_rows,
            open_store,
        )

        self.path, self.tokenizer, self.options, self._spool = path, tokenizer, options, spool
        if Path(path).is_file():
            import h5py

            if not h5py.is_hdf5(path):
                raise BadInput("it cannot be read: it is not an .h5ad file (not HDF5).")
        with open_store(path) as store:
            for frame in (store["obs"], store["var"]):
                check_name_chunks(index_of(frame), path)
            # Layers that lack chunks would not look like counts.
            for place in [f"layers/{name}" for name in NAMED] if options.layer is None else []:
                if place in store and not hasattr(store[place], "shape"):
                    check_sparse_chunks(store[place], path)
            self.num_cells = num_rows(store["obs"])
            self._columns = column_names(store["obs"])
            stored = _Stored(store)
            _, self.found, self._chosen, _, self.own_genes = find_matrix(stored, options, tokenizer)
            self.genes, layer = self.found.match, self._chosen.layer
            self.counts_from = _path_of(layer, layer in stored.layers)
            self.place = "raw.X" if self.counts_from == "raw/X" and "raw.X" in store else self.counts_from
            if self._chosen.note:
                self.found = replace(self.found, notes=((logging.INFO, self._chosen.note), *self.found.notes))
            shape = matrix_shape(store[self.place])
            if not self.num_cells:
                raise BadInput("it has no cells.")
            if shape != (self.num_cells, self.genes.num_genes):
                raise BadInput(
                    f"its counts have the shape {shape} for {self.num_cells} cells and {self.genes.num_genes} genes."
                )
            self.by_gene = matrix_format(store[self.place]) == "csc"
        self.fingerprint = content_fingerprint(path)

    @property
    def var(self) -> "pd.DataFrame":
        """Table of the genes, read completely."""
        import pandas as pd

        from tahoex1_hf.cells.readers.stores import Frame, open_store

        with open_store(self.path) as store:
            frame = Frame(store[{"raw/X": "raw/var", "raw.X": "raw.var"}.get(self.place, "var")])
            columns = {name: frame[name].array for name in frame.columns}
            return pd.DataFrame(columns, index=frame.index)

    @property
    def obs_columns(self) -> list[str]:
        """Columns of obs."""
        return list(self._columns)

    def column(self, name: str) -> "pd.Series":
        """Read a column of obs."""
        from tahoex1_hf.cells.readers.stores import open_store, read_column

        with open_store(self.path) as store:
            return read_column(store["obs"], name)

    def fingerprint_now(self) -> str:
        """Return the fingerprint of the present file."""
        return content_fingerprint(self.path)

    def check(self) -> None:
        """Check the index of a sparse matrix, and that none of its chunks is missing."""
        from tahoex1_hf.cells.readers.csr import check_indptr
        from tahoex1_hf.cells.readers.missing_chunks import check_sparse_chunks
        from tahoex1_hf.cells.readers.stores import matrix_format, open_store

        with open_store(self.path) as store:
            if matrix_format(store[self.place]) != "dense":
                check_indptr(store[self.place], self.genes.num_genes if self.by_gene else self.num_cells)
                check_sparse_chunks(store[self.place], self.path)

    @cached_property
    def _spooled(self) -> Path | None:
        if not self.by_gene:
            return None
        if self._spool is None:
            raise BadInput("its counts are stored by gene (CSC): name a folder in which to sort them by cell.")
        key = f"{os.path.abspath(self.path)}\n{self.place}\n{self.fingerprint}"
        return self._spool / sha256(key.encode()).hexdigest()[:24]

    def sort_by_cell(self, piece_cells: int = 16384) -> None:
        """Sort the counts of a CSC matrix by cell, and write them into the spool folder."""
        from tahoex1_hf.cells.readers.by_gene import spool_entries
        from tahoex1_hf.cells.readers.stores import csc_entries, open_store

        if self._spooled is not None:
            with open_store(self.path) as store:
                spool_entries(csc_entries(store[self.place]), self.num_cells, piece_cells, self._spooled)
            self._is_sorted = True
            self.look()

    def some_matrices(self) -> Iterator[Any]:
        """Read the rows of the cells to check."""
        from tahoex1_hf.cells.readers.stores import matrix_blocks, open_store

        with open_store(self.path) as store:
            for start, stop in places_to_look(self.num_cells):
                yield from matrix_blocks(store[self.place], start, stop, self._spooled)

    def num_stored(self) -> np.ndarray | None:
        """Read the numbers of stored counts from the index of a CSR matrix; return None for other matrices."""
        from tahoex1_hf.cells.readers.stores import matrix_format, open_store

        with open_store(self.path) as store:
            matrix = store[self.place]
            if matrix_format(matrix) != "csr":
                return None
            return np.diff(np.asarray(matrix["indptr"][:], dtype=np.int64))

    def rows(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[GeneRows]:
        """Read rows; each chunk of a compressed file is read only once."""
        from tahoex1_hf.cells.readers.stores import matrix_blocks, open_store

        with open_store(self.path) as store:
            obs, low = _ObsReader(store["obs"], columns, stop), start
            for matrix in matrix_blocks(store[self.place], start, stop, self._spooled, elements):
                rows, unknown = gene_rows(matrix, self.genes, low, self.tokenizer, self.count_hint)
                table = obs.read(low, low + matrix.shape[0])
                yield rows._replace(first_cell=low, obs=table, unknown_counts=unknown)
                low += matrix.shape[0]

    def rows_at(self, numbers: np.ndarray) -> GeneRows:
        """Read some rows; a matrix that is stored by gene is read completely, once."""
        from tahoex1_hf.cells.readers.stores import open_store

        if self.by_gene:
            return gene_rows(self._by_cell[numbers], self.genes, None, self.tokenizer)[0]
        with open_store(self.path) as store:
            matrix = _on_disk(store[self.place])
            picked = matrix.oindex[numbers] if hasattr(matrix, "oindex") else matrix[numbers]
            return gene_rows(picked, self.genes, None, self.tokenizer)[0]

    @cached_property
    def _by_cell(self) -> Any:
        from tahoex1_hf.cells.readers.stores import open_store

        with open_store(self.path) as store:
            return to_csr(_on_disk(store[self.place]).to_memory())

    def count_hint(self) -> str:
        """Look for whole numbers in `X`, the layers and `raw`."""
        from tahoex1_hf.cells.readers.stores import open_store

        with open_store(self.path) as store:
            return counts_elsewhere(_Stored(store), self._chosen.layer)


class _ObsReader:
    """Reader of columns of obs on disk, in order and for many cells at a time."""

    def __init__(self, frame: Any, columns: Sequence[str], stop: int):
        self.frame, self.columns, self.last = frame, columns, stop
        self._start = 0
        self._read: Any = None

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Return the columns of cells `start` to `stop`."""
        import pandas as pd

        from tahoex1_hf.cells.readers.stores import read_column

        if not self.columns:
            return pd.DataFrame(index=range(stop - start))
        if self._read is None or stop > self._start + len(self._read):
            end = max(stop, min(start + _OBS_CELLS, self.last))
            self._start = start
            self._read = pd.DataFrame(
                {name: read_column(self.frame, name, start, end) for name in self.columns}, index=range(end - start)
            )
        part: pd.DataFrame = self._read.iloc[start - self._start : stop - self._start]
        return part.reset_index(drop=True)


def _on_disk(element: Any) -> Any:
    from tahoex1_hf.cells.readers.csr import SparseOnDisk

    return element if hasattr(element, "shape") else SparseOnDisk(element)


class _Stored:
    """An AnnData on disk with the attributes that the search for genes and counts uses; data is read on request."""

    def __init__(self, store: Any):
        self._store = store
        self.X = _on_disk(store["X"]) if "X" in store else None
        self.layers = {name: _on_disk(store["layers"][name]) for name in store.get("layers", ())}

    @cached_property
    def raw(self) -> Any:
        """Counts and genes of `raw`, if there is one; anndata before 0.7 stored them beside `X`."""
        if "raw.X" in self._store:
            return _StoredRaw({"X": self._store["raw.X"], "var": self._store["raw.var"]})
        return _StoredRaw(self._store["raw"]) if "raw" in self._store and "X" in self._store["raw"] else None

    @cached_property
    def var(self) -> Any:
        """Columns of var."""
        from tahoex1_hf.cells.readers.stores import Frame

        return Frame(self._store["var"])

    @property
    def var_names(self) -> Any:
        """Names of the genes."""
        return self.var.index


class _StoredRaw(_Stored):
    """The `raw` of an AnnData on disk."""

    raw = None
