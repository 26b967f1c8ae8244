# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""First pass of preparing: a range of cells of one file becomes a piece, filtered, split and sorted by random key.

The key of a cell is a hash of the seed, the number of its file and its number there. The second pass (`shards.py`)
cuts the range of keys into shards, so the order of the dataset is a random permutation of all cells that depends on
nothing but the seed and the inputs; in a piece every shard finds its cells side by side (`piece_folder.py`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from tahoex1_hf.cells.ragged import gather_rows, row_sums
from tahoex1_hf.cells.readers.base import BadInput, token_dtype
from tahoex1_hf.cells.readers.unreadable import guarded
from tahoex1_hf.cells.rows import join_cells
from tahoex1_hf.common.texts import as_text
from tahoex1_hf.data.columns import add_joined, filter_mask, output_columns, source_columns, to_arrow
from tahoex1_hf.data.config import CommonSourceConfig, ValidationSplit
from tahoex1_hf.data.sources.base import SourceReader
from tahoex1_hf.encoding_tahoe_x1 import GeneRows, count_problem, mix64

SPLITS = ("train", "validation")
# Rules by which cells are dropped, in the order in which they are tried: a cell counts under the first that it meets.
DROP_RULES = ("filter", "duplicate_barcode", "no_known_gene", "min_genes", "min_counts")


@dataclass
class PieceStatistics:
    """Statistics of a piece, for the manifest and the second pass.

    Attributes:
        cells_in: Number of cells read.
        dropped: Number of cells left out, per rule.
        cells: Number of cells kept, per split.
        genes: Number of expressed genes of the cells kept, per split.
        counts: Sum of all counts of the cells kept.
        unknown_counts: Sum of the counts, of all cells read, of genes that are not in the vocabulary.
        max_count: The largest count kept.
        whole_numbers: Whether all counts kept are integers.
        join_misses: Number of cells for which a joined table had no row.
    """

    cells_in: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROP_RULES, 0))
    cells: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    genes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    counts: float = 0.0
    unknown_counts: float = 0.0
    max_count: float = 0.0
    whole_numbers: bool = True
    join_misses: int = 0


