"""Test the baselines of a gene classification."""

import numpy as np
import pytest

from tahoex1_hf.finetuning.genes import baselines
from tahoex1_hf.finetuning.genes.baselines import gene_baselines
from tahoex1_hf.finetuning.splits import Split


def test_baselines_do_not_see_the_test_genes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "TREES", 30)
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 90)
    features = {"noise": random.normal(size=(90, 4)), "truth": np.eye(3)[labels] + random.normal(0, 0.1, (90, 3))}
    split = Split(np.arange(50), np.arange(50, 60), np.arange(60, 90))
    found = gene_baselines(features, labels, 3, [split], 0)
    assert set(found) == {
        "majority class",
        *(f"{m} on {f}" for m in ("logistic regression", "random forest") for f in features),
    }
    assert np.allclose(found["majority class"][0], np.bincount(labels[:60], minlength=3) / 60)
    assert (found["random forest on truth"][0].argmax(1) == labels[60:]).mean() > 0.95
    changed = labels.copy()
    changed[60:] = (changed[60:] + 1) % 3
    again = gene_baselines(features, changed, 3, [split], 0)
    for name in found:
        assert np.array_equal(found[name][0], again[name][0]), name
