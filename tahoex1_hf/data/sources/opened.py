# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Files that `open_cells` opens, as a source of `prepare`: AnnData, 10x, and the form of Tahoe-100M."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import Source, find_files, open_source
from tahoex1_hf.cells.readers.base import INDEX, CellInput
from tahoex1_hf.data.config import AnnDataSource, Tahoe100MSource, TenXSource
from tahoex1_hf.data.sources.base import FileReport, SourceReader
from tahoex1_hf.encoding_tahoe_x1 import GeneRows

if TYPE_CHECKING:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


_OPTIONS = (*("gene_id_column", "gene_symbols", "layer", "gene_metadata", "min_known_genes", "species", "orthologs"),)


class OpenedFiles(SourceReader):
    """Files of one kind.

    Args:
        config: The source's part of the configuration.
        tokenizer: The tokenizer that knows the genes.
        spool: Folder for counts that are sorted by cell.
    """

    config: AnnDataSource | TenXSource | Tahoe100MSource

    def __init__(
        self, config: AnnDataSource | TenXSource | Tahoe100MSource, tokenizer: "TahoeX1Tokenizer", spool: Path
    ) -> None:
        super().__init__(config, tokenizer, spool)
        known: Any = {name: getattr(config, name) for name in _OPTIONS if hasattr(config, name)}
        # Nothing is assumed of what is learnt from: counts elsewhere must be named.
        known["other_counts"] = "refuse" if config.non_integer_counts == "error" else "leave"
        self.options = GeneOptions(**known)
        self._opened: tuple[str, CellInput] | None = None

    def list_files(self) -> list[str]:
        """List the files, sorted."""
        return find_files(self.config.kind, self.config.paths)

    def _open(self, path: str) -> CellInput:
        """Open a file, and keep it open, since a process reads a file piece by piece."""
        if self._opened is None or self._opened[0] != path:
            cells = open_source(Source(path, self.config.kind), self.tokenizer, self.options, self.spool_folder)
            self._opened = (path, cells)
        return self._opened[1]

    def inspect(self, path: str) -> FileReport:
        """Check shapes, genes and the index of sparse counts; the counts are not read."""
        self._opened = None
        cells = self._open(path)
        cells.check()
        cells.look()
        genes = cells.genes
        assert genes is not None
        return FileReport(
            num_cells=cells.num_cells,
            fingerprint=cells.fingerprint,
            num_genes=genes.num_genes,
            num_genes_known=genes.num_genes - genes.num_unknown,
            unknown_genes=list(genes.unknown_examples),
            by_gene=cells.by_gene,
        )

    def fingerprint_now(self, path: str) -> str | None:
        """Look at a file on this machine, or at the three files of a 10x matrix."""
        from tahoex1_hf.cells.readers.ten_x import files_of, is_ten_x

        if "://" in path:
            return None
        return content_fingerprint(*(files_of(path) if is_ten_x(Path(path)) else [path]))

    def cell_names(self, path: str) -> np.ndarray | None:
        """Return the names of the cells; those of Tahoe-100M, which are not unique in a file, are left out."""
        return None if self.config.kind == "tahoe-100m" else self._open(path).column(INDEX).to_numpy()

    def spool(self, path: str, piece_cells: int) -> None:
        """Sort counts that are stored by gene."""
        self._open(path).sort_by_cell(piece_cells)

    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[GeneRows]:
        """Read cells of the file."""
        yield from self._open(path).rows(start, stop, columns)
