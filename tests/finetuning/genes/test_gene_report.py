"""Test the metrics of a gene classification."""

import numpy as np
import pytest

from tahoex1_hf.finetuning.genes.report import gene_metrics, sought_class


def test_metrics_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, 1])
    second = np.array([0.1, 0.8, 0.2, 0.9, 0.4])
    found = gene_metrics(truth, np.stack([1 - second, second], axis=1), 1)
    assert found["auroc"] == pytest.approx(5 / 6)  # one of the six pairs of a 1 and a 0 is in the wrong order
    assert found["auprc"] == pytest.approx((1 / 1 + 2 / 3) / 2)  # precision at the ranks of the ones: 1 and 3
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((2 * 2 / (2 * 2 + 1 + 1) + 2 * 1 / (2 * 1 + 1 + 1)) / 2)
    assert sought_class(truth) == 1
