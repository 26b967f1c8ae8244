# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding of the cells of an input in chunks that always hold the same cells.

The division into chunks depends on the input alone. The results therefore do not depend on the number of files,
processes or interruptions.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers.utils import logging

from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.readers.base import CellInput, token_dtype
from tahoex1_hf.configuration_tahoe_x1 import UNKNOWN_DRUGS
from tahoex1_hf.encoding_tahoe_x1 import GeneRows, sample_seed
from tahoex1_hf.padding_tahoe_x1 import EncodedCells, report_empty
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.get_logger(__name__)

# Number of cells that are encoded and embedded together. It is large enough to form batches of similar length on any
# device, and small enough that an interrupted run loses little.
CHUNK_CELLS = 256


@dataclass
class EncodeOptions:
    """Options for the encoding of cells.

    Attributes:
        tokenizer: Tokenizer of the model.
        drugs: Column of obs, one drug for all cells, or one drug per cell, for models with a drug encoder; None for
            no drugs.
        seed: Seed of the sampling of cells that are longer than the context.
        draws: Number of samples of each cell that is longer than the context.
        unknown_drugs: Rule for drugs that are not in the tokenizer's table: `"pad"` counts their cells as cells
            without a drug, `"error"` refuses them; by default the tokenizer's `unknown_drugs`.
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
    """The drug ids of the cells of an input.

    Drugs that are not in the table are found before any work is done. In a remote input they are found while its
    cells are read.

    Args:
        cells: Input.
        options: Options with the tokenizer and its drug table, the drugs, and the rule for unknown drugs.
        used: Numbers of the cells whose drugs are needed, by default all.

    Attributes:
        columns: Columns of obs that must be read with the cells.
        unknown: Drugs that are not in the table, with the number of cells of each; see `report_unknown_drugs`.
        is_counted: Whether `unknown` is complete from the beginning.

    Raises:
        ValueError: If `drugs` is neither a column nor a drug, if it is both, if its length differs from the number of
            cells, or if a drug is unknown and the rule is `"error"`.
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
        """Record the unknown drugs among `cells` (drug -> number of cells), or refuse them."""
        table = self.tokenizer.drug_table
        if table is None:
            raise ValueError("drugs was given, but this tokenizer has no drug table: use a drug model.")
        unknown = table.unknown(cells)
        self.unknown.update(unknown)
        if self.rule == "error":
            table.settle(unknown, self.rule)

    def _look_up(self, names: Sequence[str | None]) -> np.ndarray:
        table = self.tokenizer.drug_table
        assert table is not None  # the constructor refuses drugs without a table
        ids, unknown = table.look_up(names)
        if not self.is_counted:
            self._note(unknown)
        return ids

    def of_rows(self, rows: GeneRows) -> np.ndarray | None:
        """Return the drug ids of consecutive cells, `(cells,)` int64; None if no drugs were given."""
        if self.drugs is None:
            return None
        if self.columns:
            return self._look_up(rows.obs[self.columns[0]].tolist())
        if isinstance(self.drugs, str):
            return self.tokenizer.drug_ids(self.drugs, rows.num_cells)
        return self._look_up(self.drugs[rows.first_cell : rows.first_cell + rows.num_cells])

    def of_cells(self, numbers: np.ndarray) -> np.ndarray | None:
        """Return the drug ids of the cells with these numbers."""
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
    """Warn once about the unknown drugs of a run, with the number of cells of each in all inputs."""
    unknown = sum((each.unknown for each in drug_ids), Counter())
    table = drug_ids[0].tokenizer.drug_table if drug_ids else None
    if table is not None:
        table.settle(unknown, "pad")


class ChunkEncoder:
    """Encoder of the cells of an input; compiled loops give the same results.

    Args:
        cells: Input.
        options: Options for the encoding of its cells.
    """

    def __init__(self, cells: CellInput, options: EncodeOptions):
        self.cells, self.options = cells, options
        self.drug_ids = DrugIds(cells, options)

    def chunks(self, start: int, stop: int, columns: Sequence[str] = ()) -> Iterator[EncodedCells]:
        """Encode cells `start` to `stop` and yield them in chunks of `CHUNK_CELLS` cells.

        Args:
            start: Number of the first cell, a multiple of `CHUNK_CELLS`.
            stop: Number after the last cell, a later multiple or `num_cells`.
            columns: Columns of obs to return with the cells; `INDEX` for their names.

        Raises:
            ValueError: If cells cannot be read or encoded; the message names the input.
        """
        tokenizer = self.options.tokenizer
        compilation.start(token_dtype(tokenizer), self.cells.num_cells)
        needed = list(dict.fromkeys([*self.drug_ids.columns, *columns]))
        for rows in self.cells.chunks(start, stop, CHUNK_CELLS, needed):
            drug_ids = self.drug_ids.of_rows(rows)
            encoded = self.encode(rows, drug_ids, rows.first_cell)
            encoded.obs, encoded.samples = rows.obs[list(columns)], self._further_samples(rows, drug_ids)
            yield encoded

    def _further_samples(self, rows: GeneRows, drug_ids: np.ndarray | None) -> list[EncodedCells]:
        """Return the second and later samples of the cells longer than the context."""
        context = self.options.tokenizer.context_length
        if context is None or self.options.draws == 1:
            return []
        lengths = np.diff(rows.offsets)
        is_long = lengths > context - (1 if drug_ids is None else 2)
        long = np.flatnonzero(is_long)
        if not len(long):
            return []
        genes = rows.select(np.repeat(is_long, lengths))
        part = GeneRows(genes.tokens, genes.counts, np.concatenate([[0], np.cumsum(lengths[long])]))
        own = None if drug_ids is None else drug_ids[long]
        samples = [self.encode(part, own, rows.first_cell, number) for number in range(1, self.options.draws)]
        for sample in samples:
            sample.cell_numbers = rows.first_cell + long
        return samples

    def encode(self, rows: GeneRows, drug_ids: np.ndarray | None, first_cell: int, sample: int = 0) -> EncodedCells:
        """Encode cells.

        Args:
            rows: Genes and counts of the cells.
            drug_ids: `(cells,)` ids of their drugs; None for no drugs.
            first_cell: Number of the first of these cells in the input.
            sample: Number of the sample of each long cell, from 0.
        """
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
        """Warn once about values that are not counts, unless the check of some cells has already done so."""
        if self.cells.seen is None or self.cells.seen.doubt is None:
            logger.warning_once(text)

    def chunk_tokens(self) -> np.ndarray:
        """Return the approximate number of tokens of each chunk, or its number of cells if that is unknown.

        The numbers serve to share the work among processes.
        """
        num_genes = self.cells.num_stored()
        starts = np.arange(0, self.cells.num_cells, CHUNK_CELLS)
        if num_genes is None:
            return np.minimum(self.cells.num_cells - starts, CHUNK_CELLS)
        longest = self.options.tokenizer.context_length
        tokens = 1 + (num_genes if longest is None else np.minimum(num_genes, longest - 1))
        return np.add.reduceat(tokens, starts) if len(tokens) else tokens
