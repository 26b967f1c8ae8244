# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The steps since the last line of the log, kept in checkpoints so that an interruption does not change the log."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class LogWindow:
    """Sums over the steps since the last line of the log, on one process.

    Args:
        num_losses: Number of losses of a step.

    Attributes:
        losses: Sum over the steps of each loss, with the contribution of this process's cells only.
        steps: Number of steps.
        cells: Number of cells that this process has seen.
        tokens: Number of their tokens.
        flops: Floating-point operations of the model on them.
    """

    def __init__(self, num_losses: int = 1) -> None:
        self.losses = [0.0] * num_losses
        self.steps = self.cells = self.tokens = 0
        self.flops = 0.0
        self._pending: list[torch.Tensor] = []  # losses still on the device, as reading them means waiting for it

    def add_losses(self, losses: torch.Tensor) -> None:
        """Add the losses of (a part of) a step, shape `(num_losses,)`, without waiting for the device."""
        self._pending.append(losses)

    def settle(self) -> None:
        """Read the losses that are still on the device."""
        for losses in self._pending:
            self.losses = [a + b for a, b in zip(self.losses, losses.tolist(), strict=True)]
        self._pending.clear()

    def state(self) -> dict[str, Any]:
        """Return everything as numbers, for a checkpoint."""
        self.settle()
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "LogWindow":
        """Return the window whose `state` was saved."""
        window = cls()
        vars(window).update(state)
        return window

    @classmethod
    def merged(cls, states: Sequence[dict[str, Any]], first: bool) -> "LogWindow":
        """Return the window of a process that resumes a run which had another number of processes.

        Args:
            states: `state` of all earlier processes, which cover the same steps.
            first: Whether this is the first process. The first takes all sums, the others take none.
        """
        window = cls.restored(states[0])
        sums = zip(*(state["losses"] for state in states), strict=True)
        window.losses = [sum(losses) if first else 0.0 for losses in sums]
        for name in ("cells", "tokens", "flops"):
            setattr(window, name, sum(state[name] for state in states) if first else 0)
        return window

    def totals(self, device: torch.device, processes: int) -> "LogWindow":
        """Return the window of all processes together; all of them have to call this."""
        self.settle()
        sums = torch.tensor([*self.losses, self.cells, self.tokens, self.flops], dtype=torch.float64)
        if processes > 1:
            sums = sums.to(device)
            dist.all_reduce(sums)
        *losses, cells, tokens, flops = sums.tolist()
        return LogWindow.restored(
            {"losses": losses, "steps": self.steps, "cells": cells, "tokens": tokens, "flops": flops}
        )
