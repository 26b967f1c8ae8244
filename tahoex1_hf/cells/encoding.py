# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding the cells of an input in chunks, each of which always has the same cells.

Which cells make a chunk depends on the input alone, and so does everything that is computed from them, however many
files, processes and interruptions there are.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers.utils import logging

from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.readers.base import INDEX, Block, CellInput, token_dtype
from tahoex1_hf.configuration_tahoe_x1 import UNKNOWN_DRUGS
from tahoex1_hf.encoding_tahoe_x1 import GeneRows, sample_seed
from tahoex1_hf.padding_tahoe_x1 import EncodedCells, report_empty
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    import pandas as pd

logger = logging.get_logger(__name__)

# Number of cells encoded, and embedded, at a time: enough for batches of similar length on any device, few enough that
# little is lost where a run is interrupted.
CHUNK_CELLS = 256


@dataclass
class EncodeOptions:
    """How cells are encoded.

    Attributes:
        tokenizer: the tokenizer of the model.
        drugs: for models with a drug encoder: a column of obs, the drug of all cells, or one per cell.
        seed: seed of the sampling of cells longer than the context.
        draws: number of samples of each cell that is longer than the context.
        unknown_drugs: `"pad"` or `"error"`, what becomes of drugs that the tokenizer's table lacks; by default the
            tokenizer's `unknown_drugs`.
    """

    tokenizer: TahoeX1Tokenizer
    drugs: str | Sequence[str | None] | None = None
    seed: int = 0
    unknown_drugs: str | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        if self.unknown_drugs not in (None, *UNKNOWN_DRUGS):
            raise ValueError(f"unknown_drugs={self.unknown_drugs!r}: pass one of {UNKNOWN_DRUGS}.")
        if self.draws < 1:
            raise ValueError(f"draws={self.draws}: pass the number of samples of a cell, at least 1.")
        if self.draws > 1 and self.tokenizer.overflow != "sample":
            raise ValueError(
                f"draws={self.draws} averages random samples, and overflow={self.tokenizer.overflow!r} takes none: "
                'pass overflow="sample" (--overflow sample), or leave draws out.'
            )


class DrugIds:
    """The drugs of an input's cells, as ids.

    Drugs that the table lacks are found before any work is done; those of a remote input, as its cells are read.

    Args:
        cells: the input.
        options: tokenizer with the drug table; a column of obs, the drug of all cells, one per cell, or None; and what
            becomes of unknown drugs.
        used: numbers of the cells whose drugs matter, by default all.

    Attributes:
        columns: columns of obs that blocks must have.
        unknown: drugs that the table lacks, and their numbers of cells. `report_unknown_drugs` tells of them.
        is_counted: whether `unknown` is complete from the beginning.

    Raises:
        ValueError: where `drugs` is neither a column nor a drug, or both, or has another length than there are cells;
            and for unknown drugs, with the rule `"error"`.
    """

    def __init__(self, cells: CellInput, options: EncodeOptions, used: np.ndarray | None = None):
        tokenizer, drugs = options.tokenizer, options.drugs
        self.cells, self.tokenizer, self.drugs = cells, tokenizer, drugs
        self.rule = options.unknown_drugs or tokenizer.unknown_drugs
        is_column = isinstance(drugs, str) and tokenizer.is_drug_column(drugs, cells.obs_columns)
        self.columns = [str(drugs)] if is_column else []
        self.unknown: Counter[str] = Counter()
        self.is_counted = not (is_column and "://" in cells.path)
        if drugs is None:
            return
        if isinstance(drugs, str) and not is_column:
            tokenizer.drug_ids(drugs, 1)
            return
        if not is_column and len(drugs) != cells.num_cells:
            raise ValueError(f"drugs has {len(drugs)} entries for {cells.num_cells} cells: pass one per cell.")
        if used is not None:
            self._note(Counter(self._values[number] for number in used))
        elif self.is_counted:
            self._note(cells.value_counts(self.columns[0]) if is_column else Counter(drugs))

    def _note(self, cells: Mapping[Any, int]) -> None:
        """Note the unknown drugs of some cells, drug -> number of cells, or refuse them."""
        table = self.tokenizer.drug_table
        if table is None:
            raise ValueError("drugs was given, but this tokenizer has no drug table: use a drug model.")
        unknown = table.unknown(cells)
        self.unknown.update(unknown)
        if self.rule == "error":
            table.settle(unknown, self.rule)

    def _look_up(self, names: Sequence[str | None]) -> np.ndarray:
        table = self.tokenizer.drug_table
        assert table is not None  # else the constructor has refused the drugs
        ids, unknown = table.look_up(names)
        if not self.is_counted:
            self._note(unknown)
        return ids

    def of_block(self, block: Block) -> np.ndarray | None:
        """Return the drug ids of a block's cells, `(cells,)` int64; None where no drugs were given."""
        if self.drugs is None:
            return None
        if self.columns:
            return self._look_up(block.obs[self.columns[0]].tolist())
        if isinstance(self.drugs, str):
            return self.tokenizer.drug_ids(self.drugs, block.stop - block.start)
        return self._look_up(self.drugs[block.start : block.stop])

    def of_cells(self, numbers: np.ndarray) -> np.ndarray | None:
        """Return the drug ids of cells, by the cells' numbers."""
        if self.drugs is None:
            return None
        if isinstance(self.drugs, str) and not self.columns:
            return self.tokenizer.drug_ids(self.drugs, len(numbers))
        return self._look_up([self._values[number] for number in numbers])

    @cached_property
    def _values(self) -> Sequence[str | None]:
        """The drug of each cell."""
        return self.cells.column(self.columns[0]).tolist() if self.columns else list(self.drugs or ())


