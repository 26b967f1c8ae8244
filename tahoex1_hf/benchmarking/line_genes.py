# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of genes in cell lines, a vector for every pair of the two, from every kind of source."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from tahoex1_hf.benchmarking.cell_embeddings import Computing, embed_cells, loaded
from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.inference.chunks import embed_chunks, with_settings
from tahoex1_hf.inference.encoder import CellEncoder, TokenSink
from tahoex1_hf.inference.gene_embeddings import embed_genes
from tahoex1_hf.padding_tahoe_x1 import EncodedCells

PairsOf = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Function of row numbers of lines and of genes, which returns `(lines, genes, width)` embeddings."""

_COMPONENTS = 15  # of a line, as in the original


@contextmanager
def pair_embeddings(
    source: Source, lines: EvaluationFile, genes: np.ndarray, seed: int, computing: Computing
) -> Iterator[PairsOf]:
    """Yield a function that returns the embeddings of some genes in some lines.

    Those of a model are its contextual embeddings, scaled to length 1; a gene that a line does not express has its
    embedding without any cell. They lie in a temporary file, since they may be larger than memory. Expression is that
    of the gene in the line. Other sources embed lines only: their vectors, of PCA the first 15 components, serve all
    genes. Beside all but those of models stands the number of the gene, by which a forest tells genes apart, as in the
    original.

    Args:
        source: Source of the embeddings.
        lines: Cell lines.
        genes: Ensembl ids of the genes, shape `(genes,)`.
        seed: Seed of random numbers, of the untrained twin and of PCA's solver.
        computing: How a model is run.
    """
    if source.kind in ("model", "untrained"):
        with tempfile.TemporaryFile(prefix="tahoex1_pairs_") as file:
            values = _contextual(file, source, lines, genes, seed, computing)
            yield lambda rows, columns: np.asarray(values[rows[:, None], columns[None]])
            return
    if source.kind == "expression":
        place = {name: number for number, name in enumerate(lines.genes.tolist())}
        expressed = lines.values[:, [place[name] for name in genes.tolist()]].tocsc()
        yield lambda rows, columns: _with_numbers(expressed[:, columns][rows].toarray()[:, :, None], columns)
        return
    of_lines = np.asarray(embed_cells(source, lines, seed, computing), dtype=np.float32)
    if source.kind == "pca":
        of_lines = of_lines[:, :_COMPONENTS]
    yield partial(_of_lines, of_lines)


def _of_lines(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    shape = (len(rows), len(columns), values.shape[1])
    return _with_numbers(np.broadcast_to(values[rows][:, None], shape), columns)


def _with_numbers(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Put the numbers of genes before embeddings, shape `(lines, genes, width)`."""
    numbers = np.broadcast_to(columns[None, :, None], (*values.shape[:2], 1))
    return np.concatenate([numbers, values], axis=2).astype(np.float32)


def _contextual(
    file: Any, source: Source, lines: EvaluationFile, genes: np.ndarray, seed: int, computing: Computing
) -> np.ndarray:
    """Write the contextual embeddings of genes into a file, and return it as an array, `(lines, genes, width)`."""
    model, tokenizer = loaded(source, seed)
    # All genes of a line, however many: those of a sample would be compared with others' embeddings without cells.
    tokenizer = with_settings(tokenizer, max(tokenizer.context_length, lines.adata.n_vars + 2))
    encoder = CellEncoder(without_peft(model), tokenizer, **computing.of_encoder())
    tokens = np.array([tokenizer.gene_token(name) for name in genes.tolist()], dtype=np.int64)
    without_cells = _of_length_one(embed_genes(encoder, tokens, ("TE",), None).kinds["TE"])
    shape = (lines.adata.n_obs, len(genes), encoder.width)
    values = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
    values[:] = without_cells
    place = np.full(encoder.config.vocab_size, -1)
    place[tokens] = np.arange(len(tokens))

    def receive(chunk: EncodedCells, rows: np.ndarray, token_ids: torch.Tensor, states: torch.Tensor) -> None:
        numbers = np.repeat(chunk.cell_numbers[rows], chunk.lengths[rows])
        columns = place[token_ids.cpu().numpy()]
        wanted = columns >= 0
        found = states[torch.from_numpy(wanted).to(states.device)].float().cpu().numpy()
        values[numbers[wanted], columns[wanted]] = _of_length_one(found)

    @contextmanager
    def sink(chunk: EncodedCells) -> Iterator[TokenSink]:
        yield partial(receive, chunk)

    encoded = ChunkEncoder(open_cells(lines.adata, tokenizer), EncodeOptions(tokenizer))
    for _ in embed_chunks(encoder, encoded.chunks(0, shape[0]), encoded.cells, sink_of=sink):
        pass
    return values


def _of_length_one(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), dtype=np.float32)
