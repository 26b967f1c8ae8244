# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Run a function in a thread of its own, so that it cannot change the caller's number of OpenMP threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_own_thread(work: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Return the result of a function that uses UMAP or scanpy.

    numba's first parallel loop sets OpenMP's number of threads to that of all cores, for the thread that runs it.
    torch takes that number, too, whatever OMP_NUM_THREADS or `torch.set_num_threads` said, and sums in another order.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments, **options).result()
