# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""How well embeddings mix batches and keep cell types apart, by the metrics of scib-metrics."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.resampling import Measurement

READER, SPLIT = "scib-metrics", "batch integration"
MOST_CELLS = 10_000  # among which all distances are computed
HALVES = 20
_NEIGHBOURS = 90  # of each cell, the most that a metric looks at
_BATCH_WEIGHT = 0.4  # of the mean over the metrics of mixing in the total, as in scIB


def integration(features: Any, plain: Any, labels: np.ndarray, batches: np.ndarray) -> Iterator[Measurement]:
    """Yield the metrics of scib-metrics' benchmark that need no clusters: five of mixing batches, three of cell types.

    A resample would hold cells twice, which would be their own neighbours. So the replicates are random halves of the
    cells of every type in every batch, whose metrics scatter as those of resamples do. All halves have the same number
    of cells of each kind: for other numbers jax would compile everything again. The neighbours are exact.

    Args:
        features: Embeddings, shape `(cells, width)`, dense or CSR.
        plain: Embeddings without any correction, shape `(cells, width)`, with which variance by batch is compared.
        labels: Class numbers, shape `(cells,)`.
        batches: Batch numbers, shape `(cells,)`.
    """
    started = time.perf_counter()
    random = np.random.default_rng(0)
    rows = np.arange(len(labels))
    if len(rows) > MOST_CELLS:
        rows = np.sort(random.choice(rows, MOST_CELLS, replace=False))
    chosen = [rows, *(_half(rows, labels, batches, random) for _ in range(HALVES))]
    found = [scib(_dense(features[part]), plain[part], labels[part], batches[part]) for part in chosen]
    spent = [time.perf_counter() - started]
    for name in found[0]:
        values = np.array([[each[name] for each in found]])
        yield Measurement("", READER, SPLIT, name, values, [len(rows)], spent)


def _dense(features: Any) -> np.ndarray:
    return np.asarray(features.toarray() if hasattr(features, "toarray") else features, dtype=np.float32)


def _half(rows: np.ndarray, labels: np.ndarray, batches: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a random half, rounded up, of the rows of every type in every batch."""
    _, kinds = np.unique(np.stack([labels[rows], batches[rows]]), axis=1, return_inverse=True)
    kinds = kinds.reshape(-1)  # numpy 2.0 gives it two dimensions
    parts = (random.permutation(rows[kinds == kind]) for kind in range(kinds.max() + 1))
    return np.sort(np.concatenate([part[: (len(part) + 1) // 2] for part in parts]))


def scib(features: np.ndarray, plain: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> dict[str, float]:
    """Compute the metrics of scib-metrics of dense embeddings, and their means as in scIB."""
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    number = min(_NEIGHBOURS, len(labels))
    distances, places = NearestNeighbors(n_neighbors=number).fit(features).kneighbors(features)
    near = NeighborsResults(indices=places, distances=distances)
    mixing = {
        "BRAS": scib_metrics.bras(features, labels, batches),
        "iLISI": scib_metrics.ilisi_knn(near, batches),
        "kBET": scib_metrics.kbet_per_label(near.subset_neighbors(n=min(50, number)), batches, labels),
        "graph connectivity": scib_metrics.graph_connectivity(near.subset_neighbors(n=min(15, number)), labels),
        "PCR": scib_metrics.pcr_comparison(plain, features, batches, categorical=True),
    }
    types = {
        "isolated labels": scib_metrics.isolated_labels(features, labels, batches),
        "silhouette of labels": scib_metrics.silhouette_label(features, labels),
        "cLISI": scib_metrics.clisi_knn(near, labels),
    }
    found = {name: float(value) for name, value in {**mixing, **types}.items()}
    of_batches, of_types = (float(np.mean([found[name] for name in each])) for each in (mixing, types))
    total = _BATCH_WEIGHT * of_batches + (1 - _BATCH_WEIGHT) * of_types
    return {**found, "mixing of batches": of_batches, "cell types kept": of_types, "total": total}
