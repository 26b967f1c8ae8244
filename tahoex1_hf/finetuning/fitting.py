# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Training by gradients, for one fold of a task."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from tahoex1_hf.finetuning.batches import TrainingBatches
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.methods import adapt, set_dropout, trainable_parameters
from tahoex1_hf.finetuning.objectives import Objective
from tahoex1_hf.finetuning.trainer import FinetuneTrainer
from tahoex1_hf.hub.adapters import is_peft
from tahoex1_hf.inference.encoder import DtypeName
from tahoex1_hf.runs.arguments import run_arguments
from tahoex1_hf.runs.memory import peak_memory_gb
from tahoex1_hf.runs.preemption import Preempted


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
        base: Function that loads the model to adapt.
        objective: Loss to minimise; `cells.lengths` are the lengths of its rows.
        rows: Rows to train on, each once in an epoch.
        validation: Rows to evaluate on.
        folder: Folder of the checkpoints; the same call resumes from them.
        processes: Processes of the launcher.
        trainer_class: Trainer of the task.

    Returns:
        The model with the best weights, in eval mode, and the costs of the training.

    Raises:
        Preempted: Where SIGTERM ended the training after a checkpoint.
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


def steps_of(config: FinetuneConfig, steps_per_epoch: int) -> tuple[int, int]:
    """Return the largest number of steps of a run, and the number of steps between two evaluations."""
    max_steps = max(1, math.ceil(config.epochs * steps_per_epoch))
    return max_steps, min(config.eval_steps or steps_per_epoch, max_steps)


def training_arguments(
    config: FinetuneConfig, folder: Path, max_steps: int, eval_steps: int, per_step: int = 1
) -> TrainingArguments:
    """Return Trainer's options.

    Args:
        config: Configuration of the run.
        folder: Folder of the checkpoints.
        max_steps: Number of steps.
        eval_steps: Steps between two evaluations, each with a checkpoint.
        per_step: Batches of a step.
    """
    schedule = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[config.schedule]
    return run_arguments(
        precision=config.precision,
        activation_checkpointing=config.gradient_checkpointing,
        output_dir=str(folder),
        max_steps=max_steps,
        gradient_accumulation_steps=per_step,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=round(config.warmup_fraction * max_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=eval_steps,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=2,  # the last, to resume from, and the best
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        # Whole models have parts that a task does not use, such as the flag of masked genes.
        ddp_find_unused_parameters=config.method == "full",
    )


def early_stopping(config: FinetuneConfig) -> list[TrainerCallback]:
    """Return the callback that stops early; none where the patience is null."""
    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def computes_in(config: FinetuneConfig) -> DtypeName:
    """Return the precision of predictions, which is the same as in training."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") if config.precision == "launcher" else None
    half = "bf16" in (config.precision, launcher)
    return "bfloat16" if half else "float32"
