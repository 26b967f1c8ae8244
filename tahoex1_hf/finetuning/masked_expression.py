# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What continued masked-expression training has learnt about the user's cells, beside constants and the base."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.encoder import length_sorted_batches
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.labelled_cells import LabelledCells
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.training.checkpoints import write_atomically

logger = logging.getLogger(__name__)

_TOKENS = 8192  # of a batch
_BASELINE_CELLS = 20_000  # training cells from which the constants are learnt


@torch.no_grad()
def masked_losses(
    config: FinetuneConfig, cells: LabelledCells, split: Split, base: Any, model: Any
) -> dict[str, float]:
    """Mean squared errors at the hidden genes of the test cells, in the unit of the loss; the same genes for all.

    Returns:
        `mean`: predicting the mean of the training cells' values everywhere; `gene_mean`: each gene's; `base`: the
        model that was started from; `model`: the one that was trained. The last two are means of both decoders'
        errors; `base_expression` and `model_expression` are the first decoder's alone, comparable to the constants.
    """
    objective = Objective(config, cells, split.train)
    means, mean = _gene_means(config, cells, split)
    unit = 2 / (base.config.num_bins - 2) if base.config.scale_targets else 1.0
    sums = dict.fromkeys(("mean", "gene_mean", "base", "model", "base_expression", "model_expression"), 0.0)
    targets = 0
    device = next(model.parameters()).device
    base.eval(), model.eval()
    for rows in length_sorted_batches(cells.lengths[split.test], _TOKENS):
        batch = objective.batch(split.test[rows], HELD_OUT)
        hidden = batch["target_mask"].numpy()
        truth, genes = batch["labels"].numpy()[hidden].astype(np.float64), batch["input_ids"].numpy()[hidden]
        targets += len(truth)
        sums["mean"] += float(((unit * (truth - mean)) ** 2).sum())
        sums["gene_mean"] += float(((unit * (truth - means[genes])) ** 2).sum())
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        for name, each in (("base", base), ("model", model)):
            outputs: Any = each(**batch, num_items_in_batch=1)
            sums[name] += float(outputs.loss)
            sums[f"{name}_expression"] += float(outputs.expression_loss)
    return {name: total / max(1, targets) for name, total in sums.items()}


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
        losses: what `masked_losses` found for each split.

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
    write_atomically(folder / "report.json", {"task": "masked_expression", "means": means, "splits": losses})
    for line in [*lines, *verdicts]:
        logger.info(line)
    return means, " ".join(verdicts)


def verdict(model: float, other: float, name: str) -> str:
    """Whether the model's error is below another, in words."""
    change = 100 * (model - other) / other
    does = "beats" if model < other else "does not beat"
    return f"The model {does} {name}: its error is {abs(change):.1f} % {'lower' if change < 0 else 'higher'}."
