# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Types of numbers, by torch's objects and by their names."""

from collections.abc import Sequence

import torch


def dtype_name(dtype: str | torch.dtype, choices: Sequence[str]) -> str:
    """Return the name of a type, such as "bfloat16", for `torch.bfloat16`, "bfloat16" and "torch.bfloat16".

    Args:
        dtype: the type, or its name.
        choices: names that there are.

    Raises:
        ValueError: for another one.
    """
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, (str, torch.dtype)) or name not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"dtype={dtype!r}: pass one of {known}, or torch's dtype of that name.")
    return name
