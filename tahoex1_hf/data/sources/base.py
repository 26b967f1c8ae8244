# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The interface of sources for `prepare`: a source lists files, reports on each, and reads its cells."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells import compilation
from tahoex1_hf.encoding_tahoe_x1 import GeneRows

if TYPE_CHECKING:
    from tahoex1_hf.data.config import CommonSourceConfig
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


@dataclass
class FileReport:
    """Facts about a file that are known before its counts are read.

    Attributes:
        num_cells: Number of cells in it, before any filter.
        fingerprint: Text that changes when the content does: size and time of change, an etag or a version.
        num_genes: Number of gene columns (or of entries of its gene table).
        num_genes_known: Number of genes that are in the vocabulary.
        unknown_genes: Names of up to five of the other genes.
        by_gene: Whether counts are stored by gene, and `SourceReader.spool` must sort them by cell before `read`.
    """

    num_cells: int
    fingerprint: str
    num_genes: int
    num_genes_known: int
    unknown_genes: list[str] = field(default_factory=list)
    by_gene: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary, for JSON."""
        return asdict(self)


class SourceReader(ABC):
    """Files with cells of one kind. The constructor opens nothing; objects live in worker processes."""

    def __init__(self, config: "CommonSourceConfig", tokenizer: "TahoeX1Tokenizer", spool: Path) -> None:
        """Take the settings.

        Args:
            config: The source's part of the configuration.
            tokenizer: Tokenizer that knows the genes of the vocabulary (`match_genes`).
            spool: Folder for intermediate files, which need not exist yet.
        """
        compilation.use_now()
        self.config, self.tokenizer, self.spool_folder = config, tokenizer, spool

    @abstractmethod
    def list_files(self) -> list[str]:
        """List the files, sorted, without opening them; a folder or an experiment may count as a file."""

    @abstractmethod
    def inspect(self, path: str) -> FileReport:
        """Look at a file without reading its counts.

        Raises:
            BadInput: If it is corrupt, empty, or its genes are not the vocabulary's.
        """

    @abstractmethod
    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[GeneRows]:
        """Yield cells `start` to `stop` of a file in order, a bounded number at a time.

        Args:
            path: Path, one of those that `list_files` returns.
            start: Number of the first cell.
            stop: Number after the last cell.
            columns: Metadata columns to read with the cells; `INDEX` for the names of the cells.

        Raises:
            BadInput: If the counts cannot be read, or a column is not there.
        """

    def fingerprint_now(self, path: str) -> str | None:
        """Return the fingerprint that a file has now; None where that is not known without looking at all of it."""
        return None

    def cell_names(self, path: str) -> np.ndarray | None:
        """Return the names of all cells of a file, to look for duplicates; None where cells have no names."""
        return None

    def spool(self, path: str, piece_cells: int) -> None:
        """Sort a file that is stored by gene into pieces of `piece_cells` cells, once, for `read` to find."""
        raise NotImplementedError(f"{type(self).__name__} has no files that are stored by gene.")
