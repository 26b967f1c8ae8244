# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Options of transformers' Trainer that are the same for every run."""

import dataclasses
import os
from typing import Any

import torch
from transformers import TrainingArguments


def run_arguments(*, precision: str, activation_checkpointing: bool, **own: Any) -> TrainingArguments:
    """Return Trainer's options for a run whose batches are made by step.

    Args:
        precision: `"bf16"`, `"fp16"`, `"no"`, or `"launcher"` for the setting of `accelerate launch`.
        activation_checkpointing: Whether layers are computed again in the backward pass, which saves memory.
        **own: Options of this run.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    arguments = TrainingArguments(
        logging_nan_inf_filter=False,  # the log shows NaN where a loss was NaN
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if several and not torch.cuda.is_available() else None,
        ignore_data_skip=True,  # the batches begin at the right step by themselves
        remove_unused_columns=False,
        disable_tqdm=not os.isatty(2),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        **(_activation_checkpointing() if activation_checkpointing else {}),
        **own,
    )
    if precision == "no":  # otherwise Trainer would use the launcher's precision
        arguments.mixed_precision = "no"
    return arguments


def _activation_checkpointing() -> dict[str, Any]:
    """Return the options that switch activation checkpointing on.

    transformers 5.23 renamed `gradient_checkpointing` and warns of the old name; earlier versions know no other.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
