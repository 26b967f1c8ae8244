# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Response to drugs: how the mean expression of a population changes, from its control cells and the drug.

Prediction: for a control cell i of a context and a drug d, the model embeds the cell twice, with all its genes
observed: once with the drug at its `<drug>` token, and once with the control there. The cell decoder, which reads the
expression of any gene g from a cell embedding, gives the change

    change(g) = decoder(g, embedding(i, d)) - decoder(g, embedding(i, control))

in log(1 + counts per 10,000). The decoder is linear in the embedding, so it is applied to the difference of the
embeddings, and the change of a condition follows from the mean difference over its control cells. Without a drug the
change is zero. The predicted profile is the mean profile of the control cells plus the change.

Training: the model learns the change of the condition's mean (see `screen.py`). The control cells that a condition is
paired with are chosen anew in every epoch, from the same context and batch, by the seed. The loss is the squared
error, over the genes and conditions, in units of the root mean square of the training changes. The trained weights
are low-rank adapters on the transformer and on the linear layers of the drug encoder, and the whole cell decoder.

Drugs that the base does not know are rows added to its drug table, made from their fingerprints (`table.py`).

Test: one model is tested on drugs that no training condition has, another on contexts that none has. Three
baselines are scored beside them: the mean over the training conditions of the same context, the mean over those of the
same drug, and no change at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.encoding_tahoe_x1 import mix64
from tahoex1_hf.finetuning.adapters import save_adapter
from tahoex1_hf.finetuning.bases import base_name, load_base, load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import read_cells
from tahoex1_hf.finetuning.cells.task import COSTS, settings_of
from tahoex1_hf.finetuning.config import DrugResponseConfig
from tahoex1_hf.finetuning.drugs.metrics import by_unit, change_baselines, change_metrics
from tahoex1_hf.finetuning.drugs.objective import (
    DrugObjective,
    DrugTrainer,
    decode_change,
    encode_cells,
    inner_model,
)
from tahoex1_hf.finetuning.drugs.predicting import mean_embedding
from tahoex1_hf.finetuning.drugs.report import write_drug_report
from tahoex1_hf.finetuning.drugs.screen import read_screen
from tahoex1_hf.finetuning.drugs.table import new_fingerprints, teach_tokenizer
from tahoex1_hf.finetuning.fitting import computes_in, fit
from tahoex1_hf.finetuning.objectives import HELD_OUT
from tahoex1_hf.finetuning.splits import Split, make_splits, train_and_validation
from tahoex1_hf.finetuning.task import Fold, Outcome, model_title
from tahoex1_hf.hub.adapters import is_peft
from tahoex1_hf.hub.added_drugs import add_drugs, save_added_drugs
from tahoex1_hf.hub.loading import find_model
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.runs.report import Report

_PREDICTION_CELLS = 64  # most control cells that a condition is predicted from


