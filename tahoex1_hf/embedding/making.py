# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Making of shards: encoded chunks go through the model, and their embeddings are put together."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tahoex1_hf.cells import encoding
from tahoex1_hf.cells.readers.base import INDEX, CellInput, cell_names
from tahoex1_hf.common.free_memory import give_back_memory
from tahoex1_hf.embedding.cell_genes import CellGenes
from tahoex1_hf.embedding.obs_columns import as_arrow
from tahoex1_hf.embedding.plan import Stretch
from tahoex1_hf.embedding.shards import Shard
from tahoex1_hf.inference.chunks import embed_chunks
from tahoex1_hf.inference.encoder import CellEncoder, GeneMeans, TokenSink
from tahoex1_hf.inference.scoring import CellScorer
from tahoex1_hf.padding_tahoe_x1 import EncodedCells

# A shard is complete when this many seconds have passed since the last one, or when it has this many values (8 MB).
_SHARD_SECONDS = 30.0
_SHARD_VALUES = 2**21
# Number of chunks after which memory is given back that is free.
_TRIMMED_CHUNKS = 16


def most_chunks(width: int, most: int) -> int:
    """Return the number of chunks, from 1 to `most`, whose embeddings of this width always fit into one shard."""
    return min(most, max(1, _SHARD_VALUES // (width * encoding.CHUNK_CELLS)))


@dataclass(frozen=True)
class ShardContent:
    """What the shards of a run hold beside embeddings.

    Attributes:
        names: Whether they hold the names of the cells.
        columns: Columns of obs that they hold where the input has them.
        numbers: Names of the numbers of each cell that they hold (see `EmbeddedChunk`).
        source_names: Names of the inputs.
        cell_genes: Writer of every cell's gene embeddings; None if they are not requested.
    """

    names: bool
    columns: Sequence[str]
    numbers: Sequence[str]
    source_names: Sequence[str]
    cell_genes: CellGenes | None = None

    def columns_of(self, cells: CellInput) -> list[str]:
        """Return the columns of obs that a shard of this input holds."""
        return [name for name in self.columns if name in cells.obs_columns]

    def needed(self, cells: CellInput) -> list[str]:
        """Return the columns that must be read with the cells of this input."""
        return [*([INDEX] if self.names else []), *self.columns_of(cells)]


class _Room(NamedTuple):
    """Arrays that hold the embeddings and numbers of the cells of a shard."""

    embeddings: np.ndarray
    numbers: dict[str, np.ndarray]

    @classmethod
    def make(cls, cells: int, width: int, names: Sequence[str]) -> "_Room":
        return cls(np.empty((cells, width), np.float32), {name: np.empty(cells, np.float32) for name in names})


def make_shards(
    encoder: CellEncoder,
    content: ShardContent,
    stretch: Stretch,
    chunks: Iterator[EncodedCells],
    cells: CellInput,
    gene_means: GeneMeans | None = None,
    on_batch: Callable[[int], object] = lambda num_cells: None,
    scorer: CellScorer | None = None,
    seconds: float | None = None,
) -> Iterator[tuple[int, int, Shard]]:
    """Embed chunks, and yield shards, each with the number of its first chunk and that after its last.

    The arrays of a shard are used again for the next but one.

    Args:
        encoder: Model that embeds the cells.
        content: What the shards hold beside embeddings.
        stretch: Numbers of the chunks and cells.
        chunks: The chunks, encoded, with the columns of obs that `content` needs.
        cells: The input that they are of.
        gene_means: Running means to which the cells' gene embeddings are added.
        on_batch: Function called after each batch with its number of cells.
        scorer: Scorer of the cells; None for no scores.
        seconds: Seconds after which a shard is complete; by default half a minute.
    """
    start, stop, number, low, high = stretch
    seconds = _SHARD_SECONDS if seconds is None else seconds
    # Arrays for all shards, filled in turn and used again: small pieces would lie scattered among what is freed.
    room = min(high - low, _SHARD_VALUES // encoder.width + encoding.CHUNK_CELLS)
    places = itertools.cycle([_Room.make(room, encoder.width, content.numbers) for _ in range(2)])
    embeddings, numbers = next(places)
    names: list[str] = []
    size = 0
    empty, first, since = 0, start, time.monotonic()
    columns = content.columns_of(cells)
    tables: list[pa.Table] = []

    def sink_of(chunk: EncodedCells) -> AbstractContextManager[TokenSink | None]:
        if content.cell_genes is None:
            return nullcontext()
        place = start + int(chunk.cell_numbers[0] - low) // encoding.CHUNK_CELLS
        return content.cell_genes.of_chunk(place, content.source_names[number], chunk)

    embedded = embed_chunks(encoder, chunks, cells, gene_means, on_batch, sink_of, scorer)
    for done, (chunk, part, computed) in enumerate(embedded, start + 1):
        names.extend(cell_names(chunk.obs) if content.names else [])
        embeddings[size : size + len(part)] = part
        for name, values in numbers.items():
            values[size : size + len(part)] = computed[name]
        size += len(part)
        tables.append(as_arrow(chunk.obs[columns]))
        empty += len(chunk.empty_cells)
        if done % _TRIMMED_CHUNKS == 0:
            give_back_memory()
        full = embeddings[:size].size >= _SHARD_VALUES or time.monotonic() - since >= seconds
        if full or done == stop:
            made = {name: values[:size] for name, values in numbers.items()}
            obs = pa.concat_tables(tables, promote_options="permissive") if columns else None
            yield first, done, Shard(names, embeddings[:size], empty, made, obs)
            names, tables = [], []
            embeddings, numbers = next(places)
            size, empty, first, since = 0, 0, done, time.monotonic()
