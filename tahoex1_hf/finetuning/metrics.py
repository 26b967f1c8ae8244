# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of a test set, and their means and intervals over several test sets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tahoex1_hf.runs.report import interval

# The metric by which models are compared, and whether more is better.
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


def classification_metrics(
    truth: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray | None = None
) -> dict[str, float]:
    """Compute metrics of predicted classes.

    Args:
        truth: Class numbers, shape `(cells,)`.
        predicted: Predicted class numbers, shape `(cells,)`.
        probabilities: Probabilities of the classes, shape `(cells, classes)`.

    Returns:
        `accuracy`; `balanced_accuracy`, the mean recall of the classes in `truth`; `macro_f1`, the mean F1 of the
        classes in `truth` or `predicted`; and, with probabilities, `auroc`: the mean area under the ROC curve of one
        class against the rest, over the classes that some but not all of the cells have. Without such a class, it is
        left out.

    Raises:
        ValueError: For arrays of different lengths, or without cells.
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
    """Compute metrics of predicted numbers.

    Args:
        truth: Numbers, shape `(cells,)`.
        predicted: Predicted numbers, shape `(cells,)`.

    Returns:
        `rmse` and `mae`, in the unit of the numbers; `r2`, `pearson` and `spearman`. Undefined metrics, such as a
        correlation with a constant, are left out.

    Raises:
        ValueError: For arrays of different lengths, or without cells.
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


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return the `interval` of the differences ours - theirs, fold by fold: what folds have in common cancels."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} values cannot be compared one by one.")
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])
