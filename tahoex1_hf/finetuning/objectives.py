# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The loss of a training step, and the same loss on validation cells, whatever their batches."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.config import (
    ClassificationConfig,
    FinetuneConfig,
    MaskedExpressionConfig,
    RegressionConfig,
)

# The "epoch" that decides the masked genes of validation and test cells, which are always the same.
HELD_OUT = 2**32


def class_weights(labels: np.ndarray, num_classes: int, kind: str) -> np.ndarray:
    """Return the weight of each class, `(classes,)` float32, with mean 1 over the cells.

    Args:
        labels: Class numbers of the training cells, shape `(cells,)`.
        num_classes: Number of classes; those that no training cell has get 1.
        kind: `"balanced"` for weights inverse to the number of cells, or `"none"`.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if kind == "none":
        return np.ones(num_classes, dtype=np.float32)
    present = counts > 0
    weights = np.ones(num_classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights.astype(np.float32)


class Objective:
    """Loss of a task on cells.

    Args:
        config: Configuration of the run.
        cells: Cells, with labels except for masked expression.
        train: Rows to train on, which set class weights, or mean and scale of the numbers.

    Attributes:
        mean: Mean of the numbers to predict.
        scale: Standard deviation of these numbers.
    """

    def __init__(self, config: FinetuneConfig, cells: FinetuningData, train: np.ndarray):
        self.config, self.cells = config, cells
        self.mean, self.scale = 0.0, 1.0
        self.weights: torch.Tensor | None = None
        self.collator: CellCollator | None = None
        if isinstance(config, ClassificationConfig):
            labels = cast(np.ndarray, cells.labels)[train]
            weights = class_weights(labels, len(cells.classes or ()), config.class_weights)
            self.weights = torch.from_numpy(weights)
        elif isinstance(config, RegressionConfig):
            labels = cast(np.ndarray, cells.labels)[train]
            self.mean, self.scale = float(labels.mean()), float(labels.std()) or 1.0
        elif isinstance(config, MaskedExpressionConfig):
            self.collator = CellCollator(cells.tokenizer, mlm_probability=config.mlm_probability)

    def batch(self, rows: np.ndarray, epoch: int) -> dict[str, Any]:
        """Return the arguments of the model for some cells, with labels in the unit of the loss."""
        if self.collator is not None:
            return self.cells.masked_batch(self.collator, rows, self.config.seed, epoch)
        batch = self.cells.batch(rows)
        if self.config.task == "regression":
            batch["labels"] = (batch["labels"] - self.mean) / self.scale
        return batch

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the loss of a microbatch; those of a step add up to the mean over its `num_items_in_batch` cells."""
        losses, _ = self._losses(outputs.logits, labels)
        return losses.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted losses and the weights, shape `(cells,)` each."""
        logits = logits.float()
        if self.weights is None:
            return (logits.squeeze(1) - labels).square(), torch.ones_like(labels)
        weights = self.weights.to(logits.device)
        return cross_entropy(logits, labels, weight=weights, reduction="none"), weights[labels]

    def sums(self, model: Callable[..., Any], batch: dict[str, Any]) -> torch.Tensor:
        """Return sums over a batch as a `(3,)` float64 tensor: losses, what to divide them by, and hits."""
        if self.collator is not None:
            outputs = model(**batch, num_items_in_batch=1)  # then the loss is the sum over the targets
            return torch.stack(
                [outputs.loss.double(), batch["target_mask"].sum().double(), outputs.loss.new_zeros(())]
            )
        labels = batch.pop("labels")
        logits = model(**batch).logits
        losses, weights = self._losses(logits, labels)
        hits = logits.argmax(1) == labels if self.weights is not None else torch.zeros_like(labels)
        return torch.stack([losses.double().sum(), weights.double().sum(), hits.double().sum()])

    def metrics(self, sums: torch.Tensor, num_cells: int) -> dict[str, float]:
        """Return the metrics that follow from the sums over all cells."""
        found = {"loss": float(sums[0] / sums[1].clamp(min=1e-12))}
        return found | ({"accuracy": float(sums[2]) / num_cells} if self.weights is not None else {})
