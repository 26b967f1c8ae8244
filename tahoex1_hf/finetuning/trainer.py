# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The Trainer of fine-tuning, which minimises the loss of an objective and evaluates it on validation cells."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tahoex1_hf.finetuning.adapters import without_card
from tahoex1_hf.finetuning.batches import TrainingBatches
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective
from tahoex1_hf.inference.encoder import length_sorted_batches
from tahoex1_hf.runs.trainer import ResumableTrainer

_VALIDATION_TOKENS = {"cuda": 65536, "cpu": 8192}  # most tokens of a batch


class LastEvaluation(TrainerCallback):
    """Ask for an evaluation after the last step too, where its number is not a multiple of `eval_steps`."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for an evaluation after the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control


class FinetuneTrainer(ResumableTrainer):
    """Trainer of a model, adapted or whole.

    Args:
        model: Model to train.
        args: Trainer's options, with `max_steps`.
        batches: Batches of all steps.
        objective: Loss to minimise.
        validation: Row numbers of the cells to evaluate on, shape `(cells,)`.
        callbacks: Callbacks of Trainer.
    """

    objective: Objective

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        batches: TrainingBatches,
        objective: Objective,
        validation: np.ndarray,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        own_loss = None if objective.collator is not None else objective
        callbacks = [*callbacks, LastEvaluation()]
        super().__init__(
            model, args, batches, eval_dataset=validation, compute_loss_func=own_loss, callbacks=callbacks
        )
        self.objective, self.validation = objective, validation

    def _save(self, *arguments: Any, **named: Any) -> None:
        """Write the model of a checkpoint."""
        with without_card(self.model):
            super()._save(*arguments, **named)

    def validation_metrics(self) -> dict[str, float]:
        """Return the objective's metrics on the validation cells, `loss` among them, whatever the batches."""
        was_training = self.model.training
        model = self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        tokens = _VALIDATION_TOKENS.get(self.args.device.type, 8192)
        batches = list(length_sorted_batches(self.objective.cells.lengths[self.validation], tokens))
        rank, processes = self.world
        for rows in batches[rank::processes]:
            batch = self._prepare_inputs(self.objective.batch(self.validation[rows], HELD_OUT))
            with self.compute_loss_context_manager():
                sums += self.objective.sums(model, batch)
        if processes > 1:
            dist.all_reduce(sums)
        model.train(was_training)
        return self.objective.metrics(sums, len(self.validation))