class PieceRange(NamedTuple):
    """Cells `start` to `stop` of a file: its number in the whole list of files, and its path."""

    file_number: int
    path: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the piece."""
        return f"{self.file_number:06d}-{self.start:012d}"


def cell_keys(seed: int, file_number: int, numbers: np.ndarray) -> np.ndarray:
    """Return uint64 random keys for cells of one file, given by their numbers."""
    stream = mix64(mix64(np.array([seed], dtype=np.uint64)) + np.uint64(file_number))
    return mix64(stream + numbers.astype(np.uint64))


def held_out(keys: np.ndarray, metadata: pd.DataFrame, split: ValidationSplit, seed: int) -> np.ndarray:
    """Return which cells are for validation, as one bool per cell."""
    if split.by is None:
        # Another hash, so that the validation cells are spread evenly over the keys.
        return mix64(keys ^ np.uint64(0x7661_6C69_6461_7465)) < np.uint64(int(split.share * 2**64))
    values = as_text(metadata[split.by])
    if split.values is not None:
        return values.isin(split.values).to_numpy()
    chosen = {value: _fraction(seed, value) < split.share for value in values.unique()}
    return values.map(chosen).to_numpy(dtype=bool)


def _fraction(seed: int, value: str) -> float:
    digest = hashlib.sha256(f"{seed}\n{value}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def make_batches(
    piece: PieceRange,
    source: SourceReader,
    config: CommonSourceConfig,
    split: ValidationSplit,
    seed: int,
    duplicates: np.ndarray,
) -> tuple[list[pa.RecordBatch], PieceStatistics]:
    """Read, filter and sort the cells of a piece.

    Args:
        piece: Range of cells to read.
        source: Source that reads the cells.
        config: Configuration of the source.
        split: Settings of the validation split.
        seed: Seed of the dataset.
        duplicates: Sorted numbers of the cells of the file that repeat another's name.

    Returns:
        A batch for each of `SPLITS`, with `key`, `genes`, `counts` and the metadata; and the statistics.

    Raises:
        BadInput: If the cells cannot be used.
    """
    statistics = PieceStatistics()
    parts: list[tuple[GeneRows, np.ndarray]] = []
    number = piece.start
    for chunk in guarded(source.read(piece.path, piece.start, piece.stop, source_columns(config))):
        numbers = np.arange(number, number + len(chunk.obs))
        parts.append(_kept(chunk, numbers, config, duplicates, statistics, source))
        number += len(numbers)
    if number != piece.stop:
        raise BadInput(f"{number - piece.start} cells were read instead of {piece.stop - piece.start}.")
    rows = join_cells([each for each, _ in parts])
    metadata, numbers = rows.obs.reset_index(drop=True), np.concatenate([each for _, each in parts])
    del parts
    keys = cell_keys(seed, piece.file_number, numbers)
    validation = held_out(keys, metadata, split, seed)
    narrow = statistics.whole_numbers and statistics.max_count < 2**16
    # Dictionaries are made once for both splits, since an Arrow file has one dictionary per column.
    columns = {name: to_arrow(metadata[name]) for name in metadata.columns}
    batches = []
    for name, chosen in zip(SPLITS, (~validation, validation), strict=True):
        order = np.flatnonzero(chosen)
        order = order[np.argsort(keys[order], kind="stable")]
        batch = _batch(rows, columns, keys, order, np.uint16 if narrow else np.float32)
        statistics.cells[name] = len(order)
        statistics.genes[name] = int(np.diff(rows.offsets)[order].sum())
        batches.append(batch)
    return batches, statistics


def _kept(
    chunk: GeneRows,
    numbers: np.ndarray,
    config: CommonSourceConfig,
    duplicates: np.ndarray,
    statistics: PieceStatistics,
    source: SourceReader,
) -> tuple[GeneRows, np.ndarray]:
    """Return the cells of a chunk that no rule drops, with their metadata, and their numbers."""
    metadata, misses = add_joined(chunk.obs, config)
    lengths = np.diff(chunk.offsets)
    sums = row_sums(chunk.counts, chunk.offsets)
    drops = {
        "filter": np.zeros(len(lengths), dtype=bool) if not config.filter else ~filter_mask(metadata, config.filter),
        "duplicate_barcode": np.isin(numbers, duplicates),
        "no_known_gene": lengths == 0,
        "min_genes": lengths < config.min_genes,
        "min_counts": sums < config.min_counts,
    }
    keep = np.ones(len(lengths), dtype=bool)
    for rule in DROP_RULES:
        statistics.dropped[rule] += int((keep & drops[rule]).sum())
        keep &= ~drops[rule]
    statistics.cells_in += len(lengths)
    statistics.unknown_counts += chunk.unknown_counts
    statistics.join_misses += misses
    kept = chunk.select(np.repeat(keep, lengths)) if not keep.all() else chunk
    kept = GeneRows(kept.tokens, kept.counts, np.concatenate([[0], np.cumsum(lengths[keep])]))
    _, doubt = count_problem(kept, int(numbers[0]) if len(numbers) else 0, {})
    if doubt is not None:
        statistics.whole_numbers = False
        if config.non_integer_counts == "error":
            raise BadInput(f"{doubt} Name the layer that holds counts, or set non_integer_counts: keep.")
    statistics.counts += float(kept.counts.sum(dtype=np.float64))
    statistics.max_count = max(statistics.max_count, float(kept.counts.max(initial=0)))
    tokens = kept.tokens.astype(token_dtype(source.tokenizer), copy=False)
    metadata = output_columns(metadata[keep], config)
    return GeneRows(tokens, kept.counts, kept.offsets, obs=metadata), numbers[keep]


def _batch(
    rows: GeneRows, columns: dict[str, pa.Array], keys: np.ndarray, order: np.ndarray, counts_dtype: type[np.generic]
) -> pa.RecordBatch:
    lengths = np.diff(rows.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    genes = np.empty(offsets[-1], dtype=rows.tokens.dtype)
    counts = np.empty(offsets[-1], dtype=counts_dtype)
    gather_rows(rows.tokens, rows.offsets[order], lengths, genes)
    gather_rows(rows.counts, rows.offsets[order], lengths, counts)
    arrow_offsets = pa.array(offsets.astype(np.int32))
    arrays = {
        "key": pa.array(keys[order]),
        "genes": pa.ListArray.from_arrays(arrow_offsets, pa.array(genes)),
        "counts": pa.ListArray.from_arrays(arrow_offsets, pa.array(counts)),
    }
    taken = {name: column.take(pa.array(order)) for name, column in columns.items()}
    return pa.RecordBatch.from_pydict({**arrays, **taken})


def piece_ranges(file_number: int, path: str, num_cells: int, piece_cells: int) -> Iterator[PieceRange]:
    """Cut the cells of a file into pieces."""
    for start in range(0, num_cells, piece_cells):
        yield PieceRange(file_number, path, start, min(start + piece_cells, num_cells))
