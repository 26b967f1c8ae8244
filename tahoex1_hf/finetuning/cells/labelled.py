# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cells of a file with their labels, for training in any order; they are read once and encoded batch by batch.

The counts of the genes that the model knows are copied into a temporary file, from which any cell can be read at
once, since files of cells are compressed in large pieces, or sorted by gene. A copy takes 8 bytes per expressed gene
on disk, and no memory except the system's cache.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.cells.encoding import CHUNK_CELLS, DrugIds, EncodeOptions, report_unknown_drugs
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import open_cells, read_obs_column
from tahoex1_hf.cells.ragged import RowViews
from tahoex1_hf.cells.readers.base import INDEX, CellInput
from tahoex1_hf.cells.rows import pick_cells
from tahoex1_hf.common.texts import as_text
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.encoding_tahoe_x1 import GeneRows, content_numbers, count_problem, mix64
from tahoex1_hf.finetuning.cells.labels import class_labels, group_names, number_labels
from tahoex1_hf.finetuning.config import (
    ClassesConfig,
    ClassificationConfig,
    FinetuneConfig,
    MaskedExpressionConfig,
    RegressionConfig,
)
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

# Seed that samples the genes of cells longer than the context, in training and in `tahoex1 predict`.
SAMPLE_SEED = 0
_ENCODED_CELLS = 256  # cells encoded at a time, outside of training


def store_counts(source: CellInput, drugs_of: DrugIds, folder: Path) -> tuple[GeneRows, np.ndarray | None]:
    """Copy the counts of all cells of a file to arrays on disk.

    The genes of a cell are sorted by token id, so that what is learnt does not depend on the order of a file's genes.

    Args:
        source: Cells, sorted by cell.
        drugs_of: Drugs of the cells.
        folder: Folder for the arrays, which disappear with the process.

    Returns:
        The cells in the order of the file, with int32 tokens and float32 counts; and their drugs, shape `(cells,)`,
        int64, or None without drugs.
    """
    # These files have no name in the folder, so they disappear when the process ends, however it ends.
    with tempfile.TemporaryFile(dir=folder) as tokens, tempfile.TemporaryFile(dir=folder) as counts:
        lengths, drugs = [np.zeros(0, dtype=np.int64)], list[np.ndarray | None]()
        warned = False
        for chunk in source.chunks(0, source.num_cells, CHUNK_CELLS, drugs_of.columns):
            rows = _sorted_by_token(chunk)
            rows.tokens.astype(np.int32).tofile(tokens)
            rows.counts.astype(np.float32).tofile(counts)
            lengths.append(np.diff(rows.offsets))
            drugs.append(drugs_of.of_rows(chunk))
            warning = None if warned else count_problem(rows, chunk.first_cell, {})[1]
            if warning is not None:
                logger.warning("%s: %s", source.path, warning)
                warned = True
        empty = np.flatnonzero(np.concatenate(lengths) == 0)
        if len(empty):
            logger.warning(
                "%s: %d of %d cells express no gene of the vocabulary (the first: %s).",
                source.path,
                len(empty),
                source.num_cells,
                empty[:5].tolist(),
            )
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        size = int(offsets[-1])
        stored = GeneRows(_mapped(tokens, np.int32, size), _mapped(counts, np.float32, size), offsets)
    given = [ids for ids in drugs if ids is not None]
    return stored, np.concatenate(given) if given else None


def _sorted_by_token(rows: GeneRows) -> GeneRows:
    cells = rows.cells()
    if ((rows.tokens[1:] > rows.tokens[:-1]) | (cells[1:] > cells[:-1])).all():
        return rows
    order = np.lexsort((rows.tokens, cells))
    return GeneRows(rows.tokens[order], rows.counts[order], rows.offsets)


def _mapped(file: Any, dtype: type, size: int) -> np.ndarray:
    file.flush()
    return np.memmap(file, dtype=dtype, mode="r", shape=(size,)) if size else np.zeros(0, dtype=dtype)


