# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The processes of `accelerate launch` that share the work of inference, or train together."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tahoex1_hf.common.cuda_memory import let_segments_grow

if TYPE_CHECKING:
    from accelerate import PartialState

Value = TypeVar("Value")

# Processes of inference wait for each other only at the beginning and at the end, which may be hours apart.
_TIMEOUT = timedelta(days=30)
# In a training they wait for the first one while it writes or reads alone. NCCL's own limit, ten minutes, is too
# little for that, and Trainer's `ddp_timeout` comes too late: Accelerate's state has been made by then.
_TRAINING_TIMEOUT = timedelta(hours=1)


def training_processes() -> "PartialState":
    """Connect the processes of a training run, with a limit of an hour for what they wait for."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=_TRAINING_TIMEOUT)


@dataclass(frozen=True)
class Processes:
    """This process among all processes of a run.

    Attributes:
        index: Number of this process.
        count: Number of processes.
        state: Accelerate's `PartialState`; None for a single process.
    """

    index: int
    count: int
    state: Any = None

    @classmethod
    def current(cls) -> "Processes":
        """Connect the processes that a launcher started; without a launcher, there is this process alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1)
        from accelerate import PartialState

        # Without cpu=True, Accelerate takes each process of a machine without a GPU for the only one.
        let_segments_grow()
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)
        if state.num_processes == 1:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but Accelerate finds a single process: start several with "
                "`accelerate launch`, or unset WORLD_SIZE."
            )
        return cls(state.process_index, state.num_processes, state)

    def device(self) -> torch.device | None:
        """Return the device of this process; None for a single process, which may choose."""
        return None if self.state is None else self.state.device

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Return in every process what the first process makes; an exception there is raised in all."""
        if self.state is None:
            return make()
        from accelerate.utils import broadcast_object_list

        made: list[Any] = [None, None]
        if self.index == 0:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        value: Value = made[0]
        return value

    def wait(self) -> None:
        """Wait until all processes have arrived here."""
        if self.state is not None:
            self.state.wait_for_everyone()
