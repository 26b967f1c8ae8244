# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tell whether a base is the one that an adapter was trained on, by a few of its weights.

On another base of the same shape, an adapter gives meaningless numbers. A digest would not do, since the same base may
also be stored in another type, with rounded values.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_TENSORS, _VALUES = 24, 8  # number of tensors in a sample, and of values of each
# Distance between samples, relative to their length, of two bases that are not the same. Rounding to bfloat16 makes
# 0.002 and to eight bits 0.01; for two trainings of the same shape it is above 1.
_FAR = 0.1


def sample_of(model: Any) -> dict[str, list[float]]:
    """Return a few weights of a model's transformer, by name; adapters and quantised tensors are left out."""
    tensors = _weights(model)
    names = sorted(tensors)[:: max(1, -(-len(tensors) // _TENSORS))]
    return {name: [float(f"{value:.6g}") for value in _some(tensors[name])] for name in names}


def check_base(folder: Path, sample: Mapping[str, Sequence[float]], trained_on: str, model: Any) -> None:
    """Check that a base has the weights of the base that an adapter was trained on.

    Args:
        folder: Folder of the adapter.
        sample: Result of `sample_of` for the base that the adapter was trained on; if empty, any base passes.
        trained_on: Name of the base that it was trained on.
        model: The base.

    Raises:
        ValueError: If the weights are of another base.
    """
    tensors = _weights(model)
    names = [name for name in sample if name in tensors]
    if not names:
        return
    then = torch.tensor([value for name in names for value in sample[name]], dtype=torch.float64)
    now = torch.tensor([value for name in names for value in _some(tensors[name])], dtype=torch.float64)
    if then.shape != now.shape or (then - now).norm() > _FAR * then.norm():
        raise ValueError(
            f"{folder} is an adapter for other weights: this base has the shape of the one that it was trained on, "
            f"{trained_on}, but not its weights. Pass base= to name the right one (remove base_sample from "
            "finetuning.json to use this one all the same)."
        )


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the matrices of a model's transformer, by the names that they have without adapters."""
    found = {}
    for name, tensor in model.base_model.named_parameters():
        is_own = not any(part in name for part in ("lora_", "modules_to_save", "drug_encoder.embedding"))
        if is_own and tensor.ndim == 2 and tensor.is_floating_point() and not hasattr(tensor, "__tensor_flatten__"):
            found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor.detach()
    return found


def _some(tensor: torch.Tensor) -> list[float]:
    flat = tensor.flatten()
    places = torch.linspace(0, len(flat) - 1, _VALUES).long()
    return [float(value) for value in flat[places.to(flat.device)].double().cpu()]