class DrugTask:
    """Response to drugs, see `Task`.

    Args:
        config: Configuration of the run.
        processes: Processes of the launcher.
    """

    def __init__(self, config: DrugResponseConfig, processes: PartialState):
        self.config, self.processes = config, processes
        self.folder = Path(config.output_dir)
        self.tokenizer = load_tokenizer(config)
        settings = TahoeX1Config.from_pretrained(find_model(config.model, size=config.size))
        self.num_known = int(settings.num_drugs)
        if not self.num_known:
            raise ValueError(
                f"model={config.model} has no drug encoder (num_drugs is 0): use one that has, such as the 3B model."
            )
        self.cells = read_cells(config, self.tokenizer, self.folder)
        self.screen = read_screen(config, self.cells)
        new = new_fingerprints(config, self.tokenizer, sorted({*self.screen.drugs}))
        self.added = np.stack(list(new.values())) if new else None
        teach_tokenizer(self.tokenizer, list(new), self.num_known)
        self.drug_ids = self.tokenizer.drug_ids(self.screen.drugs.tolist(), len(self.screen), unknown_drugs="error")
        # A control that the base does not know, such as the solvent, counts as no drug.
        table = self.tokenizer.drug_table
        self.control_id = (table.find(config.control) if table is not None else None) or 0
        self.ours = model_title(config)

    # Splits -----------------------------------------------------------------------------------------

    def targets(self) -> list[Fold]:
        """Return the folds, whose rows are conditions."""
        return [
            Fold(f"{kind}-{number}", split, f"held-out {kind}")
            for kind in self.config.held_out
            for number, split in enumerate(self.splits(kind))
        ]

    def splits(self, kind: str) -> list[Split]:
        """Return splits of the conditions in which no drug (or no context) is in two parts."""
        config = self.config
        return make_splits(
            None,
            self.units(kind),
            num_rows=len(self.screen),
            folds=config.folds,
            test_fraction=config.test_fraction,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
        )

    def units(self, kind: str) -> np.ndarray:
        """Return the drug (or the context) of each condition, shape `(conditions,)`."""
        return self.screen.units(kind)

    def all_rows(self) -> Split:
        """Return all conditions to train on, except those that early stopping evaluates on."""
        rows, config = np.arange(len(self.screen)), self.config
        return train_and_validation(
            rows, None, self.units(config.held_out[0]), config.validation_fraction, config.seed
        )

    # Models -----------------------------------------------------------------------------------------

    def base(self) -> TahoeX1ForPreTraining:
        """Load the base, with the drugs that it did not know."""
        model = load_base(self.config, TahoeX1ForPreTraining)
        if self.added is not None:
            add_drugs(model, self.added)
        return model

    def model(self, split: Split, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Train a model, or resume its training; return the model with the best weights, and its costs."""
        ids = (self.drug_ids, self.control_id)
        objective = DrugObjective(self.config, self.cells, self.screen, ids, split.train)
        train, validation = objective.samples(split.train), objective.samples(split.validation)
        model, facts = fit(self.base, objective, train, validation, folder, self.processes, DrugTrainer)
        _predict_in_own_units(inner_model(model), objective.scale)
        return model, facts

    def predict(self, model: Any, split: Split, facts: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the changes of the test conditions."""
        return {"changes": self.changes(model, split.test)}

    @torch.no_grad()
    def changes(self, model: Any, rows: np.ndarray) -> np.ndarray:
        """Return changes of conditions, from up to 64 of their control cells: `(conditions, genes)` float32."""
        inner = inner_model(model)
        encoder = CellEncoder(inner, self.tokenizer, device=self.processes.device, dtype=computes_in(self.config))
        genes = torch.from_numpy(self.screen.genes).to(encoder.device)
        untreated: dict[int, torch.Tensor] = {}
        changes = np.zeros((len(rows), len(genes)), dtype=np.float32)
        for place, row in enumerate(rows):
            group = int(self.screen.controls[row])
            numbers = _chosen_cells(self.screen.control_cells[group], self.config.seed)
            if group not in untreated:
                ids = np.full(len(numbers), self.control_id)
                untreated[group] = mean_embedding(encoder, encode_cells(self.cells, numbers, ids))
            ids = np.full(len(numbers), self.drug_ids[row])
            treated = mean_embedding(encoder, encode_cells(self.cells, numbers, ids))
            difference = (treated - untreated[group]).float().to(encoder.device).unsqueeze(0)
            changes[place] = decode_change(inner, difference, genes)[0].float().cpu().numpy()
        return changes

    def save(self, model: Any, facts: dict[str, Any]) -> None:
        """Write the adapter, or the whole model, into the folder of the run, with the drugs that were added."""
        save_adapter(model, self.tokenizer, self.folder, self.record(facts))
        if self.added is not None and is_peft(model):
            save_added_drugs(self.folder, self.added, self.num_known)

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the content of `finetuning.json`."""
        kept = ("task", "method", "size", "layer", "gene_id_column", "drugs", "control", "context", "batch", "seed")
        names = {token: name for name, token in self.tokenizer.get_vocab().items()}
        return {
            **settings_of(self.config, kept),
            "label": None,
            "model": base_name(self.config),
            "context_length": self.tokenizer.context_length,
            "classes": None,
            "model_options": {},
            "training_cells": len(self.cells),
            "control_id": self.control_id,
            "response_genes": [names[int(token)] for token in self.screen.genes],
            **{name: value for name, value in facts.items() if name not in COSTS},
        }

    # Scores -----------------------------------------------------------------------------------------

    def predictions(self, outcome: Outcome) -> np.ndarray:
        """Return the predicted changes, `(test conditions, genes)`."""
        return outcome.arrays["changes"]

    def baselines(self, outcomes: Sequence[Outcome]) -> dict[str, list[np.ndarray]]:
        """Return no change, and the mean changes of the training conditions."""
        found: dict[str, list[np.ndarray]] = {}
        screen = self.screen
        for outcome in outcomes:
            split = outcome.fold.split
            known = np.concatenate([split.train, split.validation])
            values = change_baselines(screen.changes, screen.drugs, screen.contexts, known, split.test)
            for name, changes in values.items():
                found.setdefault(name, []).append(changes)
        return found

    def metrics(self, outcome: Outcome, predictions: np.ndarray) -> dict[str, list[float]]:
        """Return the metrics of each held-out drug (or context), since its conditions are not independent."""
        test = outcome.fold.split.test
        units = self.units(outcome.fold.part.removeprefix("held-out "))[test]
        found = change_metrics(predictions, self.screen.changes[test])
        return {name: by_unit(values, units) for name, values in found.items()}

    def report(
        self, outcomes: Sequence[Outcome], predictions: dict[str, list[np.ndarray]], scores: Report
    ) -> dict[str, Any]:
        """Write the report; return the content of `report.json` without the table of scores."""
        return write_drug_report(self.folder, self.config, self.screen, self.tokenizer, outcomes, predictions, scores)


def _chosen_cells(group: np.ndarray, seed: int) -> np.ndarray:
    """Return some of a group's cells, always the same."""
    hashes = mix64(mix64(np.array([seed], dtype=np.uint64)) + np.uint64(HELD_OUT) + group.astype(np.uint64))
    return np.sort(group[np.argsort(hashes)[:_PREDICTION_CELLS]])


@torch.no_grad()
def _predict_in_own_units(model: TahoeX1ForPreTraining, scale: float) -> None:
    """Scale a decoder that learnt changes in units of `scale`, so that it gives them in their own unit."""
    decoder: Any = model.cell_decoder
    trained = decoder.modules_to_save["default"] if hasattr(decoder, "modules_to_save") else decoder
    trained.cell_proj.weight.mul_(scale)
