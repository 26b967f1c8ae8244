# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Save a checkpoint when SIGTERM asks a run to end."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

PREEMPTED = 75  # exit code: try again later (EX_TEMPFAIL of sysexits.h)

_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds, which torchrun and `accelerate launch` read


class Preempted(Exception):
    """Raised where SIGTERM ended the run after a checkpoint."""


class Preemption(TrainerCallback):
    """On SIGTERM, save a checkpoint after the current step and end the run, in all processes at the same step.

    Attributes:
        agreed: Whether the run was ended in this way.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._asked = self._told = False
        self._earlier_handler: Any = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def note_save(self, seconds: float) -> None:
        """Warn once if a checkpoint took longer than the launcher leaves processes between SIGTERM and SIGKILL."""
        patience = float(os.environ.get(_PATIENCE, "30"))
        if seconds > patience and not self._told and "TORCHELASTIC_RUN_ID" in os.environ:
            self._told = True
            logger.warning(
                "A checkpoint took %.0f s, and the launcher kills this run %.0f s after SIGTERM, before one is whole: "
                "set %s=%d where it is started.",
                seconds,
                patience,
                _PATIENCE,
                int(2 * seconds) + 1,
            )

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
