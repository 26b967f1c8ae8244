"""Neighbours find planted classes, and the threshold and the expected scores come from cells that were left out."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tahoex1_hf.annotation.methods import EMBEDDING, LOGISTIC, PCA, PROBE, Features, methods
from tahoex1_hf.annotation.validation import (
    UNKNOWN,
    cross_validate,
    decide,
    expected_of,
    find_threshold,
    make_folds,
    share,
    unscored_classes,
)


def planted(number: int, seed: int = 0, classes: int = 3) -> tuple[Features, np.ndarray]:
    """Make cells of classes, each with a place of its own and with counts of its own genes."""
    random = np.random.default_rng(seed)
    labels = np.arange(number) % classes
    points = 4 * np.eye(8)[labels] + random.standard_normal((number, 8))
    own = np.arange(30) % classes == labels[:, None]
    values = random.random((number, 30)) * (random.random((number, 30)) < np.where(own, 0.9, 0.1))
    return Features(points.astype(np.float32), csr_matrix(values.astype(np.float32))), labels


@pytest.mark.parametrize("name", [EMBEDDING, PROBE, PCA, LOGISTIC])
def test_planted_classes_are_found_in_cells_that_were_left_out(name: str) -> None:
    cells, labels = planted(150)
    held_out = cross_validate(methods(15, 0)[name], cells, labels, 3, make_folds(labels, None, 0))
    assert held_out.scored.all()
    assert (held_out.votes.probabilities.argmax(1) == labels).mean() > 0.9
    np.testing.assert_allclose(held_out.votes.probabilities.sum(1), 1, rtol=1e-5)


def test_about_the_stated_share_of_new_cells_is_unknown() -> None:
    cells, labels = planted(600)
    method = methods(15, 0)[EMBEDDING]
    held_out = cross_validate(method, cells, labels, 3, make_folds(labels, None, 0))
    threshold = find_threshold(held_out, 0.1)
    assert abs((decide(held_out.votes, threshold) == UNKNOWN).mean() - 0.1) < 0.002
    others = planted(2000, seed=1)[0]  # 0.1 ± 0.007 by their number, ± 0.012 by the threshold's
    assert abs((decide(method(cells, labels, 3).votes(others), threshold) == UNKNOWN).mean() - 0.1) < 0.045


def test_expected_precision_and_recall_are_those_of_the_cells_left_out() -> None:
    cells, labels = planted(150)
    wrong = labels.copy()
    wrong[:30:3] = 1  # ten cells of class 0 are called 1 by mistake
    held_out = cross_validate(methods(5, 0)[EMBEDDING], cells, wrong, 3, make_folds(wrong, None, 0))
    called = decide(held_out.votes, threshold := find_threshold(held_out, 0.05))
    expected = expected_of(held_out, wrong, 3, threshold)
    for kind, each in enumerate(expected):
        assert each.recall is not None
        assert each.precision is not None
        assert each.recall[0] == (called[wrong == kind] == kind).mean()
        assert each.precision[0] == (wrong[called == kind] == kind).mean()
        assert each.recall[1] < each.recall[0] < each.recall[2]
    assert expected[1].recall is not None
    assert expected[1].recall[0] < 0.9  # the ten are not found, since they lie among class 0
    assert expected[2].recall is not None
    assert expected[2].recall[0] > 0.9


def test_a_class_left_out_is_told_by_its_distance() -> None:
    cells, labels = planted(150)
    held_out = cross_validate(methods(15, 0)[EMBEDDING], cells, labels, 3, make_folds(labels, None, 0))
    expected = expected_of(held_out, labels, 3, find_threshold(held_out, 0.05))
    assert all(each.auroc is not None and each.auroc > 0.95 for each in expected)
    noise = Features(np.random.default_rng(2).standard_normal((150, 8)).astype(np.float32))
    held_out = cross_validate(methods(15, 0)[EMBEDDING], noise, labels, 3, make_folds(labels, None, 0))
    expected = expected_of(held_out, labels, 3, find_threshold(held_out, 0.05))
    assert all(each.auroc is not None and 0.3 < each.auroc < 0.75 for each in expected)


def test_batches_are_left_out_whole_and_a_class_of_one_batch_is_not_scored() -> None:
    cells, labels = planted(90)
    batches = np.array(["a", "b"])[np.arange(90) // 45]
    batches[labels == 2] = "b"
    folds = make_folds(labels, batches, 0)
    assert [set(batches[fold]) for fold in folds] == [{"a"}, {"b"}]
    held_out = cross_validate(methods(5, 0)[EMBEDDING], cells, labels, 3, folds)
    assert (held_out.scored == (labels != 2)).all()
    expected = expected_of(held_out, labels, 3, find_threshold(held_out, 0.05))
    assert (expected[2].cells, expected[2].recall) == (0, None)
    many = np.array([f"donor{number % 11}" for number in range(90)])
    folds = make_folds(labels, many, 0)
    assert len(folds) == 5
    assert sorted(np.concatenate(folds).tolist()) == list(range(90))
    assert sum(len(set(many[fold])) for fold in folds) == 11


def test_a_fold_that_leaves_one_class_to_learn_from_is_no_error() -> None:
    cells, labels = planted(60, classes=2)
    batches = np.where((labels == 1) | (np.arange(60) < 20), "a", "b")
    folds = make_folds(labels, batches, 0)
    assert unscored_classes(labels, folds).tolist() == [1]
    for method in methods(5, 0).values():
        held_out = cross_validate(method, cells, labels, 2, folds)
        assert (held_out.votes.probabilities[batches == "a"].argmax(1) == 0).all()  # of b there is class 0 alone
        assert held_out.scored.sum() == (labels == 0).sum()


def test_neighbours_do_not_depend_on_the_order_of_the_reference() -> None:
    cells, labels = planted(90)
    others = planted(40, seed=1)[0]
    order = np.random.default_rng(0).permutation(90)
    method = methods(15, 0)[EMBEDDING]
    one, other = method(cells, labels, 3).votes(others), method(cells.pick(order), labels[order], 3).votes(others)
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)
    np.testing.assert_allclose(one.distance, other.distance, rtol=1e-6)


def test_intervals_of_shares_are_those_of_wilson() -> None:
    found = share(9, 10)
    assert found is not None
    np.testing.assert_allclose(found, [0.9, 0.5958, 0.9821], atol=1e-4)  # Wilson 1927, computed by hand
    assert share(0, 0) is None
