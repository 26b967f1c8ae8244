# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Training by gradients with an objective of a task's own, and the folds of a run."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed

from tahoex1_hf.common.files import write_json
from tahoex1_hf.finetuning.batches import TrainingBatches
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.methods import adapt, set_dropout, trainable_parameters
from tahoex1_hf.finetuning.objectives import Objective
from tahoex1_hf.finetuning.runs import (
    RESULT,
    early_stopping,
    open_run,
    steps_of,
    training_arguments,
)
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.finetuning.trainer import FinetuneTrainer
from tahoex1_hf.hub.adapters import is_peft
from tahoex1_hf.runs.memory import peak_memory_gb
from tahoex1_hf.runs.preemption import PREEMPTED, Preempted
from tahoex1_hf.runs.status import write_status

logger = logging.getLogger(__name__)

ARRAYS = "result.npz"  # of a split, beside RESULT


def fit(
    base: Callable[[], Any],
    objective: Objective,
    rows: np.ndarray,
    validation: np.ndarray,
    folder: Path,
    processes: PartialState,
    trainer_class: type[FinetuneTrainer] = FinetuneTrainer,
) -> tuple[Any, dict[str, Any]]:
    """Train a model.

    Args:
        base: makes the model to adapt.
        objective: what is minimised; `cells.lengths` are those of the rows.
        rows: to train on, each once in an epoch.
        validation: rows to evaluate on.
        folder: for checkpoints; the same call goes on from them.
        processes: of the launcher.
        trainer_class: of the task.

    Returns:
        The model with the best weights, in eval mode, and what it cost.

    Raises:
        Preempted: where SIGTERM ended the training after a checkpoint.
    """
    config, started = objective.config, time.perf_counter()
    set_seed(config.seed)
    model = adapt(base(), config)
    set_dropout(model, config)
    parameters = trainable_parameters(model)
    world = (processes.process_index, processes.num_processes)
    batches = TrainingBatches(
        objective.batch, rows, objective.cells.lengths, config.batch_size, config.seed, world, config.microbatch_size
    )
    max_steps, eval_steps = steps_of(config, batches.steps_per_epoch)
    trainer = trainer_class(
        model,
        training_arguments(config, folder, max_steps, eval_steps, batches.per_step),
        batches,
        objective,
        validation,
        callbacks=early_stopping(config),
    )
    if config.gradient_checkpointing and is_peft(model):
        model.enable_input_require_grads()
    trainer.run()
    if trainer.preempted:
        raise Preempted(f"at step {trainer.state.global_step}")
    if trainer.args.should_save:
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    return model.eval(), {
        "trainable_parameters": parameters,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "validation_loss": trainer.state.best_metric,
        "seconds": time.perf_counter() - started,
        "peak_memory_gb": peak_memory_gb(),
    }


def drop_checkpoints(folder: Path) -> None:
    """Of a split that is done."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def run_task(config: FinetuneConfig, work: Callable[[PartialState], dict[str, Any]]) -> int:
    """Open the folder of a run, do the work, and leave word of how it ended.

    Args:
        config: of the run.
        work: all of it; returns the metrics.

    Returns:
        0; or 75 where SIGTERM ended it after a checkpoint.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    first, output_dir = processes.is_main_process, Path(config.output_dir)
    open_run(config, first)
    processes.wait_for_everyone()
    if first:
        write_status(output_dir, "running")
    try:
        metrics = work(processes)
    except Preempted as stopped:
        if first:
            write_status(output_dir, "preempted", where=str(stopped))
        return PREEMPTED
    if first:
        write_status(output_dir, "finished", metrics=metrics)
    return 0


def write_result(folder: Path, split: Split, facts: dict[str, Any], **arrays: np.ndarray) -> None:
    """Keep what a split came to: arrays, with the rows of its parts, and facts. The facts are written last."""
    folder.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {**arrays, **split.parts()}
    np.savez(folder / ARRAYS, **everything)
    write_json(folder / RESULT, facts)


def read_result(folder: Path, split: Split) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Arrays and facts of a split; None where it has not come to an end.

    Raises:
        ValueError: where the folder holds another split's.
    """
    if not (folder / RESULT).is_file():
        return None
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        if not all(np.array_equal(arrays[part], rows) for part, rows in split.parts().items()):
            raise ValueError(f"{folder} holds the result of another split: choose another output_dir, or remove it.")
        return dict(arrays), json.loads((folder / RESULT).read_text(encoding="utf-8"))
