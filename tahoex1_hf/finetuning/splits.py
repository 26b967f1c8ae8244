# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Splits of rows (cells, genes, conditions) into parts to train on, to validate on for early stopping, and to test on.

Random splits give every part all classes (or all ranges of a number) in about the same shares. With groups (donors,
batches, cell lines), no group is in two parts: cells of one donor are alike for reasons that have nothing to do with
the label, and a model tested on a donor that it was trained on seems better than it is.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")
_RANGES = 10  # ranges of a number that are shared evenly between the parts
_CERTAIN_GENES = 50  # equal counts of so many genes cannot be a coincidence: the cells are duplicates


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers, rising, of the three parts; `validation` and `test` may be empty."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def parts(self) -> dict[str, np.ndarray]:
        """Return the parts by name."""
        return {name: getattr(self, name) for name in PARTS}


def strata(labels: np.ndarray | None, num_rows: int) -> np.ndarray:
    """Return the kinds of rows that parts share evenly, shape `(rows,)`: classes, equal ranges of floats, or zeros."""
    if labels is None:
        return np.zeros(num_rows, dtype=np.int64)
    if labels.dtype.kind != "f":
        return np.unique(labels, return_inverse=True)[1]
    edges = np.unique(np.quantile(labels, np.linspace(0, 1, _RANGES + 1)[1:-1]))
    return np.searchsorted(edges, labels, side="right")


