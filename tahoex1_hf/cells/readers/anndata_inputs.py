# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The cells of an AnnData, in memory or backed, and of the `.h5ad` files and `.zarr` stores that anndata writes."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.genes import GeneOptions, check_known
from tahoex1_hf.cells.readers.base import INDEX, BadInput, Block, CellInput, gene_rows
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, count_hint, to_csr

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# Number of cells of an AnnData that are taken at once: they are in memory, or their matrix is a dense one on disk.
_SLICE_CELLS = 256
# Columns of obs on disk are read for this many cells at once.
_OBS_CELLS = 16384


def find_matrix(adata: Any, options: GeneOptions, tokenizer: "TahoeX1Tokenizer") -> tuple[Any, GeneMatch]:
    """Find the counts and the genes of an AnnData, or of what looks like one.

    Returns:
        The `(cells, genes)` matrix, and the token of each column.

    Raises:
        BadInput: for a layer or a column that is not there, and for genes that are not in the vocabulary.
    """
    layer = options.layer
    if layer == "raw" and layer not in adata.layers and adata.raw is not None:
        adata, layer = _Raw(adata.raw), None
    try:
        matrix, genes = tokenizer.read_anndata(adata, options.gene_id_column, layer, options.symbols())
    except ValueError as error:
        raise BadInput(str(error)) from error
    column = options.gene_id_column
    check_known(genes, adata.var_names if column is None else adata.var[column], options)
    return matrix, genes


class _Raw:
    """`.raw` of an AnnData in the form of an AnnData."""

    raw, layers = None, dict[str, Any]()

    def __init__(self, raw: Any):
        self.X, self.var, self.var_names = raw.X, raw.var, raw.var_names


