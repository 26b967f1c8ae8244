# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of masked-expression modelling, as sums over batches and processes.

Unlike a mean of means, they do not depend on how the cells are divided.
"""

from dataclasses import dataclass

import torch


@dataclass
class MetricSums:
    """Sums over targets and cells.

    Args:
        values: Squared errors of the expression decoder, those of the cell decoder, number of targets, rank
            correlations, and number of cells that have one; shape (5,), float64, on the device of the batches.
    """

    values: torch.Tensor

    @classmethod
    def zero(cls, device: torch.device | str) -> "MetricSums":
        """Return the sums over nothing."""
        # Accelerators without float64 (Apple's) take float32.
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return cls(torch.zeros(5, dtype=dtype, device=device))

    def means(self) -> dict[str, float]:
        """Return `loss` (the mean of both errors), `masked_mse`, `mvc_mse` and `spearman`, or NaN without targets."""
        expression, cell, targets, correlations, cells = self.values.tolist()
        nan = float("nan")
        masked, mvc = (expression / targets, cell / targets) if targets else (nan, nan)
        return {
            "loss": (masked + mvc) / 2,
            "masked_mse": masked,
            "mvc_mse": mvc,
            "spearman": correlations / cells if cells else nan,
        }


def average_ranks(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the rank of each value within its group, up to a constant per group; ties share their mean rank.

    Args:
        values: Values, shape `(n,)`.
        groups: Group of each value, shape `(n,)`, int64.

    Returns:
        Ranks, shape `(n,)`, float64 (float32 on devices without float64).
    """
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    ordered, in_group = values[order], groups[order]
    starts = torch.ones(len(values), dtype=torch.bool, device=values.device)
    starts[1:] = (ordered[1:] != ordered[:-1]) | (in_group[1:] != in_group[:-1])
    tie = starts.cumsum(0) - 1
    first = starts.nonzero().squeeze(1)
    sizes = torch.bincount(tie, minlength=len(first))
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    middle = first.to(dtype) + (sizes.to(dtype) - 1) / 2
    ranks = torch.empty(len(values), dtype=dtype, device=values.device)
    ranks[order] = middle[tie]
    return ranks


def spearman_per_cell(
    predictions: torch.Tensor, counts: torch.Tensor, cells: torch.Tensor, num_cells: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rank correlation of predictions and counts within each cell.

    Args:
        predictions: Predictions at the targets of all cells, shape `(n,)`.
        counts: Raw counts there, shape `(n,)`.
        cells: Cell of each target, shape `(n,)`, int64.
        num_cells: Number of cells.

    Returns:
        Correlations, shape `(num_cells,)`, and whether the cell has one. A cell without two different values has
        none; its correlation is given as 0.
    """
    x, y = (average_ranks(values.float(), cells) for values in (predictions, counts))
    number = torch.bincount(cells, minlength=num_cells).clamp(min=1).to(x.dtype)

    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(num_cells, dtype=x.dtype, device=x.device).index_add_(0, cells, values)

    x, y = x - (total(x) / number)[cells], y - (total(y) / number)[cells]
    spread = total(x * x) * total(y * y)
    known = spread > 0
    return torch.where(known, total(x * y) / spread.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), 0.0), known


def batch_sums(
    outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], counts: torch.Tensor, scale: tuple[float, float]
) -> MetricSums:
    """Return the sums of one batch.

    Args:
        outputs: `expression_predictions` and `cell_expression_predictions`, shape `(batch, length)`.
        batch: Batch with `labels`, `target_mask` and, if it is packed, `cu_seq_lens_q`.
        counts: Raw counts at the targets, in the shape of the labels.
        scale: Factor and offset that turn labels into the model's unit (see `scale_targets`).
    """
    targets = batch["target_mask"]
    labels = batch["labels"][targets].double() * scale[0] + scale[1]
    expression, cell = (
        outputs[name][targets].double() for name in ("expression_predictions", "cell_expression_predictions")
    )
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff()
        of_token = torch.repeat_interleave(torch.arange(len(lengths), device=targets.device), lengths)
        num_cells, cells = len(lengths), of_token[targets[0]]
    else:
        num_cells, cells = len(targets), targets.nonzero()[:, 0]
    correlations, known = spearman_per_cell(expression, counts[targets], cells, num_cells)
    return MetricSums(
        torch.stack(
            [
                (expression - labels).square().sum(),
                (cell - labels).square().sum(),
                targets.sum().double(),
                correlations.sum(),
                known.sum().double(),
            ]
        )
    )
