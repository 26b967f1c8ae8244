# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find NaN and infinite values in tensors, once, when these are loaded."""

from collections.abc import Iterable, Iterator

import torch


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer of a model with its name; of a quantised one, the tensors inside it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield from _plain(name, tensor.detach())


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor made of others, as torchao's
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Check that all values are finite.

    Args:
        tensors: Names and tensors; tensors of integers, or of types of one byte, are skipped.
        what: Description of their origin, for the message.

    Raises:
        ValueError: If a tensor holds NaN or infinite values; the message names the first.
    """
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel() or tensor.dtype.itemsize < 2:
            continue
        low, high = torch.aminmax(tensor)  # in one pass; NaN becomes both
        if not (torch.isfinite(low) and torch.isfinite(high)):
            wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise ValueError(
                f"{what} holds {wrong:,} values that are NaN or infinite in {name} {list(tensor.shape)}: the training "
                "that wrote it diverged, or the file is damaged. Use an earlier checkpoint, or copy it again."
            )
