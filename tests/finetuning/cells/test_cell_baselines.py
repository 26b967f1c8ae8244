"""Metrics give known answers; baselines find planted signals, and nothing where there is none."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr, t

from tahoex1_hf.finetuning.cells import baselines as baselines_module
from tahoex1_hf.finetuning.cells.baselines import (
    Components,
    classification_baselines,
    log_normalized,
    regression_baselines,
)
from tahoex1_hf.finetuning.metrics import (
    classification_metrics,
    interval,
    paired_difference,
    regression_metrics,
)
from tahoex1_hf.finetuning.splits import Split, make_splits

LINEAR, BOOSTED, MAJORITY = "PCA + logistic regression", "PCA + gradient boosting", "majority class"


def planted(num_cells: int = 240, num_genes: int = 60, seed: int = 0) -> tuple[csr_matrix, np.ndarray]:
    """Return counts of three kinds of cells, each with its own genes, and the kinds."""
    random = np.random.default_rng(seed)
    kinds = random.integers(0, 3, num_cells)
    own = np.arange(num_genes) % 3 == kinds[:, None]
    return csr_matrix(random.poisson(np.where(own, 3.0, 0.6)).astype(np.float32)), kinds


# Metrics ----------------------------------------------------------------------------------------------


def test_classification_metrics_by_hand() -> None:
    truth, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    probabilities = np.eye(4)[predicted]
    found = classification_metrics(truth, predicted, probabilities)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    # For each class: the share of pairs (a cell of the class, a cell of another) in the right order, ties as halves.
    first = (2 * (1 + 1 + 0.5) + (0.5 + 0.5 + 0)) / 9
    second = 2 * (1 + 1 + 0.5 + 1) / 8
    third = 0.5  # never predicted: all ties
    assert found["auroc"] == pytest.approx((first + second + third) / 3)


def test_auroc_where_it_is_defined() -> None:
    every_class_the_same = classification_metrics(np.zeros(3, int), np.zeros(3, int), np.full((3, 2), 0.5))
    assert "auroc" not in every_class_the_same
    assert every_class_the_same["accuracy"] == 1
    assert "auroc" not in classification_metrics(np.array([0, 1]), np.array([0, 1]))


def test_a_class_that_is_only_predicted_costs_macro_f1_but_not_balanced_accuracy() -> None:
    found = classification_metrics(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]))
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["balanced_accuracy"] == pytest.approx(0.75)


def test_regression_metrics_by_hand() -> None:
    truth, predicted = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.0, 3.0, 2.0, 8.0])
    found = regression_metrics(truth, predicted)
    assert found["rmse"] == pytest.approx(np.sqrt(6 / 4))
    assert found["mae"] == pytest.approx(1.0)
    assert found["r2"] == pytest.approx(1 - 6 / 14)
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, predicted)[0, 1])
    assert found["spearman"] == pytest.approx(spearmanr(truth, predicted).statistic)
    assert regression_metrics(truth, np.full(4, 3.0)).keys() == {"rmse", "mae", "r2"}
    assert regression_metrics(np.ones(3), np.ones(3)) == {"rmse": 0, "mae": 0}


@pytest.mark.parametrize("predicted", [np.zeros(3), np.zeros((4, 1))])
def test_arrays_that_do_not_fit(predicted: np.ndarray) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        regression_metrics(np.zeros(4), predicted)
    with pytest.raises(ValueError, match="empty"):
        classification_metrics(np.zeros(0), np.zeros(0))


def test_interval_is_students_t() -> None:
    values = [0.5, 0.6, 0.7, 0.65, 0.55]
    half = t.ppf(0.975, 4) * np.std(values, ddof=1) / np.sqrt(5)
    found = interval(values)
    assert found["mean"] == pytest.approx(0.6)
    assert [found["low"], found["high"]] == pytest.approx([0.6 - half, 0.6 + half])
    assert interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "values": [0.5]}


def test_interval_covers_the_truth_nineteen_times_in_twenty() -> None:
    samples = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    covered = [(found := interval(row))["low"] <= 3.0 <= found["high"] for row in samples]
    assert abs(np.mean(covered) - 0.95) < 0.02


def test_difference_is_paired() -> None:
    theirs = np.array([0.2, 0.5, 0.8])
    found = paired_difference((theirs + 0.01).tolist(), theirs.tolist())
    assert found["low"] == pytest.approx(0.01)  # although the folds differ by far more
    with pytest.raises(ValueError, match="one by one"):
        paired_difference([1.0], [1.0, 2.0])


# Baselines --------------------------------------------------------------------------------------------


def test_normalisation_by_hand() -> None:
    counts = csr_matrix(np.array([[1, 3, 0], [0, 0, 0], [0, 5, 0]], dtype=np.float32))
    before = counts.copy()
    expected = np.log1p(np.array([[2500, 7500, 0], [0, 0, 0], [0, 10000, 0]]))
    np.testing.assert_allclose(log_normalized(counts).toarray(), expected, rtol=1e-6)
    assert (counts != before).nnz == 0


def test_components_are_those_of_dense_pca() -> None:
    from sklearn.decomposition import PCA

    values = log_normalized(planted()[0])
    ours = Components(values, seed=0)
    dense = PCA(50, svd_solver="full").fit(values.toarray())
    theirs = dense.transform(values.toarray()) / np.sqrt(dense.explained_variance_ * 239 / 240)
    assert np.abs(np.abs(ours.train[:, :5]) - np.abs(theirs[:, :5])).max() < 1e-3
    np.testing.assert_allclose(ours.transform(values), ours.train, atol=1e-5)


def test_planted_classes_are_found() -> None:
    counts, labels = planted()
    splits = make_splits(labels, folds=3, seed=0)
    found = classification_baselines(counts, labels, splits, seed=0, num_classes=4)
    assert set(found) == {LINEAR, BOOSTED, MAJORITY}
    for name, least in ((LINEAR, 0.95), (BOOSTED, 0.85)):
        for split, probabilities in zip(splits, found[name], strict=True):
            assert probabilities.shape == (len(split.test), 4)
            np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
            assert (probabilities.argmax(1) == labels[split.test]).mean() > least
            assert (probabilities[:, 3] == 0).all()  # a class that no cell has
    for split, probabilities in zip(splits, found[MAJORITY], strict=True):
        shares = np.bincount(labels[split.train], minlength=4) / len(split.train)
        np.testing.assert_allclose(probabilities, np.tile(shares, (len(split.test), 1)))


def test_shuffled_labels_give_chance() -> None:
    counts, labels = planted(300)
    labels = np.random.default_rng(1).permutation(labels)
    splits = make_splits(labels, folds=3, seed=0)
    for name, each in classification_baselines(counts, labels, splits, seed=0).items():
        hits = np.concatenate([p.argmax(1) == labels[s.test] for s, p in zip(splits, each, strict=True)])
        assert abs(hits.mean() - 1 / 3) < 0.11, name  # four standard errors


def test_planted_number_is_found_and_a_shuffled_one_is_not() -> None:
    counts, kinds = planted()
    numbers = 10.0 + 5.0 * kinds
    splits = make_splits(numbers, folds=3, seed=0)
    found = regression_baselines(counts, numbers, splits, seed=0)
    shuffled = np.random.default_rng(1).permutation(numbers)
    chance = regression_baselines(counts, shuffled, splits, seed=0)
    for name in ("PCA + ridge regression", BOOSTED):
        for split, right, wrong in zip(splits, found[name], chance[name], strict=True):
            assert regression_metrics(numbers[split.test], right)["r2"] > 0.8
            assert regression_metrics(shuffled[split.test], wrong)["r2"] < 0.2
    for split, constant in zip(splits, found["mean"], strict=True):
        np.testing.assert_allclose(constant, numbers[split.train].mean())


def test_nothing_of_the_test_cells_is_used() -> None:
    counts, labels = planted()
    [split] = make_splits(labels, seed=0)
    other_labels = labels.copy()
    other_labels[split.test] = (labels[split.test] + 1) % 3
    other_counts = counts.toarray()
    # All test cells but the first are different: the prediction for the first must not change.
    other_counts[split.test[1:]] = np.random.default_rng(5).poisson(9.0, other_counts[split.test[1:]].shape)
    for predict, first, second in (
        (classification_baselines, labels, other_labels),
        (regression_baselines, labels.astype(float), other_labels.astype(float)),
    ):
        ours = predict(counts, first, [split], 0)
        theirs = predict(csr_matrix(other_counts), second, [split], 0)
        for name, each in ours.items():
            np.testing.assert_allclose(each[0][0], theirs[name][0][0], atol=1e-6)


def test_strength_is_chosen_on_the_validation_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    counts = csr_matrix(random.poisson(2.0, (80, 70)).astype(np.float32))
    # With few cells and as many components, only the strongest regularisation comes near to a constant.
    numbers = random.normal(size=80)
    split = Split(np.arange(50), np.arange(50, 65), np.arange(65, 80))
    chosen = regression_baselines(counts, numbers, [split], 0)["PCA + ridge regression"][0]
    monkeypatch.setattr(baselines_module, "_STRENGTHS", (100.0,))
    weakest = regression_baselines(counts, numbers, [split], 0)["PCA + ridge regression"][0]
    assert chosen.std() < 0.8 * weakest.std()
    without = Split(split.train, np.zeros(0, dtype=int), split.test)
    assert regression_baselines(counts, numbers, [without], 0)["PCA + ridge regression"][0].shape == (15,)


def test_odd_splits() -> None:
    counts, labels = planted(60)
    one_class = Split(np.flatnonzero(labels == 0), np.zeros(0, dtype=int), np.flatnonzero(labels == 1))
    for each in classification_baselines(counts, labels, [one_class], 0, 3).values():
        np.testing.assert_array_equal(each[0].argmax(1), 0)
    # No gene varies, so the baselines can only know the shares.
    same = csr_matrix(np.ones((60, 1), dtype=np.float32))
    for each in classification_baselines(same, labels, make_splits(labels, seed=0), 0, 3).values():
        assert np.isfinite(each[0]).all()


def test_many_training_cells_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines_module, "MOST_CELLS", 100)
    counts, labels = planted()
    seen: list[int] = []

    class Counting(Components):
        def __init__(self, values: csr_matrix, seed: int):
            seen.append(values.shape[0])
            super().__init__(values, seed)

    monkeypatch.setattr(baselines_module, "Components", Counting)
    [split] = make_splits(labels, seed=0)
    found = classification_baselines(counts, labels, [split], 0)
    assert seen == [100]
    assert (found[LINEAR][0].argmax(1) == labels[split.test]).mean() > 0.9
