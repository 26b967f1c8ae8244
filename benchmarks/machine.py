"""Describe the machine, and measure its rates of multiplying and copying, with which everything else is compared."""

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

ALL_CORES = sorted(os.sched_getaffinity(0))


@contextmanager
def bound_to(cores: int) -> Iterator[None]:
    """Bind this thread and the threads that it starts to a number of cores; torch then works in this thread alone."""
    threads = torch.get_num_threads()
    os.sched_setaffinity(0, ALL_CORES[:cores])
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, ALL_CORES)
        torch.set_num_threads(threads)


def matmul_rate(dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> float:
    """Return the GFLOP/s of a 2048 x 2048 x 2048 product on all of torch's threads."""
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    torch.matmul(left, right)
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        torch.matmul(left, right)
        count += 1
    return count * 2 * 2048**3 / (time.perf_counter() - start) / 1e9


def copy_rate(threads: int = 1, megabytes: int = 256) -> float:
    """Return the GB/s (read and written together) of copies between arrays of `megabytes`, one pair per thread."""
    numbers = megabytes * 2**20 // 8 // threads
    pairs = [(np.ones(numbers), np.empty(numbers)) for _ in range(threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        for _ in range(4):
            np.copyto(pair[1], pair[0])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))  # pages are handed out at the first touch
        start = time.perf_counter()
        list(pool.map(copy, pairs))
        seconds = time.perf_counter() - start
    return 4 * 2 * threads * pairs[0][0].nbytes / seconds / 1e9


def description() -> dict[str, Any]:
    """Return the facts about the machine that belong beside the figures."""
    import transformers

    settings = torch.__config__.show()
    interesting = (
        "avx2",
        "fma3",
        "avx512_f",
        "avx512_bf16",
        "avx512_vnni",
        "avx_vnni",
        "amx_bf16",
        "amx_int8",
        "bf16",
    )
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cpu": _cpu_name(),
        "cores": len(ALL_CORES),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "capabilities": {name: bool(capabilities[name]) for name in interesting if name in capabilities},
        "libraries": [
            line.strip(" -") for line in settings.splitlines() if "Math Kernel" in line or "MKL-DNN" in line
        ],
        "blas": next(iter(re.findall(r"BLAS_INFO=(\w+)", settings)), "unknown"),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
