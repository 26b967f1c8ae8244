# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The base of all inputs of cells: known genes and counts, columns of obs, and errors."""

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.counts import without_noise
from tahoex1_hf.cells.errors import BadInput
from tahoex1_hf.cells.fingerprint import agrees
from tahoex1_hf.cells.gene_search import FoundGenes
from tahoex1_hf.cells.looking import MUCH, Seen, look
from tahoex1_hf.cells.rows import cut_cells, join_cells
from tahoex1_hf.common.reading import reading
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, count_problem, matrix_rows, merge_repeats

if TYPE_CHECKING:
    import pandas as pd

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

INDEX = "_index"
"""Name of the column that stands for the names of the cells (`obs_names`, barcodes)."""

# Number of stored elements of a sparse matrix, or of all elements of a dense one, that are read at once by default.
# Together with temporary arrays they take about 100 MB.
CHUNK_ELEMENTS = 4_000_000

_said: ContextVar[set[tuple[str, str]] | None] = ContextVar("said", default=None)


@contextmanager
def said_once() -> Iterator[None]:
    """In the block, say what is found out about an input once, however often the input is opened."""
    before = _said.get()
    token = _said.set(set() if before is None else before)
    try:
        yield
    finally:
        _said.reset(token)


class CellInput(ABC):
    """The cells of one file, store, prepared dataset or AnnData, whose genes and counts have been found.

    Attributes:
        path: Path or name of the source, for messages.
        tokenizer: Tokenizer whose vocabulary decides which genes are known.
        num_cells: Number of cells.
        genes: Token of each gene of the input; None for a prepared dataset, whose genes are tokens.
        fingerprint: Text that changes when the content changes; empty for an AnnData.
        by_gene: Whether the counts are stored by gene, so that `sort_by_cell` must be called before `rows`.
        found: Result of the search for genes; None for a dataset that has its own table of genes.
        seen: Result of `look`; None before it was called.
        counts_from: Place of the counts: `X`, a layer or `raw`.
        own_genes: Whether the genes are those of `var`, in the same order; `raw` can have other genes.
    """

    path: str
    tokenizer: "TahoeX1Tokenizer"
    num_cells: int
    genes: GeneMatch | None
    fingerprint: str = ""
    by_gene: bool = False
    found: FoundGenes | None = None
    seen: Seen | None = None
    counts_from: str = ""
    own_genes: bool = True
    _told = _is_sorted = False

    @property
    @abstractmethod
    def obs_columns(self) -> list[str]:
        """Names of the columns of obs, without `INDEX`."""

    @abstractmethod
    def column(self, name: str) -> "pd.Series":
        """Return a column of obs for all cells; `INDEX` stands for the names of the cells.

        Raises:
            BadInput: If there is no such column.
        """

    def value_counts(self, name: str) -> "Counter[Any]":
        """Count the cells for each value of a column of obs, including missing values."""
        return Counter(dict(self.column(name).astype(object).value_counts(dropna=False)))

    @abstractmethod
    def rows(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[GeneRows]:
        """Read cells `start` to `stop` in order, a bounded number at a time; each gene occurs once in a cell.

        Args:
            start: Number of the first cell.
            stop: Number after the last cell.
            columns: Columns of obs to read with the cells; `INDEX` for the names of the cells.
            elements: Approximate largest number of stored counts read at a time; `CHUNK_ELEMENTS` by default.

        Raises:
            BadInput: If the counts cannot be read, or a column does not exist.
        """

    @property
    def var(self) -> "pd.DataFrame":
        """Table of the genes, whose index holds their names."""
        raise BadInput("it has no table of genes: write it to an .h5ad file.")

    def check_gene_slots(self) -> None:
        """Raise ValueError before any work is done if values for each gene would not fit into `varm`."""
        if not self.own_genes:
            raise ValueError(
                f"{self.path}: the counts are those of raw, whose genes are not those of var, so varm cannot hold "
                "gene embeddings of them: take adata.raw.to_adata()."
            )

    def rows_at(self, numbers: np.ndarray) -> GeneRows:
        """Return the cells with these numbers, which must be in rising order; their values are not checked."""
        raise BadInput("its cells can only be read in order: write them to an .h5ad file.")

    def num_stored(self) -> np.ndarray | None:
        """Return the number of stored counts of each cell, `(cells,)`; None if it is not known in advance."""
        return None

    def fingerprint_now(self) -> str:
        """Return the fingerprint of the present content; `fingerprint` is that of the content when it was opened."""
        return self.fingerprint

    def check_unchanged(self) -> None:
        """Check that the input has not changed since it was opened.

        Raises:
            ValueError: If it has changed, so that results would not match its cells.
        """
        try:
            same = agrees(self.fingerprint, self.fingerprint_now())
        except FileNotFoundError:
            same = False
        if not same:
            raise ValueError(
                f"{self.path} has changed since it was opened, so that the results would not match its cells: "
                "nothing is written. Run again when the file no longer changes (with --restart if an unfinished run "
                "is in the way)."
            )

    def check(self) -> None:  # noqa: B027 - most inputs have nothing more to look at
        """Check the index of the counts, which must be read completely.

        Raises:
            BadInput: If the index does not fit the counts.
        """

    def sort_by_cell(self, piece_cells: int = 16384) -> None:  # noqa: B027 - most inputs have nothing to do
        """Sort counts that are stored by gene, on disk and only once; `piece_cells` cells are sorted at a time."""

    def count_hint(self) -> str:
        """Return advice for an error message: the place where the input seems to have raw counts."""
        return " Pass the raw counts."

    def some_matrices(self) -> Iterator[Any]:
        """Read the values of some cells; see `looking.places_to_look`."""
        raise NotImplementedError

    def look(self) -> None:
        """Check some cells, and report once how many counts unknown genes lose and whether values are not counts.

        Counts that are stored by gene are checked when they are sorted.

        Raises:
            BadInput: If the cells cannot be read.
        """
        if self.found is None or self.seen is not None:
            return
        if not self._told:
            self._tell(list(self.found.notes))
            self._told = True
        if self.by_gene and not self._is_sorted:
            return
        self.seen = seen = look(self.some_matrices(), self.found)
        notes = []
        if seen.unknown_genes:
            level = logging.WARNING if seen.lost > MUCH else logging.INFO
            notes.append((level, seen.losses(seen.cells == self.num_cells)))
        if seen.doubt is not None and self.tokenizer.value_encoding != "raw":
            notes.append((logging.WARNING, f"counts: {seen.doubt}{self.count_hint()}"))
        self._tell(notes)

    def _tell(self, notes: list[tuple[int, str]]) -> None:
        if os.environ.get("RANK", "0") == "0":  # only the first process of a run reports
            said = _said.get()
            for level, text in notes:
                if said is None or (self.path, text) not in said:
                    logger.log(level, "%s: %s", self.path, text)
                if said is not None:
                    said.add((self.path, text))

    def chunks(self, start: int, stop: int, size: int, columns: Sequence[str] = ()) -> Iterator[GeneRows]:
        """Read cells `start` to `stop`, cut into chunks of `size` cells; the last may have fewer.

        Raises:
            ValueError: If the input cannot be read or ends too early; the message names it.
        """
        with reading(self.path):
            yield from self._cut(self.rows(start, stop, columns, _ELEMENTS_FOR_CHUNKS), start, stop, size)

    def _cut(self, read: Iterator[GeneRows], start: int, stop: int, size: int) -> Iterator[GeneRows]:
        first = at = start
        parts: list[GeneRows] = []
        for rows in read:
            last = rows.first_cell + rows.num_cells
            while at < last:
                end = min(first + size, stop)
                upto = min(end, last)
                parts.append(cut_cells(rows, at, upto))
                at = upto
                if at == end:
                    yield join_cells(parts)
                    first, parts = at, []
        if at != stop:
            raise BadInput(f"it ended after {at} of {self.num_cells} cells: it changed while it was read.")


# Number of stored elements, or of all elements of a dense matrix, that are read at once to make chunks: a few hundred
# cells, 8 MB.
_ELEMENTS_FOR_CHUNKS = 1_000_000


def cell_names(obs: "pd.DataFrame") -> list[str]:
    """Return the names of cells whose columns of obs were read with `INDEX`."""
    return obs[INDEX].astype(str).tolist()


def token_dtype(tokenizer: "TahoeX1Tokenizer") -> type[np.uint16] | type[np.int32]:
    """Return the smallest type that holds all token ids; prepared datasets use the same type."""
    return np.uint16 if len(tokenizer) <= 2**16 else np.int32


def gene_rows(
    matrix: Any, match: GeneMatch, first_cell: int | None, tokenizer: "TahoeX1Tokenizer", hint: Any = str
) -> tuple[GeneRows, float]:
    """Return the known genes of each row of a matrix with their counts.

    Args:
        matrix: `(cells, genes)` matrix, CSR, CSC or dense.
        match: Token of every column.
        first_cell: Number of the first row, for messages; None if the caller checks the values itself.
        tokenizer: Tokenizer that `match` comes from.
        hint: Function that returns advice for the error message.

    Returns:
        The rows, with every gene once per cell and in the order of the columns, and the sum of the counts of unknown
        genes.

    Raises:
        BadInput: If a value is negative, NaN or infinite, unless `first_cell` is None.
    """
    if getattr(matrix, "format", None) == "csr" and not match.num_duplicates and compilation.is_ready():
        from tahoex1_hf.cells.compiled_encoding import compacted_rows

        found = compacted_rows(matrix, match, token_dtype(tokenizer))
        if found is not None:
            return found
    rows, repeats = matrix_rows(matrix, match)
    values = matrix.data if hasattr(matrix, "tocsr") else np.asarray(matrix)
    total = float(np.asarray(values, dtype=np.float64).sum()) if match.num_unknown else 0.0
    unknown = 0.0 if not match.num_unknown else total - float(rows.counts.astype(np.float64).sum())
    rows = without_noise(rows)
    if first_cell is not None:
        check_counts(rows, first_cell, tokenizer, hint)
    rows = merge_repeats(rows) if repeats else rows
    return rows._replace(tokens=rows.tokens.astype(token_dtype(tokenizer))), unknown


def check_counts(rows: GeneRows, first_cell: int, tokenizer: "TahoeX1Tokenizer", hint: Any = str) -> None:
    """Raise BadInput if a value cannot be a count: negative, NaN or infinite."""
    problem, _ = count_problem(rows, first_cell, _GeneNames(tokenizer))
    if problem is not None:
        raise BadInput(problem + hint())


class _GeneNames(Mapping[int, str]):
    """A mapping from token id to gene that looks up a name only when a message needs it."""

    def __init__(self, tokenizer: "TahoeX1Tokenizer") -> None:
        self.tokenizer = tokenizer

    def __getitem__(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self.tokenizer.vocab_size
