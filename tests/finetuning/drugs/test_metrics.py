"""Test the metrics and baselines of a drug response."""

import numpy as np
import pytest

from tahoex1_hf.finetuning.drugs.metrics import (
    CONTEXT_MEAN,
    DRUG_MEAN,
    NULL,
    by_unit,
    change_baselines,
    pearson_rows,
    score,
)


def test_baselines_by_hand() -> None:
    changes = np.array([[1.0, 0], [3, 2], [0, 4], [5, 5], [7, 9]], dtype=np.float32)
    drugs = np.array(["x", "y", "x", "z", "y"], dtype=object)
    contexts = np.array(["A", "A", "B", "A", "C"], dtype=object)
    train, test = np.array([0, 1, 2]), np.array([3, 4])
    found = change_baselines(changes, drugs, contexts, train, test)
    overall = [4 / 3, 2]
    assert found[NULL].tolist() == [[0, 0], [0, 0]]
    assert np.allclose(found[CONTEXT_MEAN], [[2, 1], overall])  # A: the mean of two; C is held out
    assert np.allclose(found[DRUG_MEAN], [overall, [3, 2]])  # z is held out; y was trained on in A
    changed = changes.copy()
    changed[test] = 100
    again = change_baselines(changed, drugs, contexts, train, test)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_metrics_by_hand() -> None:
    truth = np.array([[1.0, 2, 3], [1, 2, 3], [0, 0, 1], [2, 2, 2]])
    predicted = np.array([[2.0, 4, 6], [3, 2, 1], [0, 0, 0], [1, 2, 3]])
    assert pearson_rows(predicted, truth).tolist() == pytest.approx([1, -1, 0, 0])
    assert pearson_rows(np.array([[1.0, 0, 2]]), truth[:1])[0] == pytest.approx(0.5)
    units = np.array(["b", "a", "b", "b"])
    assert by_unit(np.array([1.0, 5, 3, 5]), units) == [5, 3]
    summary, each = score({"model": predicted}, truth, units)
    assert each["model"]["mse"].tolist() == pytest.approx([14 / 3, 8 / 3, 1 / 3, 2 / 3])
    assert summary["model"]["pearson"]["values"] == pytest.approx([-1, 1 / 3])  # of a, and of b
    assert summary["model"]["pearson"]["mean"] == pytest.approx(-1 / 3)
