# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Set up CUDA while other things are done that take seconds, too."""

import os
import threading
from contextlib import suppress

import torch

from tahoex1_hf.common.cuda_memory import let_segments_grow


def start_cuda(device: str | None) -> threading.Thread | None:
    """Begin to set up the GPU of this process in a thread: its context, its memory, and the library of its products.

    That takes a second or more, in which modules can be imported and weights read. Whoever needs the GPU earlier
    waits. A failure is left to those who use the GPU, and who report it.

    Args:
        device: Device that was asked for; None for the fastest there is.

    Returns:
        The thread. None where no GPU will be used, and under a launcher, which gives each process its own.
    """
    asked = device or "cuda"
    if "LOCAL_RANK" in os.environ or not asked.startswith("cuda") or not torch.cuda.is_available():
        return None
    let_segments_grow()
    thread = threading.Thread(target=_set_up, args=(asked,), name="start-cuda")
    thread.start()
    return thread


def _set_up(device: str) -> None:
    with suppress(Exception), torch.inference_mode():
        small = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
        torch.nn.functional.linear(small, small, small[0])
    with suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()  # a checksum of Triton, 0.4 s, which its first kernel would wait for; it is kept
