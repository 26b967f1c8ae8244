# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What continued masked-expression training has learnt about the user's cells, beside constants and the base."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.common.files import write_json
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.finetuning.cells.labelled import LabelledCells
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.inference.encoder import length_sorted_batches

logger = logging.getLogger(__name__)

_TOKENS = 8192  # of a batch
_BASELINE_CELLS = 20_000  # training cells from which the constants are learnt


@torch.no_grad()
def model_errors(config: FinetuneConfig, cells: LabelledCells, split: Split, model: Any) -> tuple[float, float]:
    """A model's mean squared errors at the hidden genes of the test cells, in the unit of the loss.

    Returns:
        The mean of both decoders' errors, and the first decoder's, which reads each gene's context.
    """
    model.eval()
    device = next(model.parameters()).device
    sums, targets = np.zeros(2), 0
    for batch in _test_batches(config, cells, split):
        targets += int(batch["target_mask"].sum())
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        outputs: Any = model(**batch, num_items_in_batch=1)  # the sums over the targets
        sums += [float(outputs.loss), float(outputs.expression_loss)]
    both, expression = sums / max(1, targets)
    return float(both), float(expression)


def constant_errors(
    config: FinetuneConfig, cells: LabelledCells, split: Split, model: TahoeX1Config
) -> tuple[float, float]:
    """The same of constants learnt from the training cells: the mean value, and each gene's mean value."""
    means, mean = _gene_means(config, cells, split)
    unit = 2 / (model.num_bins - 2) if model.scale_targets else 1.0
    sums, targets = np.zeros(2), 0
    for batch in _test_batches(config, cells, split):
        hidden = batch["target_mask"].numpy()
        truth, genes = batch["labels"].numpy()[hidden].astype(np.float64), batch["input_ids"].numpy()[hidden]
        targets += len(truth)
        sums += [((unit * (truth - mean)) ** 2).sum(), ((unit * (truth - means[genes])) ** 2).sum()]
    constant, per_gene = sums / max(1, targets)
    return float(constant), float(per_gene)


def _test_batches(config: FinetuneConfig, cells: LabelledCells, split: Split) -> Iterator[dict[str, Any]]:
    """Of the test cells, always with the same genes hidden."""
    objective = Objective(config, cells, split.train)
    for rows in length_sorted_batches(cells.lengths[split.test], _TOKENS):
        yield objective.batch(split.test[rows], HELD_OUT)


def _gene_means(config: FinetuneConfig, cells: LabelledCells, split: Split) -> tuple[np.ndarray, float]:
    """Mean value of each token in the training cells, `(vocabulary,)`, and of all."""
    everything = CellCollator(cells.tokenizer, mlm_probability=1.0)
    size = len(cells.tokenizer)
    sums, counts = np.zeros(size), np.zeros(size)
    for start in range(0, min(len(split.train), _BASELINE_CELLS), 64):
        batch = cells.masked_batch(everything, split.train[start : start + 64], config.seed, HELD_OUT)
        targets = batch["target_mask"].numpy()
        genes = batch["input_ids"].numpy()[targets]
        sums += np.bincount(genes, weights=batch["labels"].numpy()[targets], minlength=size)
        counts += np.bincount(genes, minlength=size)
    mean = sums.sum() / max(1, counts.sum())
    return np.where(counts > 0, sums / np.maximum(counts, 1), mean), float(mean)


_ROWS = {
    "mean": "mean value of all genes",
    "gene_mean": "each gene's mean value",
    "base_expression": "base, from each gene's context",
    "model_expression": "this model, from each gene's context",
    "base": "base, mean of both decoders",
    "model": "this model, mean of both decoders",
}


def write_masked_report(folder: Path, losses: list[dict[str, float]]) -> tuple[dict[str, float], str]:
    """Write `report.json` and `report.md`.

    Args:
        folder: to write into.
        losses: for each split, the errors of the rows below.

    Returns:
        Means over the splits, and how they compare, in words.
    """
    means = {name: float(np.mean([each[name] for each in losses])) for name in _ROWS}
    lines = [f"| {title} | {means[name]:.4f} |" for name, title in _ROWS.items()]
    verdicts = [
        verdict(means["model_expression"], means["gene_mean"], "the constants (each gene's mean)"),
        verdict(means["model"], means["base"], "the base"),
    ]
    splits = "the test cells" if len(losses) == 1 else f"the test cells of {len(losses)} splits (mean)"
    text = [
        "# Masked expression",
        "",
        f"Mean squared error at hidden genes of {splits}; less is better.",
        "",
        "| predictor | error |",
        "|---|---|",
        *lines,
        "",
        *verdicts,
    ]
    (folder / "report.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    write_json(folder / "report.json", {"task": "masked_expression", "means": means, "splits": losses})
    for line in [*lines, *verdicts]:
        logger.info(line)
    return means, " ".join(verdicts)


def verdict(model: float, other: float, name: str) -> str:
    """Whether the model's error is below another, in words."""
    change = 100 * (model - other) / other
    does = "beats" if model < other else "does not beat"
    return f"The model {does} {name}: its error is {abs(change):.1f} % {'lower' if change < 0 else 'higher'}."
