# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embed chunks of cells that are read and encoded while the model works."""

import copy
from collections.abc import Callable, Iterator

import numpy as np

from tahoex1_hf.cells.encoding import Chunk, ChunkEncoder, report_unknown_drugs
from tahoex1_hf.common.prefetch import prefetch
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.inference.encoder import CellEncoder, GeneMeans
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


def embed_chunks(
    encoder: CellEncoder,
    chunks: Iterator[Chunk],
    gene_means: GeneMeans | None = None,
    on_batch: Callable[[int], object] = lambda num_cells: None,
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Embed chunk after chunk; the next chunk is read and encoded while the model works on this one.

    Args:
        encoder: model that embeds the cells.
        chunks: chunks from `ChunkEncoder.chunks`.
        gene_means: running means to which the cells' gene embeddings are added.
        on_batch: function called after each batch with its number of cells.

    Yields:
        Every chunk, and its `(cells, width)` float32 embeddings, each row of length 1.
    """
    for chunk in prefetch(chunks):
        yield chunk, encoder.embed(chunk.cells, gene_means, on_batch)


def embed_input(
    encoder: CellEncoder, chunks: ChunkEncoder, gene_means: GeneMeans | None = None, progress: bool = False
) -> tuple[np.ndarray, int]:
    """Embed all cells of an input.

    Args:
        encoder: model that embeds the cells.
        chunks: input with the cells, and how they are encoded.
        gene_means: running means to which the cells' gene embeddings are added.
        progress: whether to show a progress bar.

    Returns:
        `(cells, width)` float32 embeddings, each row of length 1, and the number of cells in which no known gene is
        expressed.
    """
    report_unknown_drugs([chunks.drug_ids])
    num_cells = chunks.cells.num_cells
    embeddings = np.empty((num_cells, encoder.width), dtype=np.float32)
    num_empty = 0
    with progress_bar(progress, total=num_cells, unit="cell", desc="Embedding") as bar:
        for chunk, part in embed_chunks(encoder, chunks.chunks(0, num_cells), gene_means, bar.update):
            embeddings[chunk.start : chunk.start + len(part)] = part
            num_empty += len(chunk.cells.empty_cells)
    return embeddings, num_empty


def with_context(tokenizer: TahoeX1Tokenizer, max_length: int | None) -> TahoeX1Tokenizer:
    """Return the tokenizer, or a copy with another context length.

    Raises:
        ValueError: for a length that leaves no room for a gene.
    """
    if max_length is None:
        return tokenizer
    if max_length < 3:
        raise ValueError(f"max_length={max_length} leaves no room for a gene after <cls> and <drug>: pass at least 3.")
    tokenizer = copy.copy(tokenizer)
    tokenizer.context_length = max_length
    return tokenizer
