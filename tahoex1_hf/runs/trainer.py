# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A transformers Trainer whose runs can be interrupted at any moment, and resume as if nothing had happened.

The cells of a step follow from its number, checkpoints appear whole or not at all, SIGTERM ends a run after a
checkpoint, and the log does not depend on interruptions. Pretraining and fine-tuning add their data and their losses.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tahoex1_hf.common.cuda_memory import sent
from tahoex1_hf.common.files import write_json
from tahoex1_hf.runs import checkpoints
from tahoex1_hf.runs.background_saves import BackgroundSaves
from tahoex1_hf.runs.log_window import LogWindow
from tahoex1_hf.runs.preemption import Preemption

logger = logging.getLogger(__name__)

PROGRESS = (
    "progress.json"  # in a checkpoint, for the run and, with a process's number before the name, for that process
)


class RunBatches(Protocol):
    """This process's batches of every step of a run; Trainer takes them for a data loader of one long epoch.

    Attributes:
        dataset: Cells of an epoch, of which Trainer reads the number.
        max_steps: Number of steps of the run.
        steps_per_epoch: Number of steps in which every cell is seen once.
        done: Function that returns the number of steps made so far, asked when an iteration begins.
    """

    dataset: Any
    max_steps: int
    steps_per_epoch: int
    done: Any

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def identity(self) -> dict[str, Any]:
        """Return the values that decide the order of the cells, by name; a checkpoint with other values is refused."""
        ...


