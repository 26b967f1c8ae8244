# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Losses of constant predictions, which a model that has learnt nothing about cells does not beat."""

import numpy as np

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.data.feeding import CellBatches
from tahoex1_hf.training.config import PretrainConfig
from tahoex1_hf.training.stream import ValidationBatches

_CELLS = 20_000  # training cells over which means are taken: enough for every gene that is often expressed


def baseline_losses(
    config: PretrainConfig, model: TahoeX1Config, collator: CellCollator, validation: ValidationBatches
) -> dict[str, float]:
    """Return mean squared errors of constants at the targets of the validation cells, in the unit of the loss.

    Args:
        config: Configuration of the run.
        model: Configuration of the model.
        collator: Collator of the training cells.
        validation: Validation cells.

    Returns:
        `mean_bin`, where every prediction is the mean bin of the training cells, and `mean_bin_of_each_gene`, where it
        is the mean bin of the gene.
    """
    everything = CellCollator(
        collator.tokenizer,
        mlm_probability=1.0,
        context_length=collator.context_length,
        unexpressed_padding=collator.unexpressed_padding,
        absent_targets=collator.absent_targets,
        drug_token=collator.drug_token,
    )
    sums, counts = np.zeros(model.vocab_size), np.zeros(model.vocab_size)
    seen = 0
    for batch in CellBatches(config.datasets, everything, batch_size=64, seed=config.seed, drop_last=False):
        targets = batch["target_mask"].numpy()
        genes = batch["input_ids"].numpy()[targets]
        sums += np.bincount(genes, weights=batch["labels"].numpy()[targets], minlength=model.vocab_size)
        counts += np.bincount(genes, minlength=model.vocab_size)
        seen += len(targets)
        if seen >= _CELLS:
            break
    mean = sums.sum() / counts.sum()
    means = np.where(counts > 0, sums / np.maximum(counts, 1), mean)
    unit = 2 / (model.num_bins - 2) if model.scale_targets else 1.0
    errors, targets_seen = np.zeros(2), 0
    for batch, _, does_count in validation.batches(0, 1):
        targets = batch["target_mask"].numpy() & does_count
        values, genes = batch["labels"].numpy()[targets].astype(np.float64), batch["input_ids"].numpy()[targets]
        errors += [((values - mean) ** 2).sum(), ((values - means[genes]) ** 2).sum()]
        targets_seen += len(values)
    constant, per_gene = unit**2 * errors / targets_seen
    return {"mean_bin": float(constant), "mean_bin_of_each_gene": float(per_gene)}
