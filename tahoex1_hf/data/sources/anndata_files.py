# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""`.h5ad` files and `.zarr` stores, read in chunks of cells: only the counts, and the columns that are asked for."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tahoex1_hf.cells.gene_symbols import read_gene_symbols
from tahoex1_hf.cells.readers.base import INDEX, BadInput, CellChunk, chunk_of_matrix
from tahoex1_hf.cells.readers.by_gene import spool_entries
from tahoex1_hf.cells.readers.csr import check_indptr
from tahoex1_hf.cells.readers.paths import expand_paths, is_zarr_store, local_fingerprint
from tahoex1_hf.cells.readers.stores import (
    csc_entries,
    matrix_blocks,
    matrix_format,
    matrix_shape,
    num_rows,
    open_store,
    read_column,
)
from tahoex1_hf.data.config import AnnDataSource
from tahoex1_hf.data.sources.base import CellSource, FileReport, matched_genes
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch


class AnnDataFiles(CellSource):
    """Files that anndata writes."""

    config: AnnDataSource

    def list_files(self) -> list[str]:
        """The `.h5ad` files and `.zarr` stores, sorted."""
        return expand_paths(self.config.paths, is_anndata, ".h5ad files or .zarr stores")

    def inspect(self, path: str) -> FileReport:
        """Check shapes and genes; the counts are not read."""
        with open_store(path) as store:
            matrix = self._matrix(store)
            genes = self._match(store)
            shape = matrix_shape(matrix)
            num_cells = num_rows(store["obs"])
            if not num_cells:
                raise BadInput("it has no cells.")
            if shape != (num_cells, genes.num_genes):
                raise BadInput(f"its counts have the shape {shape} for {num_cells} cells and {genes.num_genes} genes.")
            if matrix_format(matrix) != "dense":
                check_indptr(matrix, shape[0] if matrix_format(matrix) == "csr" else shape[1])
            return FileReport(
                num_cells=num_cells,
                fingerprint=local_fingerprint(path),
                num_genes=genes.num_genes,
                num_genes_known=genes.num_genes - genes.num_unknown,
                unknown_genes=list(genes.unknown_examples),
                by_gene=matrix_format(matrix) == "csc",
            )

    def cell_names(self, path: str) -> np.ndarray:
        """`obs_names`."""
        with open_store(path) as store:
            return read_column(store["obs"], INDEX).to_numpy()

    def spool(self, path: str, piece_cells: int) -> None:
        """Sort a CSC matrix by cell."""
        with open_store(path) as store:
            matrix = self._matrix(store)
            spool_entries(csc_entries(matrix), matrix_shape(matrix)[0], piece_cells, self._spooled(path))

    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[CellChunk]:
        """Read in chunks of about `CHUNK_ELEMENTS` stored (or, of a dense matrix, all) entries."""
        with open_store(path) as store:
            genes = self._match(store)
            metadata = pd.DataFrame(
                {name: read_column(store["obs"], name, start, stop) for name in columns}, index=range(stop - start)
            )
            done = start
            for matrix in matrix_blocks(self._matrix(store), start, stop, self._spooled(path)):
                end = done + matrix.shape[0]
                part = metadata.iloc[done - start : end - start].reset_index(drop=True)
                yield chunk_of_matrix(matrix, genes, part, done, self.tokenizer)
                done = end

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
        names = read_column(var, INDEX if column is None else column).astype(str)
        return matched_genes(self.tokenizer, names.tolist(), self.config, read_gene_symbols(symbols))

    def _spooled(self, path: str) -> Path:
        return self.spool_folder / sha256(f"{path}\n{self.config.layer}".encode()).hexdigest()[:24]


def is_anndata(path: Path) -> bool:
    """Whether a path is an `.h5ad` file or a `.zarr` store."""
    return (path.suffix == ".h5ad" and path.is_file()) or is_zarr_store(path)