class StepCounter(TrainerCallback):
    """Count steps for the log, and epochs of the data, since Trainer takes the whole run for one epoch.

    Args:
        trainer: Trainer of the run.
    """

    def __init__(self, trainer: "ResumableTrainer"):
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step."""
        self.trainer.window.steps += 1
        state.epoch = state.global_step / self.trainer.batches.steps_per_epoch


class ResumableTrainer(Trainer):
    """Trainer with whole checkpoints, a log and an order of the cells that survive interruptions, and preemption.

    Subclasses define `validation_metrics` and, where a step has other losses than Trainer's, `num_losses`,
    `training_step` and `window_means`.

    Args:
        model: Model to train.
        args: Trainer's options, with `max_steps` (see `run_arguments`).
        batches: Batches of all steps.
        callbacks: Callbacks of Trainer.
        **trainer: Other arguments of Trainer.

    Attributes:
        window: Sums over the steps since the last line of the log.
        saves: Checkpoint that is still being written, where a subclass writes in the background.
    """

    model: Any
    num_losses = 1

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        batches: RunBatches,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        **trainer: Any,
    ):
        self._preemption = Preemption()
        super().__init__(model, args, callbacks=[self._preemption, StepCounter(self), *callbacks], **trainer)
        self.batches = batches
        batches.max_steps, batches.done = args.max_steps, lambda: self.state.global_step
        self.window = LogWindow(self.num_losses)
        self.saves = BackgroundSaves()

    @property
    def preempted(self) -> bool:
        """Whether SIGTERM ended the training after a checkpoint."""
        return self._preemption.agreed

    @property
    def world(self) -> tuple[int, int]:
        """Number of this process, and number of processes."""
        return self.args.process_index, self.args.world_size

    def get_train_dataloader(self) -> Any:
        """Return the batches, which Accelerate must not divide, since each process makes its own."""
        return self.batches

    # Steps, log and evaluation ----------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device; to a GPU without waiting until it is there."""
        if self.args.device.type == "cuda":
            inputs = {
                name: sent(value, self.args.device) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
            }
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the forward and backward pass of Trainer, and note the loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Trainer scales each process's loss so that their mean is the loss of the step.
        self.window.add_losses((loss / self.args.world_size).reshape(1))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means that survive interruptions: Trainer's own cover the steps since the last start only."""
        if "loss" in logs and self.window.steps:
            logs = {**logs, **self.window_means(self._whole_window())}
            self.window = LogWindow(self.num_losses)
        if "train_loss" in logs:
            logs = {**logs, "train_loss": self._mean_loss()}
        super().log(self.extended(logs), start_time)

    def window_means(self, window: LogWindow) -> dict[str, float]:
        """Return the means that a line of the log gives for its steps, at least `loss`.

        Args:
            window: Sums over the steps, of all processes.
        """
        return {"loss": window.losses[0] / window.steps}

    def extended(self, logs: dict[str, float]) -> dict[str, float]:
        """Return a line of the log with the additions of a subclass."""
        return logs

    def _whole_window(self) -> LogWindow:
        return self.window.totals(self.args.device, self.args.world_size)

    def _mean_loss(self) -> float:
        """Return the mean loss over all steps of the run, including those before an interruption."""
        total = last = 0.0
        for line in self.state.log_history:
            if "loss" in line:
                total += line["loss"] * (line["step"] - last)
                last = line["step"]
        if self.window.steps:
            total += self.window_means(self._whole_window())["loss"] * (self.state.global_step - last)
        return total / max(self.state.global_step, 1)

    def validation_metrics(self) -> dict[str, float]:
        """Return metrics on the validation cells, the same for any number of processes; empty without any cells."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Return the metrics on the validation cells; they are logged, and given to callbacks."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validation_metrics().items()}
        if metrics:
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints ------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """Return the values beside Trainer's own that this process needs to resume from a checkpoint."""
        return {"window": self.window.state()}

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Restore the values that `progress` returned in this process."""
        self.window = LogWindow.restored(state["window"])

    def save_beside(self, folder: Path) -> None:
        """Save the companions of the model, such as its tokenizer; called in the process that saves."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint, and declare it whole when all processes are done; then remove old ones."""
        self.wait_for_saves()
        began, output_dir = time.monotonic(), Path(str(self.args.output_dir))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer would remove old ones too early
        try:
            super()._save_checkpoint(model, trial)
            write_json(folder / f"{self.args.process_index}-{PROGRESS}", self.progress())
            if self.args.should_save:
                self.save_beside(folder)
                run = {"data": self.batches.identity(), "processes": self.args.world_size}
                write_json(folder / PROGRESS, run)
        except Exception as error:
            _add_way_out(error, folder)
            raise
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_model_checkpoint

            def declare_whole() -> None:
                checkpoints.seal(folder)
                checkpoints.remove_old(output_dir, limit or 1, Path(best) if best else None)
                self._preemption.note_save(time.monotonic() - began)

            self.saves.then(declare_whole)
        self.accelerator.wait_for_everyone()

    def wait_for_saves(self) -> None:
        """Wait until the checkpoint is whole that is still being written, if there is one."""
        try:
            self.saves.wait()
        except Exception as error:
            _add_way_out(error, Path(str(self.args.output_dir)))
            raise

    def _load_best_model(self) -> None:
        """Load the best weights; raise an error if they are gone, where Trainer would only warn and keep the last."""
        best = self.state.best_model_checkpoint
        if best is None or not Path(best).is_dir():
            raise FileNotFoundError(
                f"The checkpoint with the best weights, {best}, is gone: was the run's folder moved, or tidied? Begin "
                "anew in another output_dir."
            )
        super()._load_best_model()

    def run(self, begin: Path | None = None) -> None:
        """Train to the last step, from the newest whole checkpoint in the run's folder where there is one.

        Args:
            begin: Checkpoint of another run to begin with, where this run has none yet.

        Raises:
            ValueError: If the checkpoint was made with other data.
        """
        folder = checkpoints.last_whole(Path(str(self.args.output_dir))) or begin
        if folder is None:
            self.train()
            self.wait_for_saves()
            return
        logger.info("Resuming from %s.", folder)
        self._restore(folder)
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        if self.args.load_best_model_at_end and (stopped_early(state) or state.global_step >= self.args.max_steps):
            self.state = state
            if state.best_model_checkpoint is not None:
                self._load_best_model()
            self.model.to(self.args.device)
            return
        self.train(resume_from_checkpoint=str(folder))
        self.wait_for_saves()

    def _restore(self, folder: Path) -> None:
        """Check that a checkpoint is of the same data, and restore its progress."""
        if not (folder / PROGRESS).is_file():
            return  # fine-tuning runs of earlier versions did not write it
        run = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        here = self.batches.identity()
        different = sorted(key for key in here if run["data"].get(key) != here[key])
        if different:
            raise ValueError(
                f"{folder} was made with other {', '.join(different)}: give the data and settings of that run, "
                "or begin a new run in another output_dir."
            )
        states = [
            json.loads((folder / f"{number}-{PROGRESS}").read_text(encoding="utf-8"))
            for number in range(run["processes"])
        ]
        rank, processes = self.world
        if len(states) == processes:
            self.restore_progress(states[rank])
            return
        logger.warning(
            "%s is of %d processes, this run has %d. The cells and their order stay the same; dropout and the order "
            "of sums change.",
            folder,
            len(states),
            processes,
        )
        self.window = LogWindow.merged([state["window"] for state in states], first=rank == 0)


def _add_way_out(error: Exception, folder: Path) -> None:
    """Say, with an error while a checkpoint was written, what became of it and what to do."""
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free / 1e9
    error.add_note(
        f"{folder} could not be written ({free:.1f} GB are free there); it will not be resumed from. Make "
        "room and run the same command again: it resumes from the last whole checkpoint."
    )


def stopped_early(state: TrainerState) -> bool:
    """Return whether early stopping had ended a run when its state was saved: it is not to be trained further."""
    callbacks: Any = state.stateful_callbacks  # read from a file, it is a dictionary by name
    saved = callbacks.get(EarlyStoppingCallback.__name__)
    if saved is None:
        return False
    patience: int = saved["args"]["early_stopping_patience"]
    return bool(saved["attributes"]["early_stopping_patience_counter"] >= patience)
