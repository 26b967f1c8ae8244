# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of predicted changes of expression, and the baselines that a model has to beat."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tahoex1_hf.runs.report import interval

NULL, CONTEXT_MEAN, DRUG_MEAN = "no change (control)", "mean of the context", "mean of the drug"


def pearson_rows(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation over the genes, condition by condition.

    Args:
        predicted: Predicted changes, shape `(conditions, genes)`.
        truth: Measured changes, shape `(conditions, genes)`.

    Returns:
        `(conditions,)` float64; 0 where no correlation is defined because either is constant, as for the null.
    """
    a = predicted.astype(np.float64) - predicted.astype(np.float64).mean(axis=1, keepdims=True)
    b = truth.astype(np.float64) - truth.astype(np.float64).mean(axis=1, keepdims=True)
    norms = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    defined = norms > 1e-12
    return np.divide((a * b).sum(axis=1), norms, out=np.zeros(len(a)), where=defined)


def change_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return `pearson` of the change over the genes and `mse`, `(conditions,)` each."""
    return {
        "pearson": pearson_rows(predicted, truth),
        "mse": ((predicted.astype(np.float64) - truth) ** 2).mean(axis=1),
    }


def change_baselines(
    changes: np.ndarray, drugs: np.ndarray, contexts: np.ndarray, train: np.ndarray, test: np.ndarray
) -> dict[str, np.ndarray]:
    """Predict changes without a model.

    Args:
        changes: Measured changes, shape `(conditions, genes)`; those of the test conditions are not used.
        drugs: Names of the drugs, shape `(conditions,)`.
        contexts: Names of the contexts, shape `(conditions,)`.
        train: Rows to take means over.
        test: Rows to predict.

    Returns:
        Changes `(test conditions, genes)` by baseline: no change at all; the mean change of the training conditions in
        the same context; and the mean change of those with the same drug. Where there is no such condition (because
        the drug, or the context, is held out) the mean is over all training conditions.
    """

    def mean_of(names: np.ndarray) -> np.ndarray:
        known = names[train]
        overall = changes[train].mean(axis=0)
        means = {name: changes[train[known == name]].mean(axis=0) for name in set(known) & set(names[test])}
        return np.stack([means.get(name, overall) for name in names[test]])

    return {NULL: np.zeros_like(changes[test]), CONTEXT_MEAN: mean_of(contexts), DRUG_MEAN: mean_of(drugs)}


def score(
    predictions: Mapping[str, np.ndarray], truth: np.ndarray, units: np.ndarray
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """Compute metrics of several predictions of the same conditions.

    Args:
        predictions: Predicted changes `(conditions, genes)` by name.
        truth: Measured changes, shape `(conditions, genes)`.
        units: Held-out drug (or context) of each condition, shape `(conditions,)`. Conditions of one unit
            are not independent, so that the intervals are over the means of the units.

    Returns:
        Name -> metric -> `interval` over the units; and name -> metric -> `(conditions,)`. The metrics are `pearson`
        of the change, and `mse`.
    """
    per_condition = {name: change_metrics(predicted, truth) for name, predicted in predictions.items()}
    summary = {
        name: {metric: interval(by_unit(values, units)) for metric, values in metrics.items()}
        for name, metrics in per_condition.items()
    }
    return summary, per_condition


def by_unit(values: np.ndarray, units: np.ndarray) -> list[float]:
    """Return the mean of each unit, in the order of their names."""
    return [float(values[units == unit].mean()) for unit in sorted(set(units))]
