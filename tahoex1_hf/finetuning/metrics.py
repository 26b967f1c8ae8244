# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""How good predictions are, and how sure that is: metrics of a test set, their means and intervals over several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The one that models are compared by, and whether more is better.
HEADLINE = {"classification": ("macro_f1", True), "regression": ("rmse", False)}
NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "auroc": "AUROC (one against rest)",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
CONFIDENCE = 0.95


def classification_metrics(
    truth: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray | None = None
) -> dict[str, float]:
    """Metrics of predicted classes.

    Args:
        truth: `(cells,)` class numbers.
        predicted: `(cells,)` class numbers.
        probabilities: `(cells, classes)` of each class.

    Returns:
        `accuracy`; `balanced_accuracy`, the mean recall of the classes that there are; `macro_f1`, the mean F1 of the
        classes that there are or that were predicted; and, with probabilities, `auroc`: the mean area under the ROC
        curve of one class against the rest, over the classes that some but not all of the cells have. Where there is
        no such class, it is left out.

    Raises:
        ValueError: for arrays of different lengths, or without cells.
    """
    from sklearn.metrics import f1_score, recall_score, roc_auc_score

    truth, predicted = _paired(truth, predicted)
    there = np.unique(truth)
    found = {
        "accuracy": float((truth == predicted).mean()),
        "balanced_accuracy": float(recall_score(truth, predicted, labels=there, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }
    if probabilities is not None:
        if len(probabilities) != len(truth):
            raise ValueError(f"probabilities has {len(probabilities)} rows for {len(truth)} cells.")
        areas = [roc_auc_score(truth == k, probabilities[:, k]) for k in there if (truth != k).any()]
        if areas:
            found["auroc"] = float(np.mean(areas))
    return found


def regression_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Metrics of predicted numbers.

    Args:
        truth: `(cells,)`.
        predicted: `(cells,)`.

    Returns:
        `rmse` and `mae`, in the unit of the numbers; `r2`, `pearson` and `spearman`. Those that are not defined, as a
        correlation with a constant is not, are left out.

    Raises:
        ValueError: for arrays of different lengths, or without cells.
    """
    from scipy.stats import rankdata

    truth, predicted = _paired(truth, predicted)
    truth, predicted = truth.astype(np.float64), predicted.astype(np.float64)
    errors = predicted - truth
    found = {"rmse": float(np.sqrt((errors**2).mean())), "mae": float(np.abs(errors).mean())}
    if np.ptp(truth) > 0:
        found["r2"] = float(1 - (errors**2).sum() / ((truth - truth.mean()) ** 2).sum())
        if np.ptp(predicted) > 0:
            found["pearson"] = float(np.corrcoef(truth, predicted)[0, 1])
            found["spearman"] = float(np.corrcoef(rankdata(truth), rankdata(predicted))[0, 1])
    return found


def _paired(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(f"truth {truth.shape} and predicted {predicted.shape} are not of the form (cells,) each.")
    if not len(truth):
        raise ValueError("truth is empty: there is nothing to measure.")
    return truth, predicted


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of some values, and its 95 % confidence interval by Student's t.

    The values are taken to be independent. Those of folds are not quite, since the folds share training cells
    (Bengio and Grandvalet 2004, J. Mach. Learn. Res. 5), so that the interval is somewhat too narrow.

    Returns:
        `mean`; `low` and `high`, None where there are less than two values; `values`.
    """
    from scipy.stats import t

    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
        low, high = float(mean - half), float(mean + half)
    return {"mean": mean, "low": low, "high": high, "values": [float(value) for value in values]}


def summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Metrics over folds or seeds.

    Args:
        metrics: one per fold or seed; one that lacks a metric, where it was not defined, does not count for it.

    Returns:
        By metric: `interval` of its values.
    """
    names = list(dict.fromkeys(name for each in metrics for name in each))
    return {name: interval([each[name] for each in metrics if name in each]) for name in names}


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """`interval` of the differences ours - theirs, fold by fold: what folds have in common drops out."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} values cannot be compared one by one.")
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])
