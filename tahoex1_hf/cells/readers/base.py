# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What all inputs of cells have in common: known genes and counts, columns of obs, and errors."""

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.counts import without_noise
from tahoex1_hf.cells.errors import BadInput
from tahoex1_hf.cells.fingerprint import agrees
from tahoex1_hf.cells.gene_search import FoundGenes
from tahoex1_hf.cells.looking import MUCH, Seen, look
from tahoex1_hf.common.reading import reading
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, count_problem, matrix_rows, merge_repeats

if TYPE_CHECKING:
    import pandas as pd

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

INDEX = "_index"
"""Name under which the names of the cells (`obs_names`, barcodes) are asked for as a column."""

# Number of stored elements of a sparse matrix, or of places of a dense one, that are read at once by default: about
# 100 MB with the arrays that are made from them on the way.
CHUNK_ELEMENTS = 4_000_000


class Block(NamedTuple):
    """Some consecutive cells of an input.

    Attributes:
        start: number of the first cell in the input.
        rows: expressed genes of the vocabulary, each once per cell: token ids, float32 counts above zero, offsets.
        obs: one row per cell, the columns that were asked for.
        unknown_counts: sum of the counts of genes that are not in the vocabulary.
    """

    start: int
    rows: GeneRows
    obs: "pd.DataFrame"
    unknown_counts: float

    @property
    def stop(self) -> int:
        """Number behind the last cell."""
        return self.start + len(self.rows.offsets) - 1

    def part(self, start: int, stop: int) -> "Block":
        """Return cells `start` to `stop` of the input, which the block holds, without the sum of unknown counts."""
        if (start, stop) == (self.start, self.stop):
            return self
        a, b = start - self.start, stop - self.start
        low, high = self.rows.offsets[a], self.rows.offsets[b]
        rows = GeneRows(self.rows.tokens[low:high], self.rows.counts[low:high], self.rows.offsets[a : b + 1] - low)
        return Block(start, rows, self.obs.iloc[a:b], 0.0)


class CellInput(ABC):
    """The cells of one file, store, prepared dataset or AnnData, with its genes and counts found.

    Attributes:
        path: where the cells come from, for messages.
        tokenizer: the tokenizer whose vocabulary says which genes are known.
        num_cells: number of cells.
        genes: the token of each gene of the input; None for a prepared dataset, whose genes are tokens.
        fingerprint: text that changes when the content does; empty for an AnnData.
        by_gene: whether the counts are stored by gene, so that `sort_by_cell` is needed before `blocks`.
        found: how the genes were found; None for a dataset with a table of genes of its own.
        seen: what `look` saw of some cells; None before.
        counts_from: where the counts are: `X`, a layer or `raw`.
        own_genes: whether the genes are those of `var`, in its order; those of `raw` can be others.
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
        """Names of the columns of obs; `INDEX` is not among them."""

    @abstractmethod
    def column(self, name: str) -> "pd.Series":
        """Return a column of obs, or with `INDEX` the names of the cells, of all cells.

        Raises:
            BadInput: for a column that is not there.
        """

    def value_counts(self, name: str) -> "Counter[Any]":
        """Count the cells of each value of a column of obs, missing values among them."""
        return Counter(dict(self.column(name).astype(object).value_counts(dropna=False)))

    @abstractmethod
    def blocks(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[Block]:
        """Read cells `start` to `stop` in order, in blocks of bounded memory.

        Args:
            start: number of the first cell.
            stop: number behind the last cell.
            columns: columns of obs that the blocks are to have; `INDEX` for the names of the cells.
            elements: approximate upper limit of the stored counts of a block; `CHUNK_ELEMENTS` by default.

        Raises:
            BadInput: where the counts cannot be read, or a column is not there.
        """

    @property
    def var(self) -> "pd.DataFrame":
        """The table of the genes, by name."""
        raise BadInput("it has no table of genes: write it to an .h5ad file.")

    def check_gene_slots(self) -> None:
        """Raise ValueError where values for each gene would not fit into `varm`, before any work is done."""
        if not self.own_genes:
            raise ValueError(
                f"{self.path}: the counts are those of raw, whose genes are not those of var, so that varm cannot "
                "hold gene embeddings of them: take adata.raw.to_adata()."
            )

    def rows_at(self, numbers: np.ndarray) -> GeneRows:
        """Return some cells by their numbers, which must rise; their values are not checked."""
        raise BadInput("its cells can only be read in order: write them to an .h5ad file.")

    def num_stored(self) -> np.ndarray | None:
        """Return the number of stored counts of each cell, `(cells,)`, or None where it is not known beforehand."""
        return None

    def fingerprint_now(self) -> str:
        """Return the fingerprint of what is there now, which `fingerprint` was when the input was opened."""
        return self.fingerprint

    def check_unchanged(self) -> None:
        """Look whether the input is still what was opened.

        Raises:
            ValueError: where it is not: what was read of it would not fit what is there.
        """
        try:
            same = agrees(self.fingerprint, self.fingerprint_now())
        except FileNotFoundError:
            same = False
        if not same:
            raise ValueError(
                f"{self.path} has changed since it was opened, so that results would stand beside other cells: "
                "nothing is written. Run again with the file as it is to be (--restart, where an unfinished run is in "
                "the way)."
            )

    def check(self) -> None:  # noqa: B027 - most inputs have nothing more to look at
        """Check the index of the counts, for which all of it must be read.

        Raises:
            BadInput: where it does not fit the counts.
        """

    def sort_by_cell(self, piece_cells: int = 16384) -> None:  # noqa: B027 - most inputs have nothing to do
        """Sort counts that are stored by gene, once, on disk; `piece_cells` cells are sorted at a time."""

    def count_hint(self) -> str:
        """Return where the input seems to keep raw counts, as advice."""
        return " Pass the raw counts."

    def some_matrices(self) -> Iterator[Any]:
        """Read the values of some cells, see `looking.places_to_look`."""
        raise NotImplementedError

    def look(self) -> None:
        """Look at some cells: say once what is lost with unknown genes, and what the values look like if not counts.

        Counts that are stored by gene are looked at when they are sorted.

        Raises:
            BadInput: where the cells cannot be read.
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
        if os.environ.get("RANK", "0") == "0":  # of the processes of a run, the first
            for level, text in notes:
                logger.log(level, "%s: %s", self.path, text)

    def chunks(self, start: int, stop: int, size: int, columns: Sequence[str] = ()) -> Iterator[Block]:
        """Read cells `start` to `stop`, cut into chunks of `size` cells; the last may have fewer.

        Raises:
            ValueError: where the input cannot be read, or ends too early; the message names it.
        """
        with reading(self.path):
            yield from self._cut(self.blocks(start, stop, columns, BLOCK_ELEMENTS), start, stop, size)

    def _cut(self, blocks: Iterator[Block], start: int, stop: int, size: int) -> Iterator[Block]:
        first = at = start
        parts: list[Block] = []
        for block in blocks:
            while at < block.stop:
                end = min(first + size, stop)
                upto = min(end, block.stop)
                parts.append(block.part(at, upto))
                at = upto
                if at == end:
                    yield joined(parts)
                    first, parts = at, []
        if at != stop:
            raise BadInput(f"it ended after {at} of {self.num_cells} cells: it changed while it was read.")


