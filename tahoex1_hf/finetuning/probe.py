# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Linear probe: logistic or ridge regression on the frozen cell embeddings, put into the head of the model."""

import logging
from typing import Any, cast

import numpy as np
import torch

from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.labelled_cells import LabelledCells
from tahoex1_hf.finetuning.splits import Split

logger = logging.getLogger(__name__)

# Cells from which a head is fitted that is trained further.
_START_CELLS = 10_000
# Strengths of regularisation that are tried, from strong to weak; the validation cells choose.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def fit_probe(
    features: np.ndarray, cells: LabelledCells, split: Split, config: FinetuneConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a linear model to the training cells.

    Args:
        features: `(cells, width)` embeddings of all cells; those of the test cells are not looked at.
        cells: with labels.
        split: of the cells.
        config: of the run.

    Returns:
        Weights `(outputs, width)` and biases `(outputs,)` of a linear layer on the embeddings as they are.
    """
    from sklearn.preprocessing import StandardScaler

    labels = cast(np.ndarray, cells.labels)
    scaler = StandardScaler().fit(features[split.train])
    x, y = scaler.transform(features[split.train]), labels[split.train]
    seen = scaler.transform(features[split.validation]), labels[split.validation]
    fit = _fit_numbers if config.task == "regression" else _fit_classes
    tried = [_all_classes(*fit(x, y, strength, config), y, cells) for strength in _STRENGTHS]
    losses = [_loss(weights, bias, *seen, config.task) for weights, bias in tried]
    best = int(np.argmin(losses))
    logger.info("Linear probe: C=%g, loss on the validation cells %.4f.", _STRENGTHS[best], losses[best])
    weights, bias = tried[best]
    # The scaling of the features becomes part of the layer.
    weights = weights / scaler.scale_
    return weights, bias - weights @ scaler.mean_


def some_of_each(rows: np.ndarray, cells: LabelledCells, seed: int) -> np.ndarray:
    """At most so many rows that a probe is fitted in seconds, drawn from every class."""
    shuffled = np.random.default_rng(seed).permutation(rows)
    if cells.classes is None:
        return np.sort(shuffled[:_START_CELLS])
    labels = cast(np.ndarray, cells.labels)[shuffled]
    share = max(1, _START_CELLS // len(cells.classes))
    return np.sort(np.concatenate([shuffled[labels == kind][:share] for kind in range(len(cells.classes))]))


def _fit_classes(x: np.ndarray, y: np.ndarray, strength: float, config: FinetuneConfig) -> tuple[Any, Any]:
    from sklearn.linear_model import LogisticRegression

    balanced = "balanced" if config.class_weights == "balanced" else None
    model = LogisticRegression(C=strength, max_iter=2000, class_weight=balanced).fit(x, y)
    if len(model.coef_) == 1:  # two classes: the logit of the second against a first of zero
        return np.concatenate([0 * model.coef_, model.coef_]), np.array([0.0, model.intercept_[0]])
    return model.coef_, model.intercept_


def _fit_numbers(x: np.ndarray, y: np.ndarray, strength: float, config: FinetuneConfig) -> tuple[Any, Any]:
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1 / strength).fit(x, y)
    return model.coef_[None, :], np.array([model.intercept_])


def _loss(weights: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray, task: str) -> float:
    outputs = x @ weights.T + bias
    if task == "regression":
        return float(((outputs[:, 0] - y) ** 2).mean())
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(outputs), torch.from_numpy(y)))


def _all_classes(
    weights: np.ndarray, bias: np.ndarray, y: np.ndarray, cells: LabelledCells
) -> tuple[np.ndarray, np.ndarray]:
    """A row for every class; one that no training cell has is never predicted."""
    if cells.classes is None:
        return weights, bias
    present = np.unique(y)
    every = np.zeros((len(cells.classes), weights.shape[1]))
    biases = np.full(len(cells.classes), -100.0)
    every[present], biases[present] = weights, bias
    return every, biases


@torch.no_grad()
def set_head(head: torch.nn.Linear, weights: np.ndarray, bias: np.ndarray) -> None:
    """Put fitted weights into a linear layer."""
    head.weight.copy_(torch.from_numpy(weights))
    head.bias.copy_(torch.from_numpy(bias))


@torch.no_grad()
def in_units(head: torch.nn.Linear, mean: float, scale: float) -> None:
    """Let a layer that learnt standardised numbers give them in their own unit."""
    head.weight.mul_(scale)
    head.bias.mul_(scale).add_(mean)
