"""A trainer with given batches."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training_runs import RECIPE, TINY

from tahoex1_hf import TahoeX1ForPreTraining
from tahoex1_hf.training.config import PretrainConfig, read_pretrain_config
from tahoex1_hf.training.pretraining import training_arguments
from tahoex1_hf.training.trainer import PretrainingTrainer


def tiny(dataset: Path, output: Path, **changes: Any) -> PretrainConfig:
    settings = {
        **TINY,
        "dataset": dataset,
        "output_dir": output,
        **{k.replace("__", "."): v for k, v in changes.items()},
    }
    return read_pretrain_config(RECIPE, [f"{key}={value}" for key, value in settings.items()])


class FixedSteps:
    """A stand-in for StepBatches that gives the same batch at every step."""

    def __init__(self, batch: dict[str, Any], steps: int):
        self.batch, self.max_steps, self.steps_per_epoch = batch, steps, steps
        self.dataset: list[int] = []
        self.done: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.done(), self.max_steps):
            yield self.batch

    def identity(self) -> dict[str, Any]:
        return {}


def fixed_trainer(
    model: TahoeX1ForPreTraining, batch: dict[str, Any], output: Path, steps: int, microbatch: int, **changes: Any
) -> PretrainingTrainer:
    changes = {"schedule": "constant", "warmup_fraction": 0, "logging_steps": 1, "eval_cells": 0, **changes}
    config = tiny(Path("unused"), output, **changes)
    batch = {**batch, "labels": batch["labels"].masked_fill(~batch["target_mask"], -100.0)}
    args = training_arguments(config, steps)
    return PretrainingTrainer(model, args, FixedSteps(batch, steps), microbatch_size=microbatch)