@dataclass(eq=False)
class FinetuningData:
    """The data of a fine-tuning run: counts and labels of the cells to learn from.

    A row is a number among these cells, 0 to `len - 1`.

    Attributes:
        stored: Counts of all cells of the file, on disk.
        drug_ids: Drugs of all cells of the file, shape `(cells of the file,)`, int64; None without drugs.
        tokenizer: Tokenizer of the model.
        numbers: Number of each cell in the file, rising, shape `(cells,)`.
        labels: Classes (int64) or numbers (float64), shape `(cells,)`; None without labels.
        classes: Names of the classes; None for numbers.
        groups: Names of the cells' groups, shape `(cells,)`; None without groups.
        parts: `"train"`, `"validation"` or `"test"` for each cell, shape `(cells,)`, where a column says so.
        names: Names of the cells, shape `(cells,)`.
        fingerprint: Text that changes when the file does.
    """

    stored: GeneRows
    drug_ids: np.ndarray | None
    tokenizer: TahoeX1Tokenizer
    numbers: np.ndarray
    labels: np.ndarray | None
    classes: list[str] | None
    groups: np.ndarray | None
    parts: np.ndarray | None
    names: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each cell, shape `(cells,)`, int64."""
        genes = np.diff(self.stored.offsets)[self.numbers]
        special = 1 if self.drug_ids is None else 2
        room = self.tokenizer.context_length
        return genes + special if room is None else np.minimum(genes + special, room)

    def rows_at(self, numbers: np.ndarray) -> GeneRows:
        """Return the genes and counts of the cells with these numbers in the file."""
        rows = pick_cells(self.stored, numbers)
        return rows._replace(tokens=rows.tokens.astype(np.int64))

    def encoded(self, rows: np.ndarray) -> EncodedCells:
        """Encode cells; the result for a cell depends neither on the other cells nor on its place in the file."""
        numbers = self.numbers[rows]
        return self.tokenizer.encode_rows(
            self.rows_at(numbers),
            drug_ids=None if self.drug_ids is None else self.drug_ids[numbers],
            seed=SAMPLE_SEED,
            warn=lambda _: None,  # warnings were given when the cells were read
        )

    def encoded_chunks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, EncodedCells]]:
        """Yield parts of `rows` and their encoded cells, for cells that do not fit into memory together."""
        for start in range(0, len(rows), _ENCODED_CELLS):
            part = rows[start : start + _ENCODED_CELLS]
            yield part, self.encoded(part)

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the arguments of a model for some cells, padded, with `labels` where they have any."""
        tokenizer = self.tokenizer
        pad_id = tokenizer.get_vocab()[str(tokenizer.pad_token)]
        batch = self.encoded(rows).padded(pad_token_id=pad_id, pad_value=tokenizer.pad_value)
        if self.labels is not None:
            labels = self.labels[rows]
            batch["labels"] = torch.from_numpy(labels if labels.dtype.kind == "i" else labels.astype(np.float32))
        return batch

    def masked_batch(self, collator: CellCollator, rows: np.ndarray, seed: int, epoch: int) -> dict[str, Any]:
        """Return the arguments of a model for cells with masked genes, by seed, epoch and the cell's counts alone."""
        numbers = self.numbers[rows]
        key = mix64(mix64(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
        streams = mix64(key + content_numbers(self.rows_at(numbers)))
        drugs = None
        if collator.drug_token:
            drugs = np.zeros(len(rows), np.int64) if self.drug_ids is None else self.drug_ids[numbers]
        return collator.collate([(np.arange(len(rows)), RowViews.of(self.stored, numbers))], streams, drugs)

    def contents(self) -> np.ndarray:
        """Return numbers that are equal for cells with the same counts, shape `(cells,)`."""
        parts = [np.zeros(0, dtype=np.uint64)]
        for start in range(0, len(self), _ENCODED_CELLS):
            rows = self.rows_at(self.numbers[start : start + _ENCODED_CELLS])
            # `content_numbers`, of which a few in millions of cells may be equal by chance, would not do here.
            hashes = mix64((rows.tokens.astype(np.uint64) << np.uint64(32)) | rows.counts.view(np.uint32))
            sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(hashes)])
            parts.append(sums[rows.offsets[1:]] - sums[rows.offsets[:-1]])
        return np.concatenate(parts)

    def csr(self) -> Any:
        """Return the counts of all known genes as a `(cells, vocabulary)` CSR matrix, a column per token."""
        from scipy.sparse import csr_matrix

        rows = self.rows_at(self.numbers)
        return csr_matrix((rows.counts, rows.tokens, rows.offsets), shape=(len(self), len(self.tokenizer)))


def read_cells(config: FinetuneConfig, tokenizer: TahoeX1Tokenizer, folder: Path) -> FinetuningData:
    """Read the cells of a run: first the columns of obs, where most errors are, then the counts.

    Args:
        config: Configuration of the run.
        tokenizer: Tokenizer of the base.
        folder: Folder for temporary files.

    Raises:
        FileNotFoundError: For a path that does not exist.
        ValueError: For a file, a column or counts that cannot be used.
    """
    if not Path(config.data).exists():
        raise FileNotFoundError(f"data={config.data} does not exist.")
    labels = classes = rows = None
    if isinstance(config, ClassificationConfig | RegressionConfig):
        column = read_obs_column(config.data, config.label, "label")
        found = (
            class_labels(column, config)
            if isinstance(config, ClassificationConfig)
            else number_labels(column, config.label)
        )
        labels, classes, rows = found.values, found.classes, found.rows
    options = GeneOptions(
        config.gene_id_column,
        config.gene_symbols,
        config.layer,
        species=config.species,
        orthologs=config.orthologs,
    )
    encoding = EncodeOptions(tokenizer)
    if isinstance(config, ClassesConfig | RegressionConfig | MaskedExpressionConfig):
        encoding = EncodeOptions(tokenizer, config.drugs, unknown_drugs=config.unknown_drugs)
    with tempfile.TemporaryDirectory(dir=folder) as spool:
        source = open_cells(config.data, tokenizer, options, spool=spool)
        rows = np.arange(source.num_cells) if rows is None else rows
        groups = parts = None
        group = split = None
        if isinstance(config, ClassificationConfig | RegressionConfig | MaskedExpressionConfig):
            group, split = config.group, config.split
        if group is not None:
            groups = group_names(read_obs_column(config.data, group, "group"), rows, group)
        if split is not None:
            column = read_obs_column(config.data, split, "split")
            parts = as_text(column.iloc[rows]).to_numpy(dtype=object)
        source.sort_by_cell()
        drug_ids = DrugIds(source, encoding, rows)
        report_unknown_drugs([drug_ids])
        stored, drugs = store_counts(source, drug_ids, folder)
    try:
        names = read_obs_column(config.data, INDEX, "name").astype(str).to_numpy(dtype=object)[rows]
    except ValueError:  # other files than AnnData have no names that can be read alone
        names = np.array([str(row) for row in rows], dtype=object)
    source.check_unchanged()
    return FinetuningData(
        stored, drugs, tokenizer, rows, labels, classes, groups, parts, names, fingerprint=source.fingerprint
    )
