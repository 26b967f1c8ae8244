# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What all tasks' runs have in common: the folder of a run, Trainer's options, what a run cost."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import yaml
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.runs.arguments import run_arguments

logger = logging.getLogger(__name__)

RESOLVED = "config.resolved.yaml"
RESULT = "result.json"  # the last thing written of a split
_MAY_DIFFER = {"output_dir", "report"}  # keys that decide nothing about the weights


def open_run(config: FinetuneConfig, first: bool) -> None:
    """Make the folder of a run, or see that the one that is there is of this run.

    Args:
        config: of the run.
        first: whether this is the main process; the others have nothing to do.

    Raises:
        ValueError: where the folder is of a run with other settings.
    """
    if not first:
        return
    output_dir = Path(config.output_dir)
    earlier = output_dir / RESOLVED
    if earlier.is_file() and has_begun(output_dir):
        changed = changed_settings(config, yaml.safe_load(earlier.read_text(encoding="utf-8")))
        if changed:
            raise ValueError(
                f"output_dir={config.output_dir} holds a run with another {', '.join(changed)}: choose another "
                "folder, or remove it."
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    config.write(earlier)


def changed_settings(config: FinetuneConfig, before: dict[str, Any]) -> list[str]:
    """Return the keys of a configuration whose values differ from those that a run began with.

    Args:
        config: Configuration given now.
        before: Content of the run's `config.resolved.yaml`. Keys of other tasks, which version 0.1 wrote too, do not
            count; a key that is missing is at its default.
    """
    now, defaults = config.model_dump(mode="json"), type(config).model_fields
    return sorted(
        name for name in now if name not in _MAY_DIFFER and before.get(name, defaults[name].default) != now[name]
    )


def has_begun(output_dir: Path) -> bool:
    """Whether a folder holds anything of a run to go on from."""
    return any(any(output_dir.glob(pattern)) for pattern in ("checkpoint-*", "folds", RESULT))


def steps_of(config: FinetuneConfig, steps_per_epoch: int) -> tuple[int, int]:
    """Steps of a run at most, and between two evaluations."""
    max_steps = max(1, math.ceil(config.epochs * steps_per_epoch))
    return max_steps, min(config.eval_steps or steps_per_epoch, max_steps)


def training_arguments(
    config: FinetuneConfig, folder: Path, max_steps: int, eval_steps: int, per_step: int = 1
) -> TrainingArguments:
    """Trainer's options, for steps of `per_step` batches."""
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
        save_total_limit=2,  # the last, to go on from, and the best
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        # Whole models have parts that a task does not use: the flag of hidden genes, say.
        ddp_find_unused_parameters=config.method == "full",
    )


def early_stopping(config: FinetuneConfig) -> list[TrainerCallback]:
    """The callback, where it is wanted."""
    patience = config.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def computes_in(config: FinetuneConfig) -> str:
    """Precision of predictions: that of the training."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") if config.precision == "launcher" else None
    half = "bf16" in (config.precision, launcher)
    return "bfloat16" if half else "float32"
