# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Training cells by step: the cells of a step follow from its number, so a checkpoint need not hold a position."""

from collections.abc import Callable, Iterator
from typing import Any

from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.data.feeding import CellBatches
from tahoex1_hf.training.config import PretrainConfig


class StepBatches:
    """This process's batch of every step, from the current one to the last, over as many epochs as needed.

    Trainer takes it for a data loader of one long epoch. Every epoch of the data has the same number of steps. Cells
    at its end that do not fill a step are left out; which ones differs from epoch to epoch.

    Args:
        cells: Cells of all epochs, in one batch per step.
        max_steps: Number of steps of the run.

    Attributes:
        done: Function that returns the number of steps made so far, asked when an iteration begins.
    """

    def __init__(self, cells: CellBatches, max_steps: int):
        self.cells, self.max_steps = cells, max_steps
        self.done: Callable[[], int] = lambda: 0
        self.steps_per_epoch = len(cells)
        self.dataset = cells  # Trainer reads the number of examples there

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        step = self.done()
        epoch, steps = divmod(step, self.steps_per_epoch)
        position = steps * (self.cells.batch_size or 0) * self.cells.world_size
        state = self.cells.state_dict()
        self.cells.load_state_dict({**state, "epoch": epoch, "cells": position, "skip": None, "num_workers": None})
        while step < self.max_steps:
            for batch in self.cells:
                yield batch
                step += 1
                if step == self.max_steps:
                    return

    def identity(self) -> dict[str, Any]:
        """Return the values that decide the order of the cells: data, seed and number of cells in a step."""
        state: dict[str, Any] = self.cells.state_dict()["identity"]
        return {**state, "cells_of_a_step": (self.cells.batch_size or 0) * self.cells.world_size}


def training_cells(config: PretrainConfig, collator: CellCollator, rank: int, world_size: int) -> CellBatches:
    """Return this process's share of the training cells.

    Args:
        config: Configuration of the run.
        collator: Collator that makes the batches.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If the processes cannot share a step evenly.
    """
    if config.global_batch_size % world_size:
        near = config.global_batch_size // world_size * world_size or world_size
        raise ValueError(
            f"global_batch_size={config.global_batch_size} cannot be shared evenly by {world_size} processes: "
            f"{near} could."
        )
    return CellBatches(
        config.datasets,
        collator,
        batch_size=config.global_batch_size // world_size,
        seed=config.seed,
        weights=config.dataset_weights,
        epoch_cells=config.epoch_cells,
        window=config.window,
        rank=rank,
        world_size=world_size,
    )


class ValidationBatches:
    """The first cells of the validation split, whose targets are the same in every evaluation.

    Args:
        config: Configuration of the run.
        collator: Collator of the training cells.
        raw: Collator with raw counts as values, for rank correlations: bins have ties that counts do not have.
        batch_size: Number of cells in a batch.
    """

    def __init__(self, config: PretrainConfig, collator: CellCollator, raw: CellCollator, batch_size: int):
        make: dict[str, Any] = {
            "batch_size": batch_size,
            "split": "validation",
            "shuffle": False,
            "drop_last": False,
            "num_threads": 0,
        }
        self.cells = CellBatches(config.datasets, collator, **make)
        self.raw = CellBatches(config.datasets, raw, **make)
        self.batch_size = batch_size
        self.num_cells = min(config.eval_cells, self.cells.num_cells)

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[dict[str, Any], Any, bool]]:
        """Yield one process's batches: the batch, raw counts in the shape of its labels, and whether it counts.

        Every process gets equally many, since a sharded model needs all processes for every batch. Where there are
        too few, batches that do not count make up for it.

        Args:
            rank: Number of the process.
            world_size: Number of processes.
        """
        step = self.batch_size * world_size
        for start in range(0, self.num_cells, step):
            rest = min(step, self.num_cells - start)
            low, high = start + rest * rank // world_size, start + rest * (rank + 1) // world_size
            counts = low < high
            span = (low, high) if counts else (0, 1)
            yield self.cells.batch(0, *span), self.raw.batch(0, *span)["labels"], counts
