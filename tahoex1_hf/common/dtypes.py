# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of torch's number types."""

from collections.abc import Sequence

import torch


def dtype_name(dtype: str | torch.dtype, choices: Sequence[str]) -> str:
    """Return the name of a type, such as "bfloat16", for `torch.bfloat16`, "bfloat16" and "torch.bfloat16".

    Args:
        dtype: The type, or its name.
        choices: Allowed names.

    Raises:
        ValueError: If the type is not among them.
    """
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, (str, torch.dtype)) or name not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"dtype={dtype!r}: pass one of {known}, or torch's dtype of that name.")
    return name
