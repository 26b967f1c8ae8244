# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What a transfer of labels may be expected to give, by cross-validation in the reference; the threshold of "unknown".

With batches, whole batches are left out, as the query is another batch too; without, cells are left out at random,
which is kinder than a new study will be.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tahoex1_hf.annotation.methods import Features, Method, Votes
from tahoex1_hf.benchmarking.resampling import auroc
from tahoex1_hf.finetuning.splits import make_splits
from tahoex1_hf.runs.report import CONFIDENCE

logger = logging.getLogger(__name__)

FOLDS = 5
UNKNOWN = -1
"""Number of the class that cells farther than the threshold get."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a method says of the cells of the reference while they are left out of it.

    Attributes:
        votes: Probabilities and distances.
        scored: Whether a cell's class was in what the method learnt from, `(cells,)`; a class that one batch alone has
            is not, when that batch is left out.
        if_missing: Distances as if the cell's class were not in the reference, `(cells,)`; None for methods that would
            have to be fitted anew.
    """

    votes: Votes
    scored: np.ndarray
    if_missing: np.ndarray | None


@dataclass(frozen=True)
class Expected:
    """What may be expected of a class, each with the ends of its 95 % interval.

    Attributes:
        cells: Number of cells that were scored.
        precision: Share of the cells called so that are so; None where none is called so.
        recall: Share of the cells that are found; None where none was scored.
        auroc: Area under the ROC curve of the distance, by which cells of this class are told from the others if the
            reference lacks the class; None where it was not measured.
    """

    cells: int
    precision: tuple[float, float, float] | None
    recall: tuple[float, float, float] | None
    auroc: float | None


def make_folds(labels: np.ndarray, batches: np.ndarray | None, seed: int) -> list[np.ndarray]:
    """Return the rows that are left out together.

    Args:
        labels: Class numbers, `(cells,)`.
        batches: Names of the batches, `(cells,)`; None for random rows. More than five batches make five folds.
        seed: Seed of the folds.
    """
    if batches is not None:
        names = np.unique(batches)
        if len(names) <= FOLDS:
            return [np.flatnonzero(batches == name) for name in names]
    return [split.test for split in make_splits(labels, batches, folds=FOLDS, seed=seed) if len(split.test)]


def unscored_classes(labels: np.ndarray, folds: list[np.ndarray]) -> np.ndarray:
    """Return the numbers of the classes that lie in one fold alone: without it, nothing can be learnt of them."""
    kinds, times = np.unique(np.concatenate([np.unique(labels[fold]) for fold in folds]), return_counts=True)
    return np.asarray(kinds[times < 2])


def check_folds(
    labels: np.ndarray, batches: np.ndarray | None, classes: list[str], where: str, batch: str | None, seed: int
) -> None:
    """Raise ValueError where the cross-validation could score no class; tell of classes that it cannot score.

    Args:
        labels: Class numbers, `(cells,)`.
        batches: Names of the batches, `(cells,)`; None for random folds.
        classes: Names of the classes.
        where: Name of the reference, for messages.
        batch: Column with the batches.
        seed: Seed of the folds.
    """
    alone = unscored_classes(labels, make_folds(labels, batches, seed))
    names = [classes[number] for number in alone]
    if len(names) == len(classes):
        raise ValueError(
            f"batch={batch} of {where}: every class lies in one batch alone, so no class "
            "can be told from its batch, nor anything be expected. Name another column, or leave batch (--batch) "
            "out to leave out random cells."
        )
    if names:
        logger.warning(
            "%s: nothing can be expected of %d classes, each of which lies in one batch or fold: %s.",
            where,
            len(names),
            ", ".join(names[:5]) + (", ..." if len(names) > 5 else ""),
        )


def cross_validate(
    method: Method,
    cells: Features,
    labels: np.ndarray,
    num_classes: int,
    folds: list[np.ndarray],
    on_fold: Callable[[], object] = lambda: None,
) -> HeldOut:
    """Let a method label each cell of the reference by cells of other folds."""
    number = len(labels)
    probabilities = np.zeros((number, num_classes), dtype=np.float32)
    distance, nearest = np.zeros(number, dtype=np.float32), np.zeros(number, dtype=np.float32)
    missing: np.ndarray | None = np.full(number, np.nan, dtype=np.float32)
    scored = np.zeros(number, dtype=bool)
    for test in folds:
        train = np.setdiff1d(np.arange(number), test)
        fitted = method(cells.pick(train), labels[train], num_classes)
        votes = fitted.votes(cells.pick(test))
        probabilities[test], distance[test], nearest[test] = votes.probabilities, votes.distance, votes.nearest
        scored[test] = np.isin(labels[test], labels[train])
        for kind in np.unique(labels[test]):
            rest = fitted.without(int(kind)) if (labels[train] != kind).any() else None
            if rest is None or missing is None:
                missing = None
                break
            mine = test[labels[test] == kind]
            missing[mine] = rest.votes(cells.pick(mine)).distance
        on_fold()
    return HeldOut(Votes(probabilities, distance, nearest), scored, missing)


def find_threshold(held_out: HeldOut, unknown_share: float) -> float:
    """Return the distance beyond which `unknown_share` of the scored cells of the reference lie."""
    return float(np.quantile(held_out.votes.distance[held_out.scored], 1 - unknown_share, method="higher"))


def decide(votes: Votes, threshold: float) -> np.ndarray:
    """Return the class numbers, `(cells,)`; `UNKNOWN` for cells farther than the threshold."""
    return np.where(votes.distance > threshold, UNKNOWN, votes.probabilities.argmax(1))


def expected_of(held_out: HeldOut, labels: np.ndarray, num_classes: int, threshold: float) -> list[Expected]:
    """Return what may be expected of each class."""
    called, scored = decide(held_out.votes, threshold), held_out.scored
    found = []
    for kind in range(num_classes):
        mine, so_called = (labels == kind) & scored, (called == kind) & scored
        right = int((mine & so_called).sum())
        area = None
        if held_out.if_missing is not None:
            strange = held_out.if_missing[labels == kind]
            usual = held_out.votes.distance[scored & (labels != kind)]
            truth = np.repeat([1, 0], [len(strange), len(usual)])
            value = auroc(truth, np.concatenate([strange, usual]))
            area = None if math.isnan(value) else value
        found.append(
            Expected(int(mine.sum()), share(right, int(so_called.sum())), share(right, int(mine.sum())), area)
        )
    return found


def share(part: int, whole: int) -> tuple[float, float, float] | None:
    """Return a share and the ends of its 95 % interval by Wilson; None for a share of nothing."""
    from scipy.stats import norm

    if not whole:
        return None
    z, value = float(norm.ppf((1 + CONFIDENCE) / 2)), part / whole
    middle = (value + z**2 / (2 * whole)) / (1 + z**2 / whole)
    half = z * math.sqrt(value * (1 - value) / whole + z**2 / (4 * whole**2)) / (1 + z**2 / whole)
    return value, max(0.0, middle - half), min(1.0, middle + half)
