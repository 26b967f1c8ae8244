# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of genes from every kind of source."""

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

import numpy as np

from tahoex1_hf.benchmarking.cell_embeddings import Computing, known_genes, loaded
from tahoex1_hf.benchmarking.cells import EvaluationFile, fitted_pca, stacked
from tahoex1_hf.benchmarking.files import aligned, read_embeddings
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.finetuning.cells.baselines import COMPONENTS
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.inference.chunks import embed_input
from tahoex1_hf.inference.encoder import CellEncoder, GeneMeans
from tahoex1_hf.inference.gene_embeddings import KINDS, embed_genes


class Genes(Protocol):
    """Genes that a benchmark scores, with what is known about each."""

    @property
    def names(self) -> np.ndarray:
        """Ensembl ids, shape `(genes,)`."""

    @property
    def left_out(self) -> dict[str, int]:
        """Reason -> number of genes that are left out."""

    def some(self, kept: np.ndarray, reason: str) -> Self:
        """Return the genes for which `kept` is true; the others are counted under a reason."""


AnyGenes = TypeVar("AnyGenes", bound=Genes)


def expressed_genes(genes: AnyGenes, sets: Sequence[EvaluationFile]) -> AnyGenes:
    """Return the genes that some cell expresses."""
    expressed = [each.genes[each.values.getnnz(axis=0) > 0] for each in sets]
    return genes.some(np.isin(genes.names, np.concatenate(expressed)), "expressed in no cell")


def common_genes(genes: AnyGenes, sources: Sequence[Source], sets: Sequence[EvaluationFile]) -> AnyGenes:
    """Return the genes that every source knows, so that all are compared on the same genes."""
    for source in sources:
        known = genes_known_to(source, sets)
        if known is not None:
            genes = genes.some(np.isin(genes.names, known), f"unknown to {source.name}")
    return genes


def left_out(genes: Genes) -> str:
    """Return how many genes are left out for which reasons, as text."""
    return ", ".join(f"{number} {reason}" for reason, number in genes.left_out.items() if number) or "none"


def genes_known_to(source: Source, sets: Sequence[EvaluationFile]) -> np.ndarray | None:
    """Return the names of the genes that a model or a file knows; None for baselines, which know all of the cells."""
    if source.kind == "file":
        return read_embeddings(source, "var")[0]
    if source.kind == "model":
        return np.unique(np.concatenate([each.genes[known_genes(source.what, each)] for each in sets]))
    return None


def gene_embeddings(
    source: Source, sets: Sequence[EvaluationFile], genes: np.ndarray, seed: int, computing: Computing
) -> dict[str, np.ndarray]:
    """Return the embeddings of genes.

    Args:
        source: Source of the embeddings.
        sets: Cells from which expression, PCA loadings and EA are computed.
        genes: Ensembl ids, shape `(genes,)`.
        seed: Seed of random numbers, of the untrained twin and of PCA's solver.
        computing: How a model is run.

    Returns:
        `(genes, width)` by the kind of embedding: GE, TE and EA for models, else one with an empty name.
    """
    if source.kind in ("model", "untrained"):
        return _of_model(source, sets, genes, seed, computing)
    if source.kind == "file":
        return {"": aligned(*read_embeddings(source, "var"), genes.tolist())}
    if source.kind == "random":
        return {"": np.random.default_rng(seed).standard_normal((len(genes), COMPONENTS))}
    if source.kind == "expression":
        return {"": np.concatenate([expression(each, genes) for each in sets], axis=1)}
    known = genes_known_to(Source(source.name, "model", source.what), sets) if source.what else None
    return {"": loadings(sets, genes, known, seed)}


def finite_embeddings(
    source: Source, sets: Sequence[EvaluationFile], genes: np.ndarray, seed: int, computing: Computing
) -> dict[str, np.ndarray]:
    """Return what `gene_embeddings` does, where all of it is finite.

    Raises:
        ValueError: If a value is not finite.
    """
    found = gene_embeddings(source, sets, genes, seed, computing)
    if not all(np.isfinite(values).all() for values in found.values()):
        raise ValueError(f"--source {source.name}: an embedding of a gene holds NaN or infinite values.")
    return found


def expression(cells: EvaluationFile, genes: np.ndarray) -> np.ndarray:
    """Return how strongly genes are expressed, `(genes, 2)`.

    The two numbers are the mean of the log-normalised counts and the fraction of the cells that express the gene; both
    are 0 for genes that the cells do not have.
    """
    means = np.asarray(cells.values.sum(axis=0)).ravel() / cells.adata.n_obs
    fractions = cells.values.getnnz(axis=0) / cells.adata.n_obs
    return aligned_or_zero(cells.genes, np.stack([means, fractions], axis=1), genes)


def loadings(sets: Sequence[EvaluationFile], genes: np.ndarray, known: np.ndarray | None, seed: int) -> np.ndarray:
    """Return the loadings of genes on the principal components of all cells, `(genes, components)`.

    Args:
        sets: Cells.
        genes: Ensembl ids of the genes that are wanted.
        known: Ensembl ids of the genes that PCA is kept to; None for all.
        seed: Seed of PCA's solver.
    """
    every = np.unique(np.concatenate([each.genes for each in sets]))
    every = every if known is None else np.intersect1d(every, known)
    values = stacked(sets, every, seed)
    expressed = np.flatnonzero(values.getnnz(axis=0))
    pca = fitted_pca(values[:, expressed], seed)
    return aligned_or_zero(every[expressed], pca.components_.T, genes)


def aligned_or_zero(names: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the rows of `values` in the order of `wanted`; zeros where a name is missing."""
    return np.nan_to_num(aligned(names, values, wanted.tolist()), nan=0.0)


def _of_model(
    source: Source, sets: Sequence[EvaluationFile], genes: np.ndarray, seed: int, computing: Computing
) -> dict[str, np.ndarray]:
    model, tokenizer = loaded(source, seed)
    encoder = CellEncoder(without_peft(model), tokenizer, **computing.of_encoder())
    tokens = np.array([tokenizer.gene_token(name) for name in genes.tolist()], dtype=np.int64)
    means = GeneMeans(tokens, encoder.config.vocab_size, encoder.width, encoder.device)
    for each in sets:
        embed_input(encoder, ChunkEncoder(open_cells(each.adata, tokenizer), EncodeOptions(tokenizer)), means, True)
    return embed_genes(encoder, tokens, KINDS, means).kinds
