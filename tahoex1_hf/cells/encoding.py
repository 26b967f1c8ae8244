# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding the cells of an input in chunks, each of which always has the same cells.

Which cells make a chunk depends on the input alone, and so does everything that is computed from them, however many
files, processes and interruptions there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from transformers.utils import logging

from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.readers.base import INDEX, Block, CellInput, token_dtype
from tahoex1_hf.encoding_tahoe_x1 import EncodedCells, GeneRows
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer, report_empty

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
    """

    tokenizer: TahoeX1Tokenizer
    drugs: str | Sequence[str | None] | None = None
    seed: int = 0


class DrugIds:
    """The drugs of an input's cells, as ids.

    Args:
        cells: the input.
        tokenizer: the tokenizer with the drug table.
        drugs: a column of obs, the drug of all cells, one per cell, or None.

    Attributes:
        columns: columns of obs that blocks must have.

    Raises:
        ValueError: where `drugs` is neither a column nor a drug, or both, or has another length than there are cells.
    """

    def __init__(self, cells: CellInput, tokenizer: TahoeX1Tokenizer, drugs: str | Sequence[str | None] | None):
        self.cells, self.tokenizer, self.drugs = cells, tokenizer, drugs
        is_column = isinstance(drugs, str) and tokenizer.is_drug_column(drugs, cells.obs_columns)
        self.columns = [str(drugs)] if is_column else []
        if drugs is not None and not isinstance(drugs, str) and len(drugs) != cells.num_cells:
            raise ValueError(f"drugs has {len(drugs)} entries for {cells.num_cells} cells: pass one per cell.")

    def of_block(self, block: Block) -> np.ndarray | None:
        """Return the drug ids of a block's cells, `(cells,)` int64; None where no drugs were given."""
        number = block.stop - block.start
        if self.drugs is None:
            return None
        if self.columns:
            return self.tokenizer.drug_ids(block.obs[self.columns[0]].tolist(), number)
        own = self.drugs if isinstance(self.drugs, str) else self.drugs[block.start : block.stop]
        return self.tokenizer.drug_ids(own, number)

    def of_cells(self, numbers: np.ndarray) -> np.ndarray | None:
        """Return the drug ids of cells, by the cells' numbers."""
        if self.drugs is None:
            return None
        if isinstance(self.drugs, str) and not self.columns:
            return self.tokenizer.drug_ids(self.drugs, len(numbers))
        return self.tokenizer.drug_ids([self._values[number] for number in numbers], len(numbers))

    @cached_property
    def _values(self) -> Sequence[str | None]:
        """The drug of each cell."""
        return self.cells.column(self.columns[0]).tolist() if self.columns else list(self.drugs or ())


class Chunk(NamedTuple):
    """Encoded cells, ready for the model: cells `start` to `start + cells.num_cells` of an input, and their names."""

    start: int
    cells: EncodedCells
    names: list[str]


class ChunkEncoder:
    """Encoder of the cells of an input; the results are the same whether compiled or not.

    Args:
        cells: the input.
        options: how its cells are encoded.
    """

    def __init__(self, cells: CellInput, options: EncodeOptions):
        self.cells, self.options = cells, options
        self.drug_ids = DrugIds(cells, options.tokenizer, options.drugs)

    def chunks(self, start: int, stop: int, names: bool = False) -> Iterator[Chunk]:
        """Encode cells `start` to `stop`, cut into chunks at the multiples of `CHUNK_CELLS`.

        Args:
            start: a multiple of `CHUNK_CELLS`.
            stop: a later multiple, or `num_cells`.
            names: whether the names of the cells are wanted.

        Raises:
            ValueError: for cells that cannot be read or encoded; the message names the input.
        """
        tokenizer = self.options.tokenizer
        compilation.start(tokenizer, token_dtype(tokenizer), self.cells.num_cells)
        columns = [*self.drug_ids.columns, *([INDEX] if names else [])]
        for block in self.cells.chunks(start, stop, CHUNK_CELLS, columns):
            labels = block.obs[INDEX].astype(str).tolist() if names else []
            yield Chunk(block.start, self.encode(block.rows, self.drug_ids.of_block(block), block.start), labels)

    def encode(self, rows: GeneRows, drug_ids: np.ndarray | None, first_cell: int) -> EncodedCells:
        """Encode cells, the first of which has the number `first_cell`."""
        tokenizer, seed = self.options.tokenizer, self.options.seed
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
                warn=logger.warning_once,
                advice=self.cells.count_hint,
            )
        report_empty(encoded)
        return encoded

    def chunk_tokens(self) -> np.ndarray:
        """Return about how many tokens each chunk has, for sharing work, or how many cells where that is unknown."""
        num_genes = self.cells.num_stored()
        starts = np.arange(0, self.cells.num_cells, CHUNK_CELLS)
        if num_genes is None:
            return np.minimum(self.cells.num_cells - starts, CHUNK_CELLS)
        longest = self.options.tokenizer.context_length
        tokens = 1 + (num_genes if longest is None else np.minimum(num_genes, longest - 1))
        return np.add.reduceat(tokens, starts) if len(tokens) else tokens
