# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Values of metrics with their bootstrap replicates, and comparisons of two of them.

Data of the same number of rows have the same resamples, so that the replicates of two sources that were tested on the
same rows can be subtracted one by one: what the rows have in common cancels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tahoex1_hf.runs.report import CONFIDENCE

REPLICATES = 500

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Function of the truth and of what was predicted, both of shape `(rows,)` or `(rows, columns)`."""


def bootstrapped(metric: Metric, truth: np.ndarray, predicted: np.ndarray, rows: np.ndarray, total: int) -> np.ndarray:
    """Compute a metric of the test rows of a fold and of resamples of them.

    All rows of the data are resampled, and a fold takes those that it tests: so folds that test the same rows, as with
    several seeds, do not pass for independent.

    Args:
        metric: Function that computes the metric; NaN where it is not defined.
        truth: Labels of the test rows, shape `(rows,)` or `(rows, columns)`.
        predicted: Their predictions, of the same shape.
        rows: Numbers of the test rows in the data, shape `(rows,)`.
        total: Number of rows of the data.

    Returns:
        `(1 + REPLICATES,)` float64; the first is the metric of the test rows, each once.
    """
    values = [metric(truth, predicted)]
    numbers = np.arange(len(rows))
    for times in _resamples(total):
        chosen = np.repeat(numbers, times[rows])
        values.append(metric(truth[chosen], predicted[chosen]) if len(chosen) else float("nan"))
    return np.array(values)


def _resamples(total: int) -> Iterable[np.ndarray]:
    """Return how often each row is in each resample, `(total,)` each: the same in every call."""
    return _kept_resamples(total, REPLICATES) if total <= _MOST_KEPT else _sampled(total, REPLICATES)


_MOST_KEPT = 20_000  # rows: their resamples take 10 MB


@lru_cache(maxsize=4)
def _kept_resamples(total: int, number: int) -> np.ndarray:
    return np.array(list(_sampled(total, number)), dtype=np.uint8)  # no row is taken 256 times: the mean is 1


def _sampled(total: int, number: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for _ in range(number):
        yield np.bincount(random.integers(0, total, total), minlength=total)


@dataclass(frozen=True, eq=False)
class Measurement:
    """Values of a metric in all folds.

    Attributes:
        representation: Kind of embedding of the source, `EA`; empty where there is only one.
        reader: What reads the labels from the embeddings: `kNN`.
        split: Part of the data that was scored.
        metric: Name of the metric.
        replicates: Values of the folds and their bootstrap replicates, shape `(folds, 1 + replicates)`.
        numbers: Number of cells or genes scored in each fold.
        seconds: Time to fit the reader and predict, of each fold.
    """

    representation: str
    reader: str
    split: str
    metric: str
    replicates: np.ndarray
    numbers: list[int]
    seconds: list[float]

    @property
    def value(self) -> float:
        """Mean over the folds."""
        return float(self.replicates[:, 0].mean())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the folds and seeds; None where there is one."""
        return float(self.replicates[:, 0].std(ddof=1)) if len(self.replicates) > 1 else None

    def bounds(self) -> tuple[float, float]:
        """Return the bootstrap interval of the mean over the folds."""
        return ends(_over_folds(self.replicates))


def _over_folds(replicates: np.ndarray) -> np.ndarray:
    """Return the mean over the folds, shape `(1 + replicates,)`; of a resample, over those in which it is defined."""
    known = np.isfinite(replicates)
    sums, numbers = np.where(known, replicates, 0).sum(axis=0), known.sum(axis=0)
    return np.divide(sums, numbers, out=np.full(len(sums), np.nan), where=numbers > 0)


def ends(replicates: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the first value by the others, its replicates.

    Resamples hold some rows twice, which by itself raises or lowers a metric (the agreement of clusters above all); so
    the replicates are moved until their mean is the value.
    """
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(replicates[1:], [tail, 100 - tail]) - np.nanmean(replicates[1:]) + replicates[0]
    return float(low), float(high)


def compare(ours: Measurement, theirs: Measurement) -> dict[str, float | str]:
    """Compare two sources that were tested on the same rows.

    Returns:
        `difference`, ours - theirs; `lower` and `upper`, its bootstrap interval; and `verdict`: `better`,
        `equal within the interval` or `worse`.

    Raises:
        ValueError: If the folds differ.
    """
    if ours.numbers != theirs.numbers:
        raise ValueError(f"folds of {ours.numbers} and {theirs.numbers} rows cannot be compared.")
    differences = _over_folds(ours.replicates - theirs.replicates)
    low, high = ends(differences)
    verdict = "better" if low > 0 else "worse" if high < 0 else "equal within the interval"
    return {"difference": float(differences[0]), "lower": low, "upper": high, "verdict": verdict}


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Compute the mean F1 of the classes in `truth` or `predicted`, both class numbers, shape `(rows,)`."""
    size = int(max(truth.max(), predicted.max())) + 1
    right = np.bincount(truth[truth == predicted], minlength=size)
    both = np.bincount(truth, minlength=size) + np.bincount(predicted, minlength=size)
    there = both > 0
    return float((2 * right[there] / both[there]).mean())


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Compute the area under the ROC curve; NaN where all rows have one class."""
    from scipy.stats import rankdata

    positive = int(truth.sum())
    if positive in (0, len(truth)):
        return float("nan")
    above = rankdata(scores)[truth.astype(bool)].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(truth) - positive)))


def auprc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Compute the average precision; NaN where no row is positive."""
    return macro_auprc(truth[:, None], scores[:, None])


def macro_auprc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Compute the mean average precision of the columns in which a row is positive.

    Args:
        truth: Whether a row is positive, shape `(rows, columns)`.
        scores: Scores, shape `(rows, columns)`.

    Returns:
        Mean; NaN where no column has a positive row.
    """
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, axis=0, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=0)
    positive = np.take_along_axis(truth, order, axis=0).astype(bool)
    # Rows of equal scores share the precision behind the last of them.
    rows = np.arange(len(truth))[:, None]
    last = np.ones(truth.shape, dtype=bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    behind = np.minimum.accumulate(np.where(last, rows, len(truth))[::-1], axis=0)[::-1]
    precision = np.take_along_axis(np.cumsum(positive, axis=0), behind, axis=0) / (behind + 1)
    numbers = positive.sum(axis=0)
    there = numbers > 0
    return float(((precision * positive).sum(axis=0)[there] / numbers[there]).mean())
