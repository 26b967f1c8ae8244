# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The loss of a drug response: the squared error of a condition's change, from pairs of cell embeddings."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from tahoex1_hf.encoding_tahoe_x1 import mix64
from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.config import DrugResponseConfig
from tahoex1_hf.finetuning.drugs.screen import Screen
from tahoex1_hf.finetuning.objectives import Objective
from tahoex1_hf.finetuning.trainer import FinetuneTrainer
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.packing_tahoe_x1 import CellLayout
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


def inner_model(model: Any) -> TahoeX1ForPreTraining:
    """Return the model inside PEFT's and the launcher's wrappers."""
    model = model.module if hasattr(model, "module") and not hasattr(model, "config") else model
    return cast(TahoeX1ForPreTraining, without_peft(model))


def decode_change(model: TahoeX1ForPreTraining, differences: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
    """Return changes of genes, `(cells, genes)`, from differences of cell embeddings, `(cells, width)`."""
    embeddings = model.tahoe.embeddings.gene_encoder(genes).unsqueeze(0)
    changes: torch.Tensor = model.cell_decoder(differences, embeddings, CellLayout(len(differences)))
    return changes


class DrugObjective(Objective):
    """Squared error of changes. A row is a sample of a condition: `condition * controls_per_condition + number`.

    Args:
        config: Configuration of the run.
        cells: Cells of the screen.
        screen: Conditions of the screen.
        ids: Drug ids of the conditions, shape `(conditions,)`, and the id of the control.
        train: Conditions to train on, which set the scale.
    """

    config: DrugResponseConfig

    def __init__(
        self,
        config: DrugResponseConfig,
        cells: FinetuningData,
        screen: Screen,
        ids: tuple[np.ndarray, int],
        train: np.ndarray,
    ):
        self.config, self.collator, self.screen, self.source = config, None, screen, cells
        self.drug_ids, self.control_id = ids
        self.scale = float(np.sqrt((screen.changes[train].astype(np.float64) ** 2).mean())) or 1.0
        self.genes = torch.from_numpy(screen.genes)
        lengths = cells.lengths + 1  # the drug token
        of_group = np.array([lengths[group].mean() if len(group) else 0.0 for group in screen.control_cells])
        per_row = np.repeat(of_group[screen.controls], config.controls_per_condition)
        self.cells = cast(FinetuningData, SimpleNamespace(lengths=np.ceil(per_row).astype(np.int64)))

    def samples(self, conditions: np.ndarray) -> np.ndarray:
        """Return the rows of some conditions."""
        samples = self.config.controls_per_condition
        return (conditions[:, None] * samples + np.arange(samples)).ravel()

    def batch(self, rows: np.ndarray, epoch: int) -> dict[str, Any]:
        """Return control cells with the drug, then the same with the control; and `changes`, in units of the scale."""
        conditions = rows // self.config.controls_per_condition
        key = mix64(mix64(np.array([self.config.seed], dtype=np.uint64)) + np.uint64(epoch))
        chances = mix64(key + rows.astype(np.uint64))
        groups = [self.screen.control_cells[self.screen.controls[condition]] for condition in conditions]
        numbers = np.array(
            [group[int(chance % np.uint64(len(group)))] for group, chance in zip(groups, chances, strict=True)]
        )
        tokenizer = self.source.tokenizer
        encoded = encode_cells(self.source, numbers, self.drug_ids[conditions], int(key[0] >> np.uint64(2)))
        pad_id = tokenizer.get_vocab()[str(tokenizer.pad_token)]
        once = encoded.padded(pad_token_id=pad_id, pad_value=tokenizer.pad_value)
        batch: dict[str, Any] = {name: torch.cat([tensor, tensor]) for name, tensor in once.items()}
        batch["drug_ids"][len(rows) :] = self.control_id
        batch["changes"] = torch.from_numpy(self.screen.changes[conditions] / self.scale)
        return batch

    def errors(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Return the mean squared error over the genes, `(cells,)`."""
        batch = dict(batch)
        truth = batch.pop("changes")
        treated, untreated = model(**batch).pooler_output.chunk(2)
        found = decode_change(inner_model(model), treated - untreated, self.genes.to(treated.device))
        return (found.float() - truth).square().mean(dim=1)

    def sums(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Return the sum of the errors, their number, and 0 as a `(3,)` float64 tensor."""
        errors = self.errors(model, batch).double()
        return torch.stack([errors.sum(), errors.new_tensor(len(errors)), errors.new_zeros(())])

    def metrics(self, sums: torch.Tensor, num_cells: int) -> dict[str, float]:
        """Return the loss; predicting no change would have about 1."""
        return {"loss": float(sums[0] / sums[1])}


class DrugTrainer(FinetuneTrainer):
    """Trainer whose loss is made of pairs of cell embeddings."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean over the samples of this process; all processes have equally many."""
        loss = cast(DrugObjective, self.objective).errors(model, inputs).mean()
        return (loss, {}) if return_outputs else loss


def encode_cells(cells: FinetuningData, numbers: np.ndarray, drug_ids: np.ndarray, seed: int = 0) -> EncodedCells:
    """Encode cells of the file with a drug each."""
    rows = cells.rows_at(numbers)
    return cells.tokenizer.encode_rows(rows, drug_ids=drug_ids, seed=seed, warn=lambda _: None)
