# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Linear probe: logistic or ridge regression on frozen embeddings, whose weights become the head of the model."""

import logging
from typing import Any, cast

import numpy as np
import torch

from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.config import ClassesConfig, FinetuneConfig
from tahoex1_hf.finetuning.splits import Split

logger = logging.getLogger(__name__)

# Most cells to which a head is fitted before it is trained further.
_START_CELLS = 10_000
# Values of C that are tried, from strong to weak regularisation; the validation cells choose.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
# A fit ends when the largest entry of the loss's gradient is below the first number while choosing a strength, and
# below the second for the chosen one. With the second, differences in the last digits of the embeddings stay in the
# last digits of the logits.
_SEARCH_TOLERANCE, _TOLERANCE = 1e-5, 1e-8


def fit_probe(
    features: np.ndarray, cells: FinetuningData, split: Split, config: FinetuneConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a linear model to the training cells.

    Args:
        features: Embeddings of all cells, shape `(cells, width)`; those of the test cells are not used.
        cells: Cells with labels.
        split: Split of the cells.
        config: Configuration of the run.

    Returns:
        Weights `(outputs, width)` and biases `(outputs,)` of a linear layer on the embeddings as they are.
    """
    from sklearn.preprocessing import StandardScaler

    labels = cast(np.ndarray, cells.labels)
    # With float32 features, scikit-learn would compute in float32 and stop short of the tolerance.
    train, validation = (features[part].astype(np.float64) for part in (split.train, split.validation))
    scaler = StandardScaler().fit(train)
    x, y = scaler.transform(train), labels[split.train]
    seen = scaler.transform(validation), labels[split.validation]
    model = _classifier(config) if isinstance(config, ClassesConfig) else _regression()
    best, lowest = _STRENGTHS[0], np.inf
    for strength in _STRENGTHS:
        loss = _loss(*_fit(model, strength, _SEARCH_TOLERANCE, x, y, cells), *seen, config.task)
        if loss > lowest:  # weaker regularisation would overfit, and take longest
            break
        best, lowest = strength, loss
    logger.info("Linear probe: C=%g, loss on the validation cells %.4f.", best, lowest)
    weights, bias = _fit(model, best, _TOLERANCE, x, y, cells)
    # The scaling of the features becomes part of the layer.
    weights = weights / scaler.scale_
    return weights, bias - weights @ scaler.mean_


def some_of_each(rows: np.ndarray, cells: FinetuningData, seed: int) -> np.ndarray:
    """Return some random rows of every class, so few that a probe is fitted in seconds."""
    shuffled = np.random.default_rng(seed).permutation(rows)
    if cells.classes is None:
        return np.sort(shuffled[:_START_CELLS])
    labels = cast(np.ndarray, cells.labels)[shuffled]
    share = max(1, _START_CELLS // len(cells.classes))
    return np.sort(np.concatenate([shuffled[labels == kind][:share] for kind in range(len(cells.classes))]))


def _classifier(config: ClassesConfig) -> Any:
    from sklearn.linear_model import LogisticRegression

    balanced = "balanced" if config.class_weights == "balanced" else None
    # Newton's method reaches the tolerance where L-BFGS is slow; each fit starts from the previous one.
    return LogisticRegression(solver="newton-cg", warm_start=True, max_iter=1000, class_weight=balanced)


def _regression() -> Any:
    from sklearn.linear_model import Ridge

    return Ridge()


def _fit(
    model: Any, strength: float, tolerance: float, x: np.ndarray, y: np.ndarray, cells: FinetuningData
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and biases of every output at a strength of regularisation."""
    if cells.classes is None:
        model.set_params(alpha=1 / strength).fit(x, y)
        return model.coef_[None, :], np.array([model.intercept_])
    model.set_params(C=strength, tol=tolerance).fit(x, y)
    weights, bias = model.coef_, model.intercept_
    if len(weights) == 1:  # two classes: the logit of the second against a first of zero
        weights, bias = np.concatenate([0 * weights, weights]), np.array([0.0, bias[0]])
    return _all_classes(weights, bias, y, cells)


def _loss(weights: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray, task: str) -> float:
    outputs = x @ weights.T + bias
    if task == "regression":
        return float(((outputs[:, 0] - y) ** 2).mean())
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(outputs), torch.from_numpy(y)))


def _all_classes(
    weights: np.ndarray, bias: np.ndarray, y: np.ndarray, cells: FinetuningData
) -> tuple[np.ndarray, np.ndarray]:
    """Add rows for classes that no training cell has, which are never predicted."""
    classes = cast(list[str], cells.classes)
    present = np.unique(y)
    every = np.zeros((len(classes), weights.shape[1]))
    biases = np.full(len(classes), -100.0)
    every[present], biases[present] = weights, bias
    return every, biases


@torch.no_grad()
def set_head(head: torch.nn.Linear, weights: np.ndarray, bias: np.ndarray) -> None:
    """Put fitted weights into a linear layer."""
    head.weight.copy_(torch.from_numpy(weights))
    head.bias.copy_(torch.from_numpy(bias))


@torch.no_grad()
def predict_in_own_units(head: torch.nn.Linear, mean: float, scale: float) -> None:
    """Rescale a layer that learnt standardised numbers, so that it gives them in their own unit."""
    head.weight.mul_(scale)
    head.bias.mul_(scale).add_(mean)
