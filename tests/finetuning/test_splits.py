"""Splits keep shares, strata, groups and folds, and nothing leaks from one part into another."""

import numpy as np
import pytest

from tahoex1_hf.finetuning.splits import (
    Split,
    _splitter_of_groups,
    check_duplicates,
    check_split,
    given_split,
    make_splits,
    strata,
    train_and_validation,
)

LABELS = np.repeat([0, 1, 2], [60, 30, 10])


def parts_of(split: Split) -> list[set[int]]:
    return [set(rows.tolist()) for rows in split.parts().values()]


@pytest.mark.parametrize("seed", range(5))
def test_one_split_has_all_classes_in_their_shares(seed: int) -> None:
    (split,) = make_splits(LABELS, test_fraction=0.2, validation_fraction=0.1, seed=seed)
    train, validation, test = parts_of(split)
    assert train | validation | test == set(range(100))
    assert not train & validation | train & test | validation & test
    assert len(test) == 20
    assert len(validation) == 8
    counts = np.bincount(LABELS[split.test], minlength=3)
    assert np.abs(counts - np.array([12, 6, 2])).max() <= 1
    assert set(LABELS[split.train]) == {0, 1, 2}


def test_the_seed_decides() -> None:
    first, again, other = (make_splits(LABELS, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first.test, again.test)
    assert np.array_equal(first.validation, again.validation)
    assert not np.array_equal(first.test, other.test)


def test_rare_classes_stay_in_training() -> None:
    labels = np.concatenate([np.zeros(50, int), [1, 1], [2, 2]])
    for seed in range(20):
        (split,) = make_splits(labels, test_fraction=0.5, validation_fraction=0.5, seed=seed)
        assert set(labels[split.train]) == {0, 1, 2}


def test_every_row_is_tested_on_once_over_the_folds() -> None:
    splits = make_splits(LABELS, folds=5, seed=0)
    assert len(splits) == 5
    assert sorted(np.concatenate([split.test for split in splits])) == list(range(100))
    for split in splits:
        assert np.array_equal(np.bincount(LABELS[split.test]), [12, 6, 2])
        assert len(split.train) + len(split.validation) + len(split.test) == 100


@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_groups_stay_together(folds: int, seed: int) -> None:
    groups = np.array([f"donor{i}" for i in np.random.default_rng(seed).integers(0, 9, 100)], dtype=object)
    for split in make_splits(LABELS, groups, folds=folds, seed=seed):
        names = [set(groups[rows]) for rows in split.parts().values()]
        assert all(len(rows) for rows in split.parts().values())
        assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]


def test_numbers_are_shared_by_range() -> None:
    numbers = np.random.default_rng(0).exponential(size=200)
    assert np.array_equal(np.bincount(strata(numbers, 200)), [20] * 10)
    (split,) = make_splits(numbers, test_fraction=0.25)
    assert abs(np.median(numbers[split.test]) - np.median(numbers)) < 0.1
    (without,) = make_splits(None, num_rows=40)
    assert len(without.test) == 8


def test_leakage_is_an_error() -> None:
    rows = np.arange(10)
    with pytest.raises(ValueError, match=r"leakage: 2 cells are in train and in test"):
        check_split(Split(rows[:6], rows[6:8], rows[4:6]), None)
    groups = np.array(list("aabbccddee"), dtype=object)
    check_split(Split(rows[:4], rows[4:6], rows[6:]), groups)
    with pytest.raises(ValueError, match=r"leakage: 1 groups are in train and in validation \(b\)"):
        check_split(Split(rows[:3], rows[3:6], rows[6:]), groups)


def test_cells_that_stand_twice_leak() -> None:
    split = Split(np.arange(4), np.array([4]), np.arange(5, 9))
    contents = np.array([1, 2, 3, 4, 5, 6, 2, 7, 3])
    with pytest.raises(ValueError, match=r"leakage: 2 test cells hold exactly the counts .*cell 6 is one"):
        check_duplicates(split, contents, np.full(9, 60))
    check_duplicates(split, contents, np.full(9, 5))  # so few genes may be equal by chance
    check_duplicates(split, np.arange(9), np.full(9, 60))


def test_a_column_can_give_the_split() -> None:
    column = ["train"] * 5 + ["validation", "test", "nan", "test"]
    split = given_split(column, None)
    assert [rows.tolist() for rows in split.parts().values()] == [[0, 1, 2, 3, 4], [5], [6, 8]]
    with pytest.raises(ValueError, match=r"leakage: 1 groups are in train and in test"):
        given_split(["train", "train", "test"], np.array(["a", "b", "b"], dtype=object))
    with pytest.raises(ValueError, match=r"'fold' of obs holds 'valid'"):
        given_split(["train", "valid", "test"], None, "fold")
    with pytest.raises(ValueError, match=r"no cell with 'test'"):
        given_split(["train", "train"], None)


def test_too_few_groups_or_cells() -> None:
    groups = np.array(["a", "b"] * 50, dtype=object)
    with pytest.raises(ValueError, match=r"2 groups \(a, b\) are too few: 3 are needed"):
        make_splits(LABELS, groups)
    with pytest.raises(ValueError, match=r"5 are needed"):
        make_splits(LABELS, np.array(list("abcd") * 25, dtype=object), folds=5)
    with pytest.raises(ValueError, match="2 cells are too few"):
        make_splits(np.array([0, 1]))
    with pytest.raises(ValueError, match="no class has two cells"):
        train_and_validation(np.arange(3), np.array([0, 1, 2]), None, 0.5, 0)


@pytest.mark.parametrize("classes", [1, 2, 5, 30])
def test_groups_are_shared_out_as_by_scikit_learn(classes: int) -> None:
    """Groups of one size and class, which tie, and of many; a few folds, and more than numpy adds in one go."""
    from sklearn.model_selection import StratifiedGroupKFold

    random = np.random.default_rng(classes)
    for folds, most in ((2, 1), (5, 1), (5, 4), (20, 6)):
        groups = np.repeat(np.arange(250), random.integers(1, most + 1, 250)).astype(str)
        kinds = random.integers(0, classes, len(groups))
        ours, theirs = (
            [test.tolist() for _, test in splitter.split(kinds, kinds, groups)]
            for splitter in (_splitter_of_groups(folds, 3), StratifiedGroupKFold(folds, shuffle=True, random_state=3))
        )
        assert ours == theirs
