# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The processes of `accelerate launch` that share a piece of work, as far as inference needs to know of each other."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")

# Processes wait for each other at the beginning and at the end only; in between lie hours.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        index: its number.
        count: how many there are.
        state: of Accelerate; None for a single process.
    """

    index: int
    count: int
    state: Any = None

    @classmethod
    def current(cls) -> "Processes":
        """Those that a launcher started, connected with each other; this one alone without a launcher."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1)
        from accelerate import PartialState

        # Without being told, Accelerate takes each process of a machine without a GPU for the only one.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
        if state.num_processes == 1:
            raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but Accelerate finds a single process.")
        return cls(state.process_index, state.num_processes, state)

    def device(self) -> torch.device | None:
        """The device of this process; None where it can choose."""
        return None if self.state is None else self.state.device

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, in all of them; what it raises, all raise."""
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
        """Wait until all have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()
