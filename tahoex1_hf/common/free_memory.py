# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Memory that is free, but that the C library and Arrow keep for later."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's function that gives free memory back; None where the C library is another one."""
    if sys.platform != "linux":
        return None
    found: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def give_back_memory() -> None:
    """Give memory that is free back to the system, which takes some milliseconds.

    By itself glibc gives back what lies at the end of its heap. What was freed below that stays with the process: a
    hundred megabytes after compiling, or after arrays of other sizes than those that come next.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
    arrow: Any = sys.modules.get("pyarrow")
    if arrow is not None:
        arrow.default_memory_pool().release_unused()