# Number of stored elements, or of places of a dense matrix, that are read at once where chunks are cut: a few hundred
# cells, 8 MB.
BLOCK_ELEMENTS = 1_000_000


def joined(blocks: Sequence[Block]) -> Block:
    """Join consecutive blocks."""
    if len(blocks) == 1:
        return blocks[0]
    import pandas as pd

    lengths = np.concatenate([np.diff(block.rows.offsets) for block in blocks])
    rows = GeneRows(
        np.concatenate([block.rows.tokens for block in blocks]),
        np.concatenate([block.rows.counts for block in blocks]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )
    obs = pd.concat([block.obs for block in blocks])
    return Block(blocks[0].start, rows, obs, sum(block.unknown_counts for block in blocks))


def token_dtype(tokenizer: "TahoeX1Tokenizer") -> type[np.uint16] | type[np.int32]:
    """Return the smallest type that holds all token ids: that of a prepared dataset."""
    return np.uint16 if len(tokenizer) <= 2**16 else np.int32


def gene_rows(
    matrix: Any, match: GeneMatch, first_cell: int | None, tokenizer: "TahoeX1Tokenizer", hint: Any = str
) -> tuple[GeneRows, float]:
    """Return the known genes and the counts of the rows of a matrix, sparse or dense.

    Args:
        matrix: `(cells, genes)`, CSR, CSC or dense.
        match: the token of every column.
        first_cell: number of the first row, for messages; None to leave values that are not counts to the caller.
        tokenizer: the tokenizer that `match` comes from.
        hint: function that returns advice for where the values cannot be counts.

    Returns:
        The rows, every gene once per cell in the order of the columns, and the sum of the counts of unknown genes.

    Raises:
        BadInput: for negative, NaN and infinite values.
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
    """Raise BadInput for values that cannot be counts: negative, NaN, infinite."""
    problem, _ = count_problem(rows, first_cell, _GeneNames(tokenizer))
    if problem is not None:
        raise BadInput(problem + hint())


class _GeneNames(Mapping[int, str]):
    """Token id -> gene, looked up only where a message needs it."""

    def __init__(self, tokenizer: "TahoeX1Tokenizer") -> None:
        self.tokenizer = tokenizer

    def __getitem__(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self.tokenizer.vocab_size
