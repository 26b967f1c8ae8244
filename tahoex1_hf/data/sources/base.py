# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What every kind of source gives: files, a report on each, and chunks of cells."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.readers.base import BadInput, CellChunk
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

if TYPE_CHECKING:
    from tahoex1_hf.data.config import CommonSourceConfig
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


@dataclass
class FileReport:
    """What is known of a file before its counts are read.

    Attributes:
        num_cells: cells in it, before any filter.
        fingerprint: changes when the content does: size and time of change, an etag or a version. Only compared.
        num_genes: gene columns (or entries of its gene table).
        num_genes_known: of these, in the vocabulary.
        unknown_genes: up to five of the others.
        by_gene: counts are stored by gene, and `CellSource.spool` must sort them by cell before `read`.
    """

    num_cells: int
    fingerprint: str
    num_genes: int
    num_genes_known: int
    unknown_genes: list[str] = field(default_factory=list)
    by_gene: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class CellSource(ABC):
    """Files with cells of one kind. The constructor opens nothing; objects live in worker processes."""

    def __init__(self, config: "CommonSourceConfig", tokenizer: "TahoeX1Tokenizer", spool: Path) -> None:
        """Take the settings.

        Args:
            config: the source's part of the configuration.
            tokenizer: knows the genes of the vocabulary (`match_genes`).
            spool: folder for intermediate files; may not exist yet.
        """
        self.config, self.tokenizer, self.spool_folder = config, tokenizer, spool

    @abstractmethod
    def list_files(self) -> list[str]:
        """The files, sorted, without opening them. A file is what is reported on: also a folder, an experiment."""

    @abstractmethod
    def inspect(self, path: str) -> FileReport:
        """Look at a file without reading its counts.

        Raises:
            BadInput: where it is corrupt, empty, or its genes are not the vocabulary's.
        """

    @abstractmethod
    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[CellChunk]:
        """Cells `start` to `stop` of a file in order, in chunks of bounded memory.

        Args:
            path: one of `list_files`.
            start: number of the first cell.
            stop: number behind the last cell.
            columns: metadata columns that the chunks must have; `INDEX` for the names of the cells.

        Raises:
            BadInput: where the counts cannot be read, or a column is not there.
        """

    def cell_names(self, path: str) -> np.ndarray | None:
        """Names of all cells of a file, to look for duplicates; None where cells have no names of their own."""
        return None

    def spool(self, path: str, piece_cells: int) -> None:
        """Sort a file that is stored by gene into pieces of `piece_cells` cells, once, for `read` to find."""
        raise NotImplementedError(f"{type(self).__name__} has no files that are stored by gene.")


def matched_genes(
    tokenizer: "TahoeX1Tokenizer",
    names: Sequence[str],
    config: "CommonSourceConfig",
    symbols: Mapping[str, str] | None,
) -> GeneMatch:
    """Look up the genes of a file.

    Raises:
        BadInput: where less than `config.min_known_genes` of them are in the vocabulary, or ids are mixed with names.
    """
    try:
        match = tokenizer.match_genes(names, gene_symbols=symbols)
    except ValueError as error:
        raise BadInput(str(error)) from None
    known = match.token_ids >= 0
    if known.mean() < config.min_known_genes:
        raise BadInput(
            f"{known.sum()} of {len(known)} genes are in the vocabulary, less than min_known_genes="
            f"{config.min_known_genes}; unknown are, for example, {list(match.unknown_examples)}. Map the genes "
            "to the ids of the vocabulary, or lower min_known_genes."
        )
    strange = [str(name) for name, k in zip(names, known, strict=True) if not k and not str(name).startswith("ENS")]
    if symbols is None and len(strange) > 0.05 * len(known):
        raise BadInput(
            f"the gene ids are mixed: {known.sum()} are in the vocabulary, and {len(strange)} of {len(known)} are no "
            f"Ensembl ids, for example {strange[:5]}. Give gene_symbols, a table symbol -> Ensembl id, or "
            "gene_id_column, a column with Ensembl ids."
        )
    return match
