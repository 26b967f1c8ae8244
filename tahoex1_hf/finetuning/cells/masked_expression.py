# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Continued masked-expression training on cells without labels, scored beside constants and the base."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.finetuning.adapters import add_results
from tahoex1_hf.finetuning.bases import load_base
from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.cells.task import CellTask
from tahoex1_hf.finetuning.config import MaskedExpressionConfig
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.finetuning.task import Outcome
from tahoex1_hf.inference.encoder import length_sorted_batches
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.runs.report import Report

logger = logging.getLogger(__name__)

_BATCH_TOKENS = 8192
_BASELINE_CELLS = 20_000  # most training cells that the constants are learnt from


@torch.no_grad()
def model_errors(
    config: MaskedExpressionConfig, cells: FinetuningData, split: Split, model: Any
) -> tuple[float, float]:
    """Return a model's mean squared errors at the hidden genes of the test cells, in the unit of the loss.

    Returns:
        The mean of both decoders' errors, and the error of the expression decoder, which reads each gene's context.
    """
    model.eval()
    device = next(model.parameters()).device
    sums, targets = np.zeros(2), 0
    for batch in _test_batches(config, cells, split):
        targets += int(batch["target_mask"].sum())
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        outputs: Any = model(**batch, num_items_in_batch=1)  # then the losses are sums over the targets
        sums += [float(outputs.loss), float(outputs.expression_loss)]
    both, expression = sums / max(1, targets)
    return float(both), float(expression)


def constant_errors(
    config: MaskedExpressionConfig, cells: FinetuningData, split: Split, model: TahoeX1Config
) -> tuple[float, float]:
    """Return the errors of two constants learnt from the training cells: the mean value, and each gene's mean."""
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


def _test_batches(config: MaskedExpressionConfig, cells: FinetuningData, split: Split) -> Iterator[dict[str, Any]]:
    """Yield batches of the test cells, always with the same genes hidden."""
    objective = Objective(config, cells, split.train)
    for rows in length_sorted_batches(cells.lengths[split.test], _BATCH_TOKENS):
        yield objective.batch(split.test[rows], HELD_OUT)


def _gene_means(config: MaskedExpressionConfig, cells: FinetuningData, split: Split) -> tuple[np.ndarray, float]:
    """Return the mean value of each token in the training cells, `(vocabulary,)`, and the mean over all tokens."""
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


class MaskedExpressionTask(CellTask):
    """Continued masked-expression training, see `Task`."""

    def model_options(self) -> dict[str, Any]:
        """Return no options, since the decoders come from the base."""
        return {}

    def base(self) -> TahoeX1ForPreTraining:
        """Load the base with its decoders."""
        return load_base(self.config, TahoeX1ForPreTraining)

    def predict(self, model: Any, split: Split, facts: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the embeddings of the test cells before and after the training; errors go into `facts["test"]`."""
        if not len(split.test):
            return super().predict(model, split, facts)
        errors, test = (self.config, self.cells, split), {}
        after, outputs = self.embed(model, split.test)
        test["model"], test["model_expression"] = model_errors(*errors, model)
        test["mean"], test["gene_mean"] = constant_errors(*errors, model.config)
        with self.base_of(model) as base:
            before, _ = self.embed(base, split.test)
            test["base"], test["base_expression"] = model_errors(*errors, base)
        facts["test"] = test
        return {"outputs": outputs, "before": before, "after": after}

    def predictions(self, outcome: Outcome) -> float:
        """Return the model's error, the mean over both decoders."""
        return float(outcome.facts["test"]["model"])

    def baselines(self, outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
        """Return the errors of constants, of the base, and of the decoders that read each gene's context."""
        titles = {name: title for name, title in METHODS.items() if name != "model"}
        return {title: [outcome.facts["test"][name] for outcome in outcomes] for name, title in titles.items()}

    def metrics(self, outcome: Outcome, predictions: float) -> dict[str, float]:
        """Return the error as `mse`."""
        return {"mse": predictions}

    def report(self, outcomes: Sequence[Outcome], predictions: dict[str, list[Any]], scores: Report) -> dict[str, Any]:
        """Write the report; return the mean errors."""
        means, verdict = write_masked_report(
            self.folder, [outcome.facts["test"] for outcome in outcomes], scores, self.ours
        )
        add_results(self.folder, means, verdict)
        return means


# Name in `report.json` -> title.
METHODS = {
    "mean": "mean value of all genes",
    "gene_mean": "each gene's mean value",
    "base_expression": "base, from each gene's context",
    "model_expression": "this model, from each gene's context",
    "base": "base, mean of both decoders",
    "model": "this model, mean of both decoders",
}


def write_masked_report(
    folder: Path, losses: Sequence[dict[str, float]], scores: Report, ours: str
) -> tuple[dict[str, float], str]:
    """Write the report of a masked-expression run.

    Args:
        folder: Folder to write into.
        losses: Errors of each fold, with the names of `METHODS`.
        scores: Scores of the model and of its baselines.
        ours: Name of the model in `scores`.

    Returns:
        Means over the folds, and how they compare, in words.
    """
    means = {name: float(np.mean([each[name] for each in losses])) for name in METHODS}
    verdicts = [
        compare_errors(means["model_expression"], means["gene_mean"], "the constants (each gene's mean)"),
        compare_errors(means["model"], means["base"], "the base"),
    ]
    cells = "the test cells" if len(losses) == 1 else f"the test cells of {len(losses)} splits (mean)"
    table = scores.markdown({"mse": "error"}, {ours: METHODS["model"]}, digits=4, corner="predictor")
    text = "\n\n".join(
        [
            "# Masked expression",
            f"Mean squared error at hidden genes of {cells}; less is better.",
            table,
            "\n".join(verdicts),
        ]
    )
    facts = {"task": "masked_expression", "means": means, "splits": list(losses)}
    scores.write(folder, facts, text + "\n", "mse", "mean squared error at hidden genes")
    logger.info("%s", text)
    return means, " ".join(verdicts)


def compare_errors(model: float, other: float, name: str) -> str:
    """Say whether the model's error is below another."""
    change = 100 * (model - other) / other
    does = "beats" if model < other else "does not beat"
    return f"The model {does} {name}: its error is {abs(change):.1f} % {'lower' if change < 0 else 'higher'}."
