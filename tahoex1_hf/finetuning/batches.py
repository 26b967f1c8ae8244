# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Training batches by step.

The cells of a step follow from the seed and the number of the step, so that a checkpoint need not hold a position.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from tahoex1_hf.common.prefetch import prefetch_calls

# Batches whose cells are sorted by length together: similar lengths leave little padding, and the order stays random.
_WINDOW = 50
_AHEAD = 2  # batches that are made before they are asked for


def epoch_order(rows: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the cells of every step of an epoch.

    Cells that do not fill a last step are left out; which ones differs from epoch to epoch.

    Args:
        rows: Row numbers to train on, shape `(cells,)`.
        lengths: Number of tokens of each cell, shape `(all cells,)`.
        batch_size: Cells of a step, at most as many as there are.
        seed: Seed of the order.
        epoch: Number of the epoch.

    Returns:
        `(steps, batch_size)` row numbers.
    """
    random = np.random.default_rng([seed, epoch])
    steps = len(rows) // batch_size
    order = random.permutation(rows)[: steps * batch_size]
    for start in range(0, len(order), _WINDOW * batch_size):
        window = order[start : start + _WINDOW * batch_size]
        order[start : start + len(window)] = window[np.argsort(-lengths[window], kind="stable")]
    return random.permutation(order.reshape(steps, batch_size))


class TrainingBatches:
    """This process's batches of every step, from the current one to the last; Trainer takes them for one long epoch.

    Args:
        make_batch: Function that makes a batch, given row numbers and the number of the epoch.
        rows: Row numbers to train on, shape `(cells,)`.
        lengths: Number of tokens of each cell, shape `(all cells,)`.
        batch_size: Cells of a step, over all processes.
        seed: Seed of the order.
        world: Number of this process, and number of processes.
        microbatch_size: Most cells of a batch; a step then has several.

    Attributes:
        per_step: Number of batches of a step.

    Raises:
        ValueError: If the processes cannot share a step evenly.
    """

    def __init__(
        self,
        make_batch: Callable[[np.ndarray, int], dict[str, Any]],
        rows: np.ndarray,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        world: tuple[int, int] = (0, 1),
        microbatch_size: int | None = None,
    ):
        self.make_batch, self.dataset, self.lengths, self.seed = make_batch, rows, lengths, seed
        self.rank, self.processes = world
        if batch_size % self.processes:
            raise ValueError(f"batch_size={batch_size} cannot be shared evenly by {self.processes} processes.")
        # With fewer cells than a step, a step takes all of them, as far as they can be shared evenly.
        self.batch_size = min(batch_size, len(rows) // self.processes * self.processes)
        if not self.batch_size:
            raise ValueError(f"{len(rows)} training cells are too few for {self.processes} processes.")
        here = self.batch_size // self.processes
        self.per_step = -(-here // (microbatch_size or here))
        self.steps_per_epoch = len(rows) // self.batch_size
        # Both are set before the iteration: the steps of the run, and the number of steps made so far.
        self.max_steps = 0
        self.done: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return self.max_steps * self.per_step

    def identity(self) -> dict[str, Any]:
        """Return the values that decide the order of the cells: the rows to train on, and the seed."""
        rows = np.ascontiguousarray(self.dataset, dtype=np.int64)
        return {"rows": hashlib.sha256(rows.tobytes()).hexdigest(), "seed": self.seed}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # The next batches are made while the model works on this one; no batch depends on when it is made.
        calls = (partial(self.make_batch, rows, epoch) for rows, epoch in self._plan())
        yield from prefetch_calls(calls, _AHEAD, name="training-batches")

    def _plan(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the rows and the epoch of every batch."""
        step = self.done()
        while step < self.max_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = epoch_order(self.dataset, self.lengths, self.batch_size, self.seed, epoch)
            for rows in order[first : first + self.max_steps - step]:
                for part in np.array_split(rows[self.rank :: self.processes], self.per_step):
                    yield part, epoch
                step += 1
