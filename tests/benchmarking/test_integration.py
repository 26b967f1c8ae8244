"""Mixing of batches, on embeddings in which it is known."""

from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tahoex1_hf.benchmarking import integration as module
from tahoex1_hf.benchmarking.cell_embeddings import Computing, embed_cells, harmonized
from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.integration import SPLIT, integration
from tahoex1_hf.benchmarking.sources import Source


def test_batches_that_are_mixed_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scib_metrics", reason="scib-metrics compiles for a minute: make test-evaluate has it")
    monkeypatch.setattr(module, "HALVES", 2)
    random = np.random.default_rng(0)
    labels, batches = np.repeat([0, 1, 2], 60), np.tile([0, 1], 90)
    noise = random.normal(0, 1, (180, 6))
    types = np.eye(6)[labels] * 12
    apart = types + noise + np.eye(6)[3 + batches] * 12
    scores = {}
    for name, features in (("mixed", types + noise), ("apart", apart), ("nothing", noise)):
        found = list(integration(features, apart, labels, batches))
        assert {measured.split for measured in found} == {SPLIT}
        assert all(np.isfinite(measured.replicates).all() for measured in found)
        scores[name] = {measured.metric: measured.value for measured in found}
    for metric in ("iLISI", "kBET", "BRAS", "PCR", "mixing of batches", "total"):
        assert scores["mixed"][metric] > scores["apart"][metric] + 0.1, metric
    for metric in ("cLISI", "silhouette of labels", "cell types kept", "total"):
        assert scores["mixed"][metric] > scores["nothing"][metric] + 0.1, metric
    mixed = scores["mixed"]
    assert mixed["total"] == pytest.approx(0.4 * mixed["mixing of batches"] + 0.6 * mixed["cell types kept"])


def test_halves_have_the_same_kinds_of_cells() -> None:
    """Other numbers would make jax compile every metric again: 40 s instead of 0.1 s for each half."""
    random = np.random.default_rng(0)
    labels, batches = random.integers(0, 3, 100), random.integers(0, 2, 100)
    rows = np.arange(10, 100)
    halves = [module._half(rows, labels, batches, random) for _ in range(5)]
    kinds = [np.bincount(2 * labels[half] + batches[half]).tolist() for half in halves]
    assert kinds == [((np.bincount(2 * labels[rows] + batches[rows]) + 1) // 2).tolist()] * 5
    assert len({tuple(half) for half in halves}) == 5
    assert all(set(half) <= set(rows) for half in halves)


def test_harmony_mixes_batches() -> None:
    pytest.importorskip("harmonypy", reason="harmonypy is part of the extra evaluate")
    random = np.random.default_rng(0)
    labels, batches = np.repeat([0, 1], 100), np.tile([0, 1], 100)
    rates = np.full((200, 40), 0.5)
    rates[labels == 1, :10] = 4
    rates[batches == 1, 10:20] = 1
    cells = EvaluationFile(Path("made up"), anndata.AnnData(csr_matrix(random.poisson(rates).astype(np.float32))))
    plain = embed_cells(Source("PCA", "pca"), cells, 0, Computing())
    found = harmonized(cells, batches, 0)
    assert found.shape == plain.shape

    def apart(values: np.ndarray, kinds: np.ndarray) -> float:
        return float(np.linalg.norm(values[kinds == 0].mean(axis=0) - values[kinds == 1].mean(axis=0)))

    assert apart(found, batches) < 0.5 * apart(plain, batches)
    assert apart(found, labels) > 0.9 * apart(plain, labels)
