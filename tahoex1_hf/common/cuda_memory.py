# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of torch's GPU memory, and copies that the host does not wait for."""

import os
from collections.abc import Callable

import torch

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name of earlier versions


def let_segments_grow() -> None:
    """Have torch extend its blocks of GPU memory, instead of leaving gaps between blocks of other sizes.

    Batches of cells differ in their number of tokens, so that without this every batch fragments the memory further.
    The call has no effect once CUDA is in use, and leaves settings that the user has made as they are.
    """
    if not torch.cuda.is_initialized() and not any(os.environ.get(name) for name in _VARIABLES):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device; the host does not wait for a copy to a GPU, which is made from pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def arriving(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host, and return a function that waits for it and returns it."""
    if not tensor.is_cuda:
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
    done = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> torch.Tensor:
        done.synchronize()
        return copy

    return wait