class AnnDataInput(CellInput):
    """An AnnData, in memory or backed.

    Args:
        adata: cells, which are left as they are.
        tokenizer: the tokenizer that knows the genes.
        options: where genes and counts are.
    """

    genes: GeneMatch

    def __init__(self, adata: "AnnData", tokenizer: "TahoeX1Tokenizer", options: GeneOptions):
        self.adata, self.path, self.num_cells = adata, "adata", adata.n_obs
        self.tokenizer, self.options = tokenizer, options
        self.matrix, self.genes = find_matrix(adata, options, tokenizer)
        if getattr(self.matrix, "format", None) == "csc":
            self.matrix = to_csr(self.matrix.to_memory() if hasattr(self.matrix, "to_memory") else self.matrix)

    @property
    def var(self) -> "pd.DataFrame":
        """`adata.var`, or that of `adata.raw` where its counts are taken."""
        from_raw = self.options.layer == "raw" and "raw" not in self.adata.layers
        return self.adata.raw.var if from_raw else self.adata.var

    @property
    def obs_columns(self) -> list[str]:
        """Columns of `adata.obs`."""
        return list(self.adata.obs.columns)

    def column(self, name: str) -> "pd.Series":
        """Return a column of `adata.obs`, or the names of the cells."""
        return self._obs([name], 0, self.num_cells)[name]

    def _obs(self, columns: Sequence[str], start: int, stop: int) -> "pd.DataFrame":
        import pandas as pd

        obs = self.adata.obs
        missing = [name for name in columns if name != INDEX and name not in obs.columns]
        if missing:
            raise BadInput(f"adata.obs has no column {missing[0]!r}; there are {list(obs.columns)}.")
        parts = {name: (obs.index if name == INDEX else obs[name].array)[start:stop] for name in columns}
        return pd.DataFrame(parts, index=range(stop - start))

    def blocks(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[Block]:
        """Read a backed CSR matrix as a file is read; slice all else, a few hundred cells at a time."""
        if hasattr(self.matrix, "group"):
            from tahoex1_hf.cells.readers.stores import matrix_blocks

            matrices = matrix_blocks(self.matrix.group, start, stop, elements=elements)
        else:
            lows = range(start, stop, _SLICE_CELLS)
            matrices = (self.matrix[low : min(low + _SLICE_CELLS, stop)] for low in lows)
        low = start
        for matrix in matrices:
            rows, unknown = gene_rows(matrix, self.genes, low, self.tokenizer, self.count_hint)
            block = Block(low, rows, self._obs(columns, low, low + matrix.shape[0]), unknown)
            yield block
            low = block.stop

    def rows_at(self, numbers: np.ndarray) -> GeneRows:
        """Slice the matrix."""
        return gene_rows(self.matrix[numbers], self.genes, None, self.tokenizer)[0]

    def count_hint(self) -> str:
        """Look for whole numbers in `X`, the layers and `raw`."""
        return count_hint(self.adata, self.options.layer)


class StoredInput(CellInput):
    """An `.h5ad` file or a `.zarr` store.

    Args:
        path: the file.
        tokenizer: the tokenizer that knows the genes.
        options: where genes and counts are.
        spool: folder in which counts that are stored by gene are sorted by cell.
    """

    genes: GeneMatch

    def __init__(self, path: str, tokenizer: "TahoeX1Tokenizer", options: GeneOptions, spool: Path | None):
        from tahoex1_hf.cells.readers.paths import local_fingerprint
        from tahoex1_hf.cells.readers.stores import column_names, matrix_format, matrix_shape, num_rows, open_store

        self.path, self.tokenizer, self.options, self._spool = path, tokenizer, options, spool
        if Path(path).is_file():
            import h5py

            if not h5py.is_hdf5(path):
                raise BadInput("it cannot be read: it is not an .h5ad file (not HDF5).")
        with open_store(path) as store:
            self.place = self._find_place(store)
            self.num_cells = num_rows(store["obs"])
            self._columns = column_names(store["obs"])
            _, self.genes = find_matrix(_Stored(store), options, tokenizer)
            shape = matrix_shape(store[self.place])
            if not self.num_cells:
                raise BadInput("it has no cells.")
            if shape != (self.num_cells, self.genes.num_genes):
                raise BadInput(
                    f"its counts have the shape {shape} for {self.num_cells} cells and {self.genes.num_genes} genes."
                )
            self.by_gene = matrix_format(store[self.place]) == "csc"
        self.fingerprint = local_fingerprint(path)

    def _find_place(self, store: Any) -> str:
        layer, layers = self.options.layer, [*store.get("layers", ())]
        if layer == "raw" and layer not in layers and "raw" in store:
            return "raw/X"
        place = "X" if layer is None else f"layers/{layer}"
        if place not in store:
            raise BadInput(
                f"it has no {place}; layer= can be one of {[*layers, *(['raw'] if 'raw' in store else [])]}, or left "
                "out for X."
            )
        return place

    @property
    def var(self) -> "pd.DataFrame":
        """The table of the genes, read whole."""
        import pandas as pd

        from tahoex1_hf.cells.readers.stores import Frame, open_store

        with open_store(self.path) as store:
            frame = Frame(store["raw/var" if self.place == "raw/X" else "var"])
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

    def check(self) -> None:
        """Read the index of a sparse matrix."""
        from tahoex1_hf.cells.readers.csr import check_indptr
        from tahoex1_hf.cells.readers.stores import matrix_format, open_store

        with open_store(self.path) as store:
            if matrix_format(store[self.place]) != "dense":
                check_indptr(store[self.place], self.genes.num_genes if self.by_gene else self.num_cells)

    @cached_property
    def _spooled(self) -> Path | None:
        if not self.by_gene:
            return None
        if self._spool is None:
            raise BadInput("its counts are stored by gene (CSC): name a folder in which they are sorted by cell.")
        key = f"{os.path.abspath(self.path)}\n{self.place}\n{self.fingerprint}"
        return self._spool / sha256(key.encode()).hexdigest()[:24]

    def sort_by_cell(self, piece_cells: int = 16384) -> None:
        """Sort a CSC matrix into the spool folder."""
        from tahoex1_hf.cells.readers.by_gene import spool_entries
        from tahoex1_hf.cells.readers.stores import csc_entries, open_store

        if self._spooled is not None:
            with open_store(self.path) as store:
                spool_entries(csc_entries(store[self.place]), self.num_cells, piece_cells, self._spooled)

    def num_stored(self) -> np.ndarray | None:
        """Read the index of a CSR matrix."""
        from tahoex1_hf.cells.readers.stores import matrix_format, open_store

        with open_store(self.path) as store:
            matrix = store[self.place]
            if matrix_format(matrix) != "csr":
                return None
            return np.diff(np.asarray(matrix["indptr"][:], dtype=np.int64))

    def blocks(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[Block]:
        """Read rows; a compressed file is read in the chunks that it was written in, each once."""
        from tahoex1_hf.cells.readers.stores import matrix_blocks, open_store

        with open_store(self.path) as store:
            obs, low = _ObsReader(store["obs"], columns, stop), start
            for matrix in matrix_blocks(store[self.place], start, stop, self._spooled, elements):
                rows, unknown = gene_rows(matrix, self.genes, low, self.tokenizer, self._hint_of(store))
                block = Block(low, rows, obs.read(low, low + matrix.shape[0]), unknown)
                yield block
                low = block.stop

    def rows_at(self, numbers: np.ndarray) -> GeneRows:
        """Read some rows; a matrix that is stored by gene is read whole, once."""
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

    def _hint_of(self, store: Any) -> Callable[[], str]:
        return lambda: count_hint(_Stored(store), self.options.layer)

    def count_hint(self) -> str:
        """Look for whole numbers in `X`, the layers and `raw`."""
        from tahoex1_hf.cells.readers.stores import open_store

        with open_store(self.path) as store:
            return self._hint_of(store)()


class _ObsReader:
    """Columns of obs on disk, read in order for many cells at a time."""

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
    from anndata.io import sparse_dataset

    return element if hasattr(element, "shape") else sparse_dataset(element)


class _Stored:
    """An AnnData on disk, with what finding genes and counts needs of it; nothing is read before it is asked for."""

    def __init__(self, store: Any):
        self._store = store
        self.X = _on_disk(store["X"]) if "X" in store else None
        self.layers = {name: _on_disk(store["layers"][name]) for name in store.get("layers", ())}

    @property
    def raw(self) -> Any:
        """The counts and genes of `raw`, where there is one."""
        return _StoredRaw(self._store["raw"]) if "raw" in self._store and "X" in self._store["raw"] else None

    @cached_property
    def var(self) -> Any:
        """The columns of var."""
        from tahoex1_hf.cells.readers.stores import Frame

        return Frame(self._store["var"])

    @property
    def var_names(self) -> Any:
        """The names of the genes."""
        return self.var.index


class _StoredRaw(_Stored):
    """`raw` of an AnnData on disk."""

    raw = None