def report_unknown_drugs(drug_ids: Sequence[DrugIds]) -> None:
    """Warn once of the unknown drugs of a run, with the numbers of their cells in all of its inputs."""
    unknown = sum((each.unknown for each in drug_ids), Counter())
    table = drug_ids[0].tokenizer.drug_table if drug_ids else None
    if table is not None:
        table.settle(unknown, "pad")


class Chunk(NamedTuple):
    """Encoded cells, ready for the model.

    Attributes:
        start: number of the first cell in the input.
        cells: the cells.
        names: their names, where wanted.
        long: rows of the cells longer than the context, where more samples of them are wanted.
        samples: these further samples, each of the long cells.
        obs: columns of obs that were asked for.
    """

    start: int
    cells: EncodedCells
    names: list[str]
    long: np.ndarray
    samples: list[EncodedCells]
    obs: "pd.DataFrame"


class ChunkEncoder:
    """Encoder of the cells of an input; the results are the same whether compiled or not.

    Args:
        cells: the input.
        options: how its cells are encoded.
    """

    def __init__(self, cells: CellInput, options: EncodeOptions):
        self.cells, self.options = cells, options
        self.drug_ids = DrugIds(cells, options)

    def chunks(self, start: int, stop: int, names: bool = False, obs: Sequence[str] = ()) -> Iterator[Chunk]:
        """Encode cells `start` to `stop`, cut into chunks at the multiples of `CHUNK_CELLS`.

        Args:
            start: a multiple of `CHUNK_CELLS`.
            stop: a later multiple, or `num_cells`.
            names: whether the names of the cells are wanted.
            obs: columns of obs that are wanted.

        Raises:
            ValueError: for cells that cannot be read or encoded; the message names the input.
        """
        tokenizer = self.options.tokenizer
        compilation.start(tokenizer, token_dtype(tokenizer), self.cells.num_cells)
        columns = list(dict.fromkeys([*self.drug_ids.columns, *([INDEX] if names else []), *obs]))
        for block in self.cells.chunks(start, stop, CHUNK_CELLS, columns):
            labels = block.obs[INDEX].astype(str).tolist() if names else []
            drug_ids = self.drug_ids.of_block(block)
            encoded = self.encode(block.rows, drug_ids, block.start)
            yield Chunk(block.start, encoded, labels, *self._further_samples(block, drug_ids), block.obs[list(obs)])

    def _further_samples(self, block: Block, drug_ids: np.ndarray | None) -> tuple[np.ndarray, list[EncodedCells]]:
        """Return the rows of long cells, and their second sample and those after it."""
        context, rows = self.options.tokenizer.context_length, block.rows
        if context is None or self.options.draws == 1:
            return np.zeros(0, dtype=np.int64), []
        lengths = np.diff(rows.offsets)
        is_long = lengths > context - (1 if drug_ids is None else 2)
        long = np.flatnonzero(is_long)
        genes = rows.select(np.repeat(is_long, lengths))
        part = GeneRows(genes.tokens, genes.counts, np.concatenate([[0], np.cumsum(lengths[long])]))
        own = None if drug_ids is None else drug_ids[long]
        return long, [self.encode(part, own, block.start, number) for number in range(1, self.options.draws)]

    def encode(self, rows: GeneRows, drug_ids: np.ndarray | None, first_cell: int, sample: int = 0) -> EncodedCells:
        """Encode cells, the first of which has the number `first_cell`; of several samples, the one with a number."""
        tokenizer, seed = self.options.tokenizer, sample_seed(self.options.seed, sample)
        encoded = None
        if compilation.is_ready():
            from tahoex1_hf.cells.compiled_encoding import encode_compiled

            encoded = encode_compiled(tokenizer, rows, drug_ids, first_cell, seed)
        if encoded is None:
            encoded = tokenizer.encode_rows(
                rows,
                drug_ids=drug_ids,
                first_cell=first_cell,
                seed=seed,
                warn=self._warn,
                advice=self.cells.count_hint,
            )
        report_empty(encoded)
        return encoded

    def _warn(self, text: str) -> None:
        """Warn once of values that are no counts, where the look at some cells has not done so."""
        if self.cells.seen is None or self.cells.seen.doubt is None:
            logger.warning_once(text)

    def chunk_tokens(self) -> np.ndarray:
        """Return about how many tokens each chunk has, for sharing work, or how many cells where that is unknown."""
        num_genes = self.cells.num_stored()
        starts = np.arange(0, self.cells.num_cells, CHUNK_CELLS)
        if num_genes is None:
            return np.minimum(self.cells.num_cells - starts, CHUNK_CELLS)
        longest = self.options.tokenizer.context_length
        tokens = 1 + (num_genes if longest is None else np.minimum(num_genes, longest - 1))
        return np.add.reduceat(tokens, starts) if len(tokens) else tokens
