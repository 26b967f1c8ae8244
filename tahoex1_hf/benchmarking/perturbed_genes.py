# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of the genes that a screen perturbs."""

from collections.abc import Sequence

import numpy as np

from tahoex1_hf.benchmarking.cell_embeddings import Computing
from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.gene_embeddings import gene_embeddings
from tahoex1_hf.benchmarking.screens import Screen
from tahoex1_hf.benchmarking.sources import Source, model_folder
from tahoex1_hf.cells.gene_names import plain_id
from tahoex1_hf.cells.gene_symbols import released_symbols
from tahoex1_hf.hub.loading import load_tokenizer


def ensembl_ids(screen: Screen, names: Sequence[str]) -> list[str]:
    """Return the Ensembl ids of genes: by the columns of var, else by the package's table of symbols.

    Names that neither knows are returned as they are.
    """
    var, known = screen.cells.adata.var, dict(released_symbols())
    for column in var.columns:
        known |= dict(zip(var[column].astype(str), screen.cells.genes.tolist(), strict=True))
    return [plain_id(name) or known.get(name, name) for name in names]


def perturbed_names(screen: Screen) -> list[str]:
    """Return the names of the genes that a screen perturbs."""
    return sorted(set().union(*(screen.genes(group) for group in screen.tested.tolist())))


def known_to_model(source: Source, ids: Sequence[str]) -> list[int]:
    """Return the places of the genes that are in a model's vocabulary."""
    tokenizer = load_tokenizer(model_folder(source.what))
    return [place for place, gene in enumerate(ids) if tokenizer.gene_token(gene) >= 0]


def embeddings_of_perturbed(
    source: Source, screen: Screen, sets: Sequence[EvaluationFile], computing: Computing
) -> dict[str, np.ndarray]:
    """Return the embedding of each group's genes.

    Args:
        source: Source of the embeddings.
        screen: Screen.
        sets: Cells from which expression, PCA loadings and EA are computed.
        computing: How a model is run.

    Returns:
        `(groups, width)` by the kind of embedding: the sum over a group's genes; NaN where the source does not know
        one of them, and for controls.
    """
    names = perturbed_names(screen)
    ids = ensembl_ids(screen, names)
    kept = list(range(len(names)))
    if source.kind in ("model", "untrained"):
        kept = known_to_model(source, ids)
        if not kept:
            return {"": np.full((len(screen.names), 1), np.nan)}
    found = gene_embeddings(source, sets, np.array(ids)[kept], 0, computing)
    by_group = {}
    for kind, values in found.items():
        table = np.full((len(names), values.shape[1]), np.nan)
        table[kept] = values
        # Loadings and expression are zero for genes that the cells lack.
        table[~np.isfinite(table).all(axis=1) | ~table.any(axis=1)] = np.nan
        place = {name: number for number, name in enumerate(names)}
        sums = np.full((len(screen.names), values.shape[1]), np.nan)
        for group in screen.tested.tolist():
            sums[group] = table[[place[name] for name in sorted(screen.genes(group))]].sum(axis=0)
        by_group[kind] = sums
    return by_group
