"""Heads against scikit-learn, and on problems that only one of them can solve."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tahoex1_hf.benchmarking import heads
from tahoex1_hf.benchmarking.heads import GRIDS, Part, Shape, logistic_scores, mlp_scores

FEATURES = np.random.default_rng(0).standard_normal((400, 4))
BOTH = (FEATURES[:, 0] > 0) == (FEATURES[:, 1] > 0)  # no linear model reads this
MEMBERS = np.stack([FEATURES[:, 0] + FEATURES[:, 3] > 0.5, BOTH], axis=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_MOST_EPOCHS", 150)


def mlp(seed: int, grid: list[Shape]) -> np.ndarray:
    parts = [Part(FEATURES[rows], MEMBERS[rows]) for rows in (slice(280), slice(280, 300), slice(300, 320))]
    return mlp_scores(*parts, FEATURES[320:], grid, seed)


def right(scores: np.ndarray) -> list[float]:
    return ((scores > 0) == MEMBERS[320:]).mean(axis=0).tolist()


def test_logistic_regressions_are_scikit_learns() -> None:
    found = logistic_scores(FEATURES[:320], MEMBERS[:320], FEATURES[320:])
    for column in range(2):
        theirs = LogisticRegression(tol=1e-8).fit(FEATURES[:320], MEMBERS[:320, column])
        assert found[:, column] == pytest.approx(theirs.decision_function(FEATURES[320:]), abs=0.01)


def test_mlp_reads_what_no_linear_model_reads() -> None:
    linear, both = right(logistic_scores(FEATURES[:320], MEMBERS[:320], FEATURES[320:]))
    assert linear > 0.95
    assert both < 0.7
    assert min(right(mlp(0, [Shape(64, 1, 0.1)]))) > 0.75


def test_seed_decides_and_torch_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    grid = [Shape(8, 2, 0.1)]
    assert np.array_equal(mlp(0, grid), mlp(0, grid))
    assert not np.array_equal(mlp(0, grid), mlp(1, grid))
    assert torch.equal(before, torch.random.get_rng_state())


def test_shape_with_the_lowest_loss_is_taken() -> None:
    """With nine tenths of one unit dropped nothing is learned; the order of the shapes does not matter."""
    good, bad = Shape(16, 1, 0.1), Shape(1, 2, 0.9)
    alone = mlp(0, [good])
    assert np.array_equal(mlp(0, [bad, good]), alone)
    assert np.array_equal(mlp(0, [good, bad]), alone)


def test_grids() -> None:
    assert len(GRIDS["full"]) == 24
    assert set(GRIDS["small"]) < set(GRIDS["full"])
