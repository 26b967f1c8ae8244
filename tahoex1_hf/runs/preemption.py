# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Save a checkpoint when SIGTERM asks a run to end."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PREEMPTED = 75  # exit code: try again later (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
    """Raised where SIGTERM ended the run after a checkpoint."""


class Preemption(TrainerCallback):
    """On SIGTERM, save a checkpoint after the current step and end the run, in all processes at the same step.

    Attributes:
        agreed: Whether the run was ended in this way.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._asked = False
        self._earlier_handler: Any = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Handle the signal from here on, which Python allows in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._earlier_handler = signal.signal(signal.SIGTERM, self._ask)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Restore the earlier handler."""
        if self._earlier_handler is not None:
            signal.signal(signal.SIGTERM, self._earlier_handler)
            self._earlier_handler = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """End the run if any process was asked to, since the signal reaches processes at different steps."""
        asked = self._asked
        if args.world_size > 1:
            flag = torch.tensor(float(asked), device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked and state.global_step < state.max_steps:
            self.agreed = True
            control.should_save = control.should_training_stop = True
        return control
