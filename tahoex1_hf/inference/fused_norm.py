# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Add to the residual stream and normalise it in one pass over memory, on GPUs where Triton is installed.

torch's CUDA packages for Linux bring Triton. Its kernel is compiled in a second; `torch.compile` would need several.
"""

import logging

import torch
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

_WIDEST = 16384  # numbers of a row that one program holds
_failed: list[str] = []


def add_and_norm(
    states: torch.Tensor, addend: torch.Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype
) -> torch.Tensor:
    """Add to the residual stream, in place, and return it normalised.

    Args:
        states: `(tokens, width)` float32, the residual stream.
        addend: `(tokens, width)`; None for nothing.
        norm: The norm, with float32 weights.
        dtype: Type of what is returned.
    """
    width = states.shape[1]
    if states.is_cuda and triton is not None and norm.bias is not None and width <= _WIDEST and not _failed:
        normed = torch.empty(states.shape, dtype=dtype, device=states.device)
        try:
            _launch(states, addend, norm, normed)
            return normed
        except Exception as error:  # a machine without a C compiler; a kernel that was not compiled has not run
            logger.warning("Norms cannot be compiled here, and take longer: %s", str(error)[:500])
            _failed.append(str(error))
    if addend is not None:
        states.add_(addend)
    normed_states: torch.Tensor = norm(states)
    return normed_states.to(dtype)


def _launch(states: torch.Tensor, addend: torch.Tensor | None, norm: nn.LayerNorm, normed: torch.Tensor) -> None:
    tokens, width = states.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(width)
    with torch.cuda.device(states.device):
        _kernel[(tokens,)](
            states, states if addend is None else addend.contiguous(), norm.weight, norm.bias, normed, width, norm.eps,
            adds=addend is not None, block=block, num_warps=min(max(block // 256, 1), 8),
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _kernel(states, addend, weight, bias, normed, width, eps, adds: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """Each program takes one token."""
        row = tl.program_id(0).to(tl.int64) * width
        column = tl.arange(0, block)
        inside = column < width
        values = tl.load(states + row + column, mask=inside, other=0.0)
        if adds:
            values += tl.load(addend + row + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(states + row + column, values, mask=inside)
        centred = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        factor = tl.load(weight + column, mask=inside, other=0.0)
        shift = tl.load(bias + column, mask=inside, other=0.0)
        tl.store(normed + row + column, (centred * scale * factor + shift).to(normed.dtype.element_ty), mask=inside)
