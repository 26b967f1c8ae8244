# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embed chunks of cells that are read and encoded while the model works."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np

from tahoex1_hf.cells.encoding import ChunkEncoder, report_unknown_drugs
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.prefetch import prefetch
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.configuration_tahoe_x1 import OVERFLOWS
from tahoex1_hf.inference.encoder import CellEncoder, GeneMeans, TokenSink
from tahoex1_hf.inference.finite import check_results
from tahoex1_hf.inference.scoring import CellScorer
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


class EmbeddedChunk(NamedTuple):
    """A chunk of cells and what was computed of it.

    Attributes:
        cells: Encoded cells.
        embeddings: `(cells, width)` float32, each row of length 1.
        numbers: `(cells,)` float32 numbers by name: `deviation`, how far the embedding varies with the sample (see
            `average`), 0 for cells of which there is one sample; with a scorer `score` and `score_sd` (see
            `CellScorer`).
    """

    cells: EncodedCells
    embeddings: np.ndarray
    numbers: dict[str, np.ndarray]


def embed_chunks(
    encoder: CellEncoder,
    chunks: Iterator[EncodedCells],
    cells: CellInput,
    gene_means: GeneMeans | None = None,
    on_batch: Callable[[int], object] = lambda num_cells: None,
    sink_of: Callable[[EncodedCells], AbstractContextManager[TokenSink | None]] = lambda chunk: nullcontext(),
    scorer: CellScorer | None = None,
) -> Iterator[EmbeddedChunk]:
    """Embed chunk after chunk; the next chunk is read and encoded while the model works on this one.

    On a GPU, the next chunk is begun before this one is finished, so that the GPU never waits for the host.

    Args:
        encoder: Model that embeds the cells.
        chunks: Chunks from `ChunkEncoder.chunks`.
        cells: The input that they are of.
        gene_means: Running means to which the cells' gene embeddings are added; of several samples, the first's.
        on_batch: Function called after each batch with its number of cells.
        sink_of: Function that makes of a chunk a context manager, which gives what takes the chunk's gene embeddings.
        scorer: Scorer of the cells; of several samples, the first is scored. None for no scores.

    Yields:
        Every chunk with its embeddings.

    Raises:
        ValueError: If an embedding is not finite; the message names the cell.
    """
    # The sums of gene embeddings are saved with the chunks that have been yielded: no later one may be in them.
    ahead = 1 if encoder.device.type == "cuda" and gene_means is None else 0
    begun: deque[tuple[EncodedCells, Callable[[], np.ndarray]]] = deque()
    for chunk in prefetch(chunks):
        with sink_of(chunk) as on_tokens:
            begun.append((chunk, encoder.begin(chunk, gene_means, on_batch, on_tokens)))
        if len(begun) > ahead:
            yield _finished(encoder, cells, scorer, *begun.popleft())
    while begun:
        yield _finished(encoder, cells, scorer, *begun.popleft())


def _finished(
    encoder: CellEncoder,
    cells: CellInput,
    scorer: CellScorer | None,
    chunk: EncodedCells,
    finish: Callable[[], np.ndarray],
) -> EmbeddedChunk:
    """Wait for a chunk's embeddings, and compute what else is wanted of it."""
    embeddings = finish()
    deviations = np.zeros(len(embeddings), dtype=np.float32)
    if chunk.samples:
        others = (encoder.embed(sample) for sample in chunk.samples)
        long = chunk.samples[0].cell_numbers - chunk.cell_numbers[0]
        means, deviations[long] = average(embeddings[long], others)
        embeddings[long] = means / np.linalg.norm(means, axis=1, keepdims=True)
    check_results(embeddings, chunk.cell_numbers, cells, encoder.dtype_name)
    numbers = {"deviation": deviations}
    if scorer is not None:
        numbers["score"], numbers["score_sd"] = scorer.score(chunk)
    return EmbeddedChunk(chunk, embeddings, numbers)


def average(first: np.ndarray, others: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Average what was computed of several samples of the same cells.

    Args:
        first: `(cells, width)` outputs for the first sample of each cell.
        others: The same of the other samples.

    Returns:
        `(cells, width)` float64 means; and `(cells,)` float32 standard deviations: the root of the variances over the
        samples (with n - 1), summed over the columns. That is the root mean square distance of one sample's output
        from the mean.
    """
    sums, number = first.astype(np.float64), 1
    squares = (sums**2).sum(1)
    for sample in others:
        values = sample.astype(np.float64)
        sums, squares, number = sums + values, squares + (values**2).sum(1), number + 1
    means = sums / number
    variances = np.maximum(squares - number * (means**2).sum(1), 0) / (number - 1)
    return means, np.sqrt(variances).astype(np.float32)


def embed_input(
    encoder: CellEncoder,
    chunks: ChunkEncoder,
    gene_means: GeneMeans | None = None,
    progress: bool = False,
    scorer: CellScorer | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """Embed all cells of an input.

    Args:
        encoder: Model that embeds the cells.
        chunks: Input with the cells, and how they are encoded.
        gene_means: Running means to which the cells' gene embeddings are added.
        progress: Whether to show a progress bar.
        scorer: Scorer of the cells; None for no scores.

    Returns:
        `(cells, width)` float32 embeddings, each row of length 1; the numbers of `EmbeddedChunk` for all cells; and
        the number of cells in which no known gene is expressed.
    """
    report_unknown_drugs([chunks.drug_ids])
    num_cells = chunks.cells.num_cells
    embeddings = np.empty((num_cells, encoder.width), dtype=np.float32)
    names = ["deviation"] if scorer is None else ["deviation", "score", "score_sd"]
    numbers, num_empty = {name: np.zeros(num_cells, dtype=np.float32) for name in names}, 0
    with progress_bar(progress, total=num_cells, unit="cell", desc="Embedding") as bar:
        encoded = chunks.chunks(0, num_cells)
        for made in embed_chunks(encoder, encoded, chunks.cells, gene_means, bar.update, scorer=scorer):
            embeddings[made.cells.cell_numbers] = made.embeddings
            for name, values in numbers.items():
                values[made.cells.cell_numbers] = made.numbers[name]
            num_empty += len(made.cells.empty_cells)
    return embeddings, numbers, num_empty


def with_settings(
    tokenizer: TahoeX1Tokenizer, max_length: int | None, overflow: str | None = None
) -> TahoeX1Tokenizer:
    """Return the tokenizer, or a copy with another context length or another choice of genes for longer cells.

    Raises:
        ValueError: For a length that leaves no room for a gene, and for another `overflow` than the tokenizer knows.
    """
    if max_length is None and overflow is None:
        return tokenizer
    if max_length is not None and max_length < 3:
        raise ValueError(f"max_length={max_length} leaves no room for a gene after <cls> and <drug>: pass at least 3.")
    if overflow is not None and overflow not in OVERFLOWS:
        raise ValueError(f"overflow={overflow!r}: pass one of {OVERFLOWS}.")
    tokenizer = copy.copy(tokenizer)
    tokenizer.context_length = tokenizer.context_length if max_length is None else max_length
    tokenizer.overflow = overflow or tokenizer.overflow
    return tokenizer
