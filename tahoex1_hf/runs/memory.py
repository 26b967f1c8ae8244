# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of a run."""

import resource
import sys

import torch


def peak_memory_gb() -> float:
    """Return the peak memory so far in GB, of the CUDA device where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
