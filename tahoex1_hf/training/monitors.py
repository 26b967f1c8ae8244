# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Callbacks that log speed, memory and remaining time, and warn of losses that jump and weights that do not learn."""

import logging
import math
import re
import statistics
import time
from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tahoex1_hf.runs.memory import peak_memory_gb

logger = logging.getLogger(__name__)

# Dense bfloat16 rates in TFLOP/s, from NVIDIA's data sheets, by the whole name of a card without "NVIDIA". Forms of a
# card differ, and so do parts of one (MIG): a card whose name is not here is measured instead.
_PEAKS = {
    r"H100 80GB HBM3|H100 SXM5|GH200 .*|H200": 989,
    r"H100 NVL|H200 NVL": 835,
    r"H100 PCIe": 756,
    r"A100-\S+|A100 80GB PCIe": 312,
    r"B200": 2250,
    r"L40S": 362,
    r"L40": 181,
    r"L4": 121,
}

_SPIKE = 3.0  # a value above this many times its recent median is a spike


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a device, from its data sheet or measured on a product of matrices."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for names, tflops in _PEAKS.items():
            if re.fullmatch(names, name.removeprefix("NVIDIA ")):
                return tflops * 1e12
    if device.type != "cpu":
        return _measured_flops(device, dtype, 8192)
    flops = _measured_flops(device, dtype, 512)
    # A product that takes longer has work enough for all threads, and a larger one would only take longer.
    return flops if 2 * 512**3 / flops > 1e-3 else _measured_flops(device, dtype, 1024)


def _measured_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of the fastest of some products of square matrices."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * size**3 / best


class SpeedMonitor(TrainerCallback):
    """A callback that adds speed, memory and the remaining time to the lines of the log.

    Args:
        args: Trainer's options.
        peak: FLOP/s of one device, for the model FLOP utilisation.
    """

    def __init__(self, args: TrainingArguments, peak: float):
        self.args, self.peak = args, peak
        self.started = self.line = time.perf_counter()
        self.first_step = self.last_step = self.evaluating = 0.0
        self.steps = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.started = self.line = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Count the steps, and time the first."""
        self.steps += 1
        if self.steps == 1:
            self.first_step = time.perf_counter() - self.started
        return control

    def extended(self, logs: dict[str, float], state: TrainerState) -> dict[str, float]:
        """Return a line of the log with rates over the time since the last line; other lines stay as they are."""
        now = time.perf_counter()
        flops = logs.pop("flops", None)
        if flops is None:
            return logs
        cells, tokens = logs.pop("cells"), logs.pop("tokens")
        seconds, self.line = now - self.line, now
        rate = self.steps / (now - self.started)
        logs |= {
            "cells_per_second": cells / seconds,
            "tokens_per_second": tokens / seconds,
            "flop_utilisation": flops / seconds / (self.peak * self.args.world_size),
            "peak_memory_gb": peak_memory_gb(),
            "hours_left": (state.max_steps - state.global_step) / rate / 3600,
        }
        if self.first_step:
            logs["seconds_to_first_step"], self.first_step = self.first_step, 0.0
        return logs


class SpikeWarning(TrainerCallback):
    """A callback that warns of a loss or gradient norm of more than three times its recent median."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=50) for name in ("loss", "grad_norm")}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Compare a line of the log with those before it, and warn."""
        for name, recent in self.recent.items():
            value = (logs or {}).get(name)
            if value is None:
                continue
            usual = statistics.median(recent) if len(recent) >= 5 else math.inf
            if value > _SPIKE * usual and state.is_world_process_zero:
                logger.warning(
                    "%s at step %d is %.4g, %.1f times its recent median.",
                    name,
                    state.global_step,
                    value,
                    value / usual,
                )
            recent.append(float(value))


class UntrainedWarning(TrainerCallback):
    """A callback that warns in the first step if matrices of the layers have a gradient of exactly 0.

    Nothing else would say so: the loss falls all the same. With torch 2.11, attention in compiled layers had none.
    """

    def __init__(self) -> None:
        self.looked = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Look at the gradients, once."""
        if self.looked or model is None:
            return
        self.looked = True
        without = [
            name
            for name, parameter in model.named_parameters()
            if ".layers." in name and parameter.ndim == 2 and parameter.requires_grad and _is_zero(parameter.grad)
        ]
        if without and state.is_world_process_zero:
            logger.warning(
                "The loss does not depend on %d matrices of the layers, such as %s: their gradient in the first step "
                "is 0, so they would not be trained. If compile=false helps, a compiler is at fault.",
                len(without),
                without[0],
            )


def _is_zero(gradient: torch.Tensor | None) -> bool:
    """Return whether a gradient is missing or 0; of one that is in shards (FSDP), this process's shard counts."""
    if gradient is None:
        return True
    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return own.numel() > 0 and not bool(own.any())
