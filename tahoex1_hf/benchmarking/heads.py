# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Heads that read the memberships of many sets from embeddings at once: logistic regressions, and an MLP."""

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

_BATCH, _LEARNING_RATE, _SLOWER_AFTER, _PATIENCE = 256, 1e-3, 7, 15  # as in the original
# The original's 10,000 are only reached where sets are told without a fault; on real genes it takes 20 to 200.
_MOST_EPOCHS = 1000


class Shape(NamedTuple):
    """Shape of an MLP: width of the hidden layers, their number, and the share of their outputs that is dropped."""

    width: int
    layers: int
    dropout: float


GRIDS = {
    "full": [Shape(*each) for each in itertools.product((64, 512, 1024, 2048), (1, 2), (0.0, 0.1, 0.5))],
    "small": [Shape(*each) for each in itertools.product((64, 512), (1, 2), (0.1,))],
}
"""Shapes that are tried: `full` has those of the original, `small` what a CPU trains in a sixth of the steps."""


def logistic_scores(features: np.ndarray, members: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Fit a logistic regression to every set, and return the log odds of the test rows, `(test rows, sets)`.

    The regressions are those of scikit-learn with C = 1, found together, which takes a fiftieth of the time.

    Args:
        features: Embeddings of the training rows, of mean 0 and variance 1, shape `(rows, width)`.
        members: Whether a row is in a set, shape `(rows, sets)`.
        tested: Embeddings of the test rows, shape `(test rows, width)`.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    truth = members.astype(np.float64)
    shape = (inputs.shape[1], truth.shape[1])

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        odds = inputs @ weights
        penalised = np.concatenate([weights[:-1], np.zeros((1, shape[1]))])  # the intercept is not penalised
        value = (np.logaddexp(0, odds) - truth * odds).sum() + (penalised**2).sum() / 2
        return float(value), (inputs.T @ (expit(odds) - truth) + penalised).ravel()

    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    weights = found.x.reshape(shape)
    return np.asarray(tested @ weights[:-1] + weights[-1])


class Part(NamedTuple):
    """Rows of one part of the data.

    Attributes:
        features: Embeddings, shape `(rows, width)`.
        members: Whether a row is in a set, shape `(rows, sets)`.
    """

    features: np.ndarray
    members: np.ndarray


def mlp_scores(
    train: Part, validation: Part, choosing: Part, tested: np.ndarray, grid: Sequence[Shape], seed: int
) -> np.ndarray:
    """Train an MLP of every shape, and return the log odds of the test rows by the best, `(test rows, sets)`.

    Args:
        train: Part to train on.
        validation: Part whose loss ends the training, and decides which of its states is kept.
        choosing: Part whose loss decides which shape is the best.
        tested: Embeddings of the test rows, shape `(test rows, width)`.
        grid: Shapes.
        seed: Seed of the weights, the order of the rows and the dropout.
    """
    best, scores = float("inf"), np.zeros((len(tested), train.members.shape[1]))
    with torch.random.fork_rng(devices=[]):
        for shape in grid:
            torch.manual_seed(seed)
            model = _trained(shape, train, validation)
            loss = _loss(model, choosing)
            if loss < best:
                with torch.inference_mode():
                    best, scores = loss, model(_tensor(tested)).double().numpy()
    return scores


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


@torch.inference_mode()
def _loss(model: nn.Module, part: Part) -> float:
    odds = model(_tensor(part.features)).double()
    return float(binary_cross_entropy_with_logits(odds, _tensor(part.members).double()))


def _trained(shape: Shape, train: Part, validation: Part) -> nn.Module:
    """Train an MLP until the validation loss has not fallen for 15 epochs, and return its best state."""
    layers: list[nn.Module] = [nn.Linear(train.features.shape[1], shape.width), nn.LeakyReLU()]
    for _ in range(shape.layers - 1):
        layers += [nn.Dropout(shape.dropout), nn.Linear(shape.width, shape.width), nn.LeakyReLU()]
    model = nn.Sequential(*layers, nn.Dropout(shape.dropout), nn.Linear(shape.width, train.members.shape[1]))
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=_SLOWER_AFTER)
    features, members = _tensor(train.features), _tensor(train.members)
    best, kept, waited = float("inf"), model.state_dict(), 0
    for _ in range(_MOST_EPOCHS):
        model.train()
        for rows in torch.randperm(len(features)).split(_BATCH):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(features[rows]), members[rows]).backward()
            optimizer.step()
        model.eval()
        loss = _loss(model, validation)
        scheduler.step(loss)
        waited += 1
        if loss < best:
            best, kept, waited = loss, copy.deepcopy(model.state_dict()), 0
        elif waited == _PATIENCE:
            break
    model.load_state_dict(kept)
    return model
