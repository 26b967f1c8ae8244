# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer with what is ours: steps by number, exact validation, checkpoints that are whole."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints

from tahoex1_hf.finetuning.batches import TrainingBatches
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective
from tahoex1_hf.inference.encoder import length_sorted_batches
from tahoex1_hf.runs import checkpoints

logger = logging.getLogger(__name__)

_KEPT = 2  # checkpoints: the last, to go on from, and the best
_VALIDATION_TOKENS = {"cuda": 65536, "cpu": 8192}  # of a batch


class Steps(TrainerCallback):
    """Evaluates the last step too, where it is no multiple of `eval_steps`; counts epochs, of which Trainer sees one.

    Args:
        steps_per_epoch: of the data.
    """

    def __init__(self, steps_per_epoch: int):
        self.steps_per_epoch = steps_per_epoch

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Count, and ask for the evaluation."""
        state.epoch = state.global_step / self.steps_per_epoch
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control


class FinetuneTrainer(Trainer):
    """Trainer of a model, adapted or whole.

    Args:
        model: to train.
        args: of Trainer, with `max_steps`.
        batches: of all steps.
        objective: what is minimised.
        validation: rows to evaluate on.
        **trainer: `callbacks` of Trainer.
    """

    model: Any
    objective: Objective

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        batches: TrainingBatches,
        objective: Objective,
        validation: np.ndarray,
        **trainer: Any,
    ):
        own_loss = None if objective.collator is not None else objective
        super().__init__(model, args, eval_dataset=validation, compute_loss_func=own_loss, **trainer)
        self.add_callback(Steps(batches.steps_per_epoch))
        self.batches, self.objective, self.validation = batches, objective, validation
        batches.max_steps, batches.done = args.max_steps, lambda: self.state.global_step

    def get_train_dataloader(self) -> Any:
        """The steps; not Accelerate's to divide, since each process makes its own part."""
        return self.batches

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss on the validation cells, which does not depend on batches or processes; logged, given to callbacks."""
        was_training = self.model.training
        model = self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        tokens = _VALIDATION_TOKENS.get(self.args.device.type, 8192)
        batches = list(length_sorted_batches(self.objective.cells.lengths[self.validation], tokens))
        for rows in batches[self.args.process_index :: self.args.world_size]:
            batch = self._prepare_inputs(self.objective.batch(self.validation[rows], HELD_OUT))
            with self.compute_loss_context_manager():
                sums += self.objective.sums(model, batch)
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        model.train(was_training)
        found = self.objective.metrics(sums, len(self.validation))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint, declare it whole when all processes are done, and only then remove old ones."""
        output_dir = Path(str(self.args.output_dir))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            error.add_note(f"{folder} could not be written; the same command goes on from the last whole checkpoint.")
            raise
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.seal(folder)
            rotate_checkpoints(
                str(output_dir), save_total_limit=_KEPT, best_model_checkpoint=self.state.best_model_checkpoint
            )
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        """Load the best weights; Trainer goes on with the last ones where they are gone, with a warning."""
        best = self.state.best_model_checkpoint
        if best is None or not Path(best).is_dir():
            raise FileNotFoundError(
                f"The checkpoint with the best weights, {best}, is gone: was the run's folder moved, or tidied? Begin "
                "anew in another output_dir."
            )
        super()._load_best_model()

    def run(self) -> None:
        """Train to the end, from the last whole checkpoint where there is one; the best weights are then loaded."""
        begin = checkpoints.last_whole(Path(str(self.args.output_dir)))
        if begin is None:
            self.train()
            return
        logger.info("Going on from %s.", begin)
        state = TrainerState.load_from_json(str(begin / "trainer_state.json"))
        if stopped_early(state) or state.global_step >= self.args.max_steps:
            self.state = state
            if state.best_model_checkpoint is not None:
                self._load_best_model()
            self.model.to(self.args.device)
            return
        self.train(resume_from_checkpoint=str(begin))


def stopped_early(state: TrainerState) -> bool:
    """Whether a run had ended before its last step when its state was saved: it is not to be trained further."""
    callbacks: Any = state.stateful_callbacks  # read from a file, they are by name
    saved = callbacks.get(EarlyStoppingCallback.__name__)
    if saved is None:
        return False
    patience: int = saved["args"]["early_stopping_patience"]
    return bool(saved["attributes"]["early_stopping_patience_counter"] >= patience)