def make_splits(
    labels: np.ndarray | None,
    groups: np.ndarray | None = None,
    *,
    num_rows: int | None = None,
    folds: int = 1,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> list[Split]:
    """Make random splits.

    Args:
        labels: Classes (integers, text) or numbers (floats), shape `(rows,)`; None where there are none.
        groups: Groups, none of which is in two parts, shape `(rows,)`; None without groups.
        num_rows: Number of rows, where there are no labels.
        folds: Number of splits. With 1, `test_fraction` of the rows are tested; with more, every row is tested once.
        test_fraction: Share of the rows to test on, with one fold.
        validation_fraction: Share of the other rows to validate on.
        seed: Seed of the splits.

    Returns:
        One split per fold.

    Raises:
        ValueError: For too few rows or groups.
    """
    if labels is None and num_rows is None:
        raise ValueError("num_rows is missing: without labels, pass the number of rows.")
    total = len(labels) if labels is not None else int(num_rows or 0)
    kinds = strata(labels, total)
    everything = np.arange(total)
    _check_enough(everything, groups, max(folds, 3))
    if folds > 1:
        tests = _folds(kinds, groups, folds, seed)
    else:
        tests = [_part(everything, kinds, groups, test_fraction, seed)]
    splits = []
    for number, test in enumerate(tests):
        split = train_and_validation(
            np.setdiff1d(everything, test), labels, groups, validation_fraction, seed + 1 + number, test=test
        )
        check_split(split, groups)
        splits.append(split)
    return splits


def train_and_validation(
    rows: np.ndarray,
    labels: np.ndarray | None,
    groups: np.ndarray | None,
    validation_fraction: float,
    seed: int,
    test: np.ndarray | None = None,
) -> Split:
    """Divide rows between training and validation.

    Args:
        rows: Row numbers to divide.
        labels: Labels of all rows, as for `make_splits`.
        groups: Groups of all rows, as for `make_splits`.
        validation_fraction: Share of `rows` to validate on.
        seed: Seed of the split.
        test: Rows to test on, which become part of the split.

    Raises:
        ValueError: For too few rows or groups.
    """
    _check_enough(rows, groups, 2)
    kinds = strata(labels, int(rows.max()) + 1 if labels is None else len(labels))
    validation = _part(rows, kinds, groups, validation_fraction, seed)
    none = np.zeros(0, dtype=np.int64)
    return Split(np.setdiff1d(rows, validation), validation, none if test is None else np.sort(test))


def given_split(parts: Sequence[object] | np.ndarray, groups: np.ndarray | None, name: str = "split") -> Split:
    """Return the split that a column gives.

    Args:
        parts: `"train"`, `"validation"` or `"test"`, shape `(rows,)`; rows with a missing value are left out.
        groups: Groups, shape `(rows,)`, or None.
        name: Name of the column, for errors.

    Raises:
        ValueError: For other values, no row to train on or to test on, or a group in two parts.
    """
    values = np.array([str(value) for value in parts])
    missing = np.isin(values, ("", "nan", "None", "<NA>", "NaN"))
    unknown = sorted(set(values[~missing].tolist()) - set(PARTS))
    if unknown:
        raise ValueError(
            f"the column {name!r} of obs holds {', '.join(map(repr, unknown[:3]))}: it must hold {', '.join(PARTS)}."
        )
    split = Split(*(np.flatnonzero(values == part) for part in PARTS))
    for part in ("train", "test"):
        if not len(split.parts()[part]):
            raise ValueError(f"the column {name!r} of obs has no cell with {part!r}.")
    check_split(split, groups)
    return split


def check_split(split: Split, groups: np.ndarray | None) -> None:
    """Raise ValueError where a row, or a group, is in two parts, which is leakage."""
    parts = split.parts()
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = np.intersect1d(parts[first], parts[second])
        if len(shared):
            raise ValueError(
                f"leakage: {len(shared)} cells are in {first} and in {second} (row {shared[0]} is one): "
                "every cell belongs to one part."
            )
        if groups is not None:
            common = sorted({str(g) for g in groups[parts[first]]} & {str(g) for g in groups[parts[second]]})
            if common:
                raise ValueError(
                    f"leakage: {len(common)} groups are in {first} and in {second} ({', '.join(common[:3])}): "
                    "keep the cells of a group together, or leave group out."
                )


def check_duplicates(split: Split, contents: np.ndarray, num_genes: np.ndarray) -> None:
    """Raise ValueError where a test cell has the same counts as a training or validation cell, which is leakage too.

    Args:
        split: Split of the cells.
        contents: Numbers that are equal for cells with the same counts, shape `(cells,)`.
        num_genes: Number of expressed genes, shape `(cells,)`; with few genes, equal counts may be a coincidence, so
            they are not an error.
    """
    seen = np.concatenate([split.train, split.validation])
    seen = contents[seen[num_genes[seen] >= _CERTAIN_GENES]]
    twice = split.test[(num_genes[split.test] >= _CERTAIN_GENES) & np.isin(contents[split.test], seen)]
    if len(twice):
        raise ValueError(
            f"leakage: {len(twice)} test cells hold exactly the counts of a training or validation cell (cell "
            f"{twice[0]} is one): the data holds cells twice. Remove the duplicates, or name a column that they share "
            "as group."
        )


def _check_enough(rows: np.ndarray, groups: np.ndarray | None, needed: int) -> None:
    if len(rows) < needed:
        raise ValueError(f"{len(rows)} cells are too few for {needed} parts.")
    if groups is not None:
        names = np.unique(groups[rows].astype(str))
        if len(names) < needed:
            raise ValueError(
                f"{len(names)} groups ({', '.join(names[:5])}) are too few: {needed} are needed, so that none is in "
                "two parts. Choose a column with more groups, fewer folds, or leave group out."
            )


def _folds(kinds: np.ndarray, groups: np.ndarray | None, folds: int, seed: int) -> list[np.ndarray]:
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        # Classes with fewer cells than folds are in fewer tests.
        warnings.filterwarnings("ignore", message="The least populated class")
        if groups is None:
            if folds > np.bincount(kinds).max():
                raise ValueError(f"folds={folds}: no class has so many cells.")
            return [t for _, t in StratifiedKFold(folds, shuffle=True, random_state=seed).split(kinds, kinds)]
        splitter = _splitter_of_groups(folds, seed)
        return [test for _, test in splitter.split(kinds, kinds, groups.astype(str))]


def _splitter_of_groups(folds: int, seed: int) -> Any:
    """Return scikit-learn's splitter, whose search for each group's fold takes a tenth of the time here.

    The folds are the same: the search rounds and breaks ties as scikit-learn's, which tries one fold after another.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    class Splitter(StratifiedGroupKFold):
        def _find_best_fold(self, y_counts_per_fold: np.ndarray, y_cnt: np.ndarray, group_y_counts: np.ndarray) -> int:
            places = np.arange(folds)
            counts = np.repeat(y_counts_per_fold[None], folds, axis=0)  # of the class in each fold, by the fold tried
            counts[places, places] += group_y_counts
            spreads = np.mean(np.std(counts / y_cnt, axis=1), axis=1).tolist()
            best, least, fewest = 0, np.inf, np.inf
            for fold, size in enumerate(y_counts_per_fold.sum(axis=1).tolist()):
                close = abs(spreads[fold] - least) <= 1e-8 + 1e-5 * least < np.inf  # as numpy.isclose
                if spreads[fold] < least or (close and size < fewest):
                    best, least, fewest = fold, spreads[fold], size
            return best

    return Splitter(folds, shuffle=True, random_state=seed)


def _part(rows: np.ndarray, kinds: np.ndarray, groups: np.ndarray | None, fraction: float, seed: int) -> np.ndarray:
    """Return a random part of the rows, about `fraction` and at least one; one row of every kind stays."""
    if groups is not None:
        return _groups_part(rows, kinds, groups, fraction, seed)
    random = np.random.default_rng(seed)
    shuffled = random.permutation(rows)
    order = shuffled[np.argsort(kinds[shuffled], kind="stable")]
    _, firsts = np.unique(kinds[order], return_index=True)
    movable = np.delete(order, firsts)
    if not len(movable):
        raise ValueError(f"{len(rows)} cells of {len(firsts)} classes are too few: no class has two cells.")
    wanted = min(len(movable), max(1, round(fraction * len(rows))))
    # Taken evenly from the rows sorted by kind, each kind gives its share, rounded up or down.
    places = np.floor((np.arange(wanted) + random.random()) * len(movable) / wanted).astype(np.int64)
    return np.sort(movable[places])


def _groups_part(rows: np.ndarray, kinds: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return whole groups that together have about `fraction` of the rows, at least one group and not all."""
    names = groups[rows].astype(str)
    parts = min(len(np.unique(names)), max(2, round(1 / fraction)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        splitter = _splitter_of_groups(parts, seed)
        tests = [test for _, test in splitter.split(kinds[rows], kinds[rows], names) if len(test)]
    # The folds differ in size where groups do: take the one whose size is nearest.
    best = min(tests, key=lambda test: abs(len(test) - fraction * len(rows)))
    return np.sort(rows[best])
