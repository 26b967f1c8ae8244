# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The loss of a gene classification."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from tahoex1_hf.encoding_tahoe_x1 import mix64
from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.config import GeneClassificationConfig
from tahoex1_hf.finetuning.genes.table import GeneTable
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective, class_weights
from tahoex1_hf.finetuning.splits import Split


class GeneObjective(Objective):
    """Cross-entropy over the labelled genes of cells.

    The `labels` of a batch are token ids of genes, from which class and weight follow; -100 elsewhere.

    Args:
        config: Configuration of the run.
        cells: Cells that express the genes.
        genes: Genes with their labels.
        split: Split of the genes.
    """

    def __init__(self, config: GeneClassificationConfig, cells: FinetuningData, genes: GeneTable, split: Split):
        self.config, self.cells, self.collator = config, cells, None
        size = len(cells.tokenizer)
        self.classes = torch.full((size,), -100)
        self.classes[torch.from_numpy(genes.tokens)] = torch.from_numpy(genes.labels)
        weights = class_weights(genes.labels[split.train], len(genes.classes), config.class_weights)[genes.labels]
        # Each gene's weight is shared by its cells; over the tokens of an epoch the mean is 1.
        per_token = weights / genes.num_cells
        train = split.train
        per_token *= genes.num_cells[train].sum() / (per_token[train] * genes.num_cells[train]).sum()
        self.token_weights = torch.zeros(size)
        self.token_weights[torch.from_numpy(genes.tokens)] = torch.from_numpy(per_token).float()
        self.parts = {"train": torch.zeros(size, dtype=torch.bool), "validation": torch.zeros(size, dtype=torch.bool)}
        for name, part in self.parts.items():
            part[torch.from_numpy(genes.tokens[split.parts()[name]])] = True

    def batch(self, rows: np.ndarray, epoch: int) -> dict[str, Any]:
        """Return the arguments of the model for some cells, with labels.

        Cells longer than the context are sampled anew in each epoch. The labels belong to the training genes, or in
        the epoch `HELD_OUT` to the validation genes.
        """
        cells, tokenizer = self.cells, self.cells.tokenizer
        numbers, drugs = cells.numbers[rows], cells.drug_ids
        encoded = tokenizer.encode_rows(
            cells.rows_at(numbers),
            drug_ids=None if drugs is None else drugs[numbers],
            seed=int(mix64(np.array([self.config.seed], dtype=np.uint64))[0] >> np.uint64(2)) + epoch,
            warn=lambda _: None,
        )
        pad_id = tokenizer.get_vocab()[str(tokenizer.pad_token)]
        batch = encoded.padded(pad_token_id=pad_id, pad_value=tokenizer.pad_value)
        part = self.parts["validation" if epoch == HELD_OUT else "train"]
        ids = batch["input_ids"]
        batch["labels"] = torch.where(part[ids], ids, -100)
        return batch

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the sum of the weighted losses over the number of labelled tokens of the whole step."""
        losses, _ = self._losses(outputs.logits, labels)
        total = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / max(1, int(total))

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = labels.ne(-100)
        genes = labels[known].cpu()
        weights = self.token_weights[genes].to(logits.device)
        classes = self.classes[genes].to(logits.device)
        return cross_entropy(logits[known].float(), classes, reduction="none") * weights, weights

    def sums(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Return the sum of the weighted losses, the sum of the weights, and 0 as a `(3,)` float64 tensor."""
        labels = batch.pop("labels")
        losses, weights = self._losses(model(**batch).logits, labels)
        return torch.stack([losses.double().sum(), weights.double().sum(), losses.new_zeros(()).double()])

    def metrics(self, sums: torch.Tensor, num_cells: int) -> dict[str, float]:
        """Return the loss, in which each gene of a class weighs the same."""
        return {"loss": float(sums[0] / sums[1].clamp(min=1e-12))}
