"""Clusters of cells, and what their first call leaves for other processes."""

import numpy as np
import pytest

from tahoex1_hf.benchmarking.clusters import leiden


def groups() -> np.ndarray:
    """Return three groups of 30 cells each, `(90, 5)`, far from one another."""
    middles = 20 * np.eye(3, 5)
    return (np.repeat(middles, 30, axis=0) + np.random.default_rng(0).normal(size=(90, 5))).astype(np.float32)


def test_groups_that_lie_apart_are_found() -> None:
    clusters = leiden(groups(), seed=0)
    assert [len(set(clusters[first : first + 30])) for first in (0, 30, 60)] == [1, 1, 1]
    assert len(set(clusters)) == 3


def test_loops_that_scanpy_takes_from_umap_are_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each process but the first loads them in place of compiling for seconds."""
    umap = pytest.importorskip("umap.umap_")
    caching = pytest.importorskip("numba.core.caching")
    for loop in (umap.smooth_knn_dist, umap.compute_membership_strengths):
        monkeypatch.setattr(loop, "_cache", caching.NullCache())  # as in a process that has just imported UMAP
    leiden(groups(), seed=0)
    for loop in (umap.smooth_knn_dist, umap.compute_membership_strengths):
        assert loop.stats.cache_path is not None
