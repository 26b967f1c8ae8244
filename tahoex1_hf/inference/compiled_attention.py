# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention within cells in bfloat16, by a small C program that is compiled where it serves.

On processors with matrix tiles (AMX) torch's attention takes twice as long (cells of 700 tokens, two cores of a Xeon).
The program needs Linux, such a processor and a C compiler, takes half a second to compile, and is kept in the user's
cache. Where anything is missing, torch attends. Results differ in last digits, so a run says with which it began.
`TAHOEX1_COMPILED_ATTENTION=0` switches it off.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

SWITCH = "TAHOEX1_COMPILED_ATTENTION"
_SOURCE = Path(__file__).with_name("cells_attention.c")
# As /proc/cpuinfo names them, and as compilers do.
_INSTRUCTIONS = {"amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "avx512_bf16": "avx512bf16"}
_INSTRUCTIONS |= {name: name for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")}
_OPTIONS = ["-O3", "-std=gnu11", "-shared", "-fPIC", *(f"-m{name}" for name in _INSTRUCTIONS.values())]
# Variables that have torch, or oneDNN, do without some of the processor's instructions; so does this program, then.
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_WIDEST = 256  # numbers of a head
_MOST_THREADS = 256
_TOLERANCE = 0.02  # most that values of about 1 may differ from torch's: two roundings to bfloat16


@dataclass(frozen=True, eq=False)
class CompiledAttention:
    """The compiled program.

    Args:
        library: The loaded library.
        openmp: Functions of the library by which torch computes in several threads; empty for one thread.
    """

    library: ctypes.CDLL
    openmp: tuple[ctypes.c_void_p, ...] = ()

    def __call__(
        self, projected: torch.Tensor, boundaries: torch.Tensor, heads: int, key_heads: int, scaling: float
    ) -> torch.Tensor:
        """Let the tokens of each cell attend to one another.

        Args:
            projected: `(tokens, (heads + 2 * key_heads) * width)` bfloat16: queries, keys and values of each token.
            boundaries: `(cells + 1,)` int64, from 0 to the number of tokens.
            heads: Number of heads of the queries.
            key_heads: Number of heads of keys and values, each for as many of the queries'.
            scaling: Factor of the scores.

        Returns:
            `(tokens, heads * width)` bfloat16.

        Raises:
            ValueError: If an argument does not fit.
            MemoryError: If there is no memory for the scores of 64 tokens.
        """
        projected, bounds = projected.contiguous(), boundaries.to("cpu", torch.int64).contiguous()
        width, rest = divmod(projected.shape[1], heads + 2 * key_heads)
        if projected.dtype != torch.bfloat16 or rest or not serves_heads(heads, key_heads, width):
            raise ValueError(
                f"{tuple(projected.shape)} {projected.dtype} is not what {heads} and {key_heads} heads take."
            )
        lengths = np.diff(bounds.numpy())
        if bounds[0] != 0 or bounds[-1] != len(projected) or (lengths < 0).any():
            raise ValueError(f"boundaries must rise from 0 to the number of tokens ({len(projected)}).")
        output = torch.empty(len(projected), heads * width, dtype=torch.bfloat16)
        threads = min(torch.get_num_threads(), _MOST_THREADS) if self.openmp else 1
        shares = _shares(lengths, heads, threads)
        failed = self.library.tahoex1_attend(
            *(ctypes.c_void_p(array) for array in (projected.data_ptr(), output.data_ptr(), bounds.data_ptr())),
            *(ctypes.c_int64(number) for number in (len(lengths), heads, key_heads, width)),
            ctypes.c_float(scaling), ctypes.c_void_p(shares.ctypes.data), ctypes.c_int64(threads),
            *(self.openmp or [ctypes.c_void_p()] * len(_OPENMP)),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"There is no memory for attention within a cell of {lengths.max()} tokens.")
        return output


def serves_heads(heads: int, key_heads: int, width: int) -> bool:
    """Return whether the program computes heads of this width, and so many of them."""
    return heads % key_heads == 0 and width % 32 == 0 and width <= _WIDEST


def _shares(lengths: np.ndarray, heads: int, threads: int) -> np.ndarray:
    """Return the bounds of the threads' heads of cells, `(threads + 1,)` int64, of about the same work each."""
    work = np.repeat(lengths.astype(np.float64) * (lengths + 64), heads)
    upto = np.cumsum(work)
    wanted = np.linspace(0, upto[-1] if len(upto) else 0, threads + 1)[1:-1]
    return np.concatenate([[0], np.searchsorted(upto, wanted), [len(work)]]).astype(np.int64)


def compiled_attention() -> CompiledAttention | None:
    """Return the program, compiled when it is first asked for; None where it cannot be used, or is not to be."""
    if os.environ.get(SWITCH, "1") == "0" or any(os.environ.get(name) for name in _LIMITS):
        return None
    return _loaded()


@cache
def _loaded() -> CompiledAttention | None:
    if not _has_instructions():
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
        if library.tahoex1_may_use_tiles():
            raise OSError("the system does not allow matrix tiles")
        attention = CompiledAttention(library, _openmp())
        _check(attention)
    except Exception as error:  # no compiler, no place for the file, another system: torch attends
        logger.info("Attention is torch's: it cannot be compiled here (%s).", str(error)[:300])
        return None
    return attention


def _has_instructions() -> bool:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return set(_INSTRUCTIONS) <= set(flags.split())


def _openmp() -> tuple[ctypes.c_void_p, ...]:
    """Return the functions of torch's own copy of OpenMP; none if it cannot be told from others."""
    mapped = {Path(line.split(maxsplit=5)[5].strip()) for line in Path("/proc/self/maps").open() if "omp" in line}
    found = [path for path in mapped if path.name.startswith(("libgomp", "libiomp5"))]
    beside = Path(torch.__file__).parent
    own = [path for path in found if beside in path.parents or path.parent.name == "torch.libs"] or found
    if len(own) != 1:
        return ()
    library = ctypes.CDLL(str(own[0]))
    return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _OPENMP)


def _compiled() -> Path:
    """Return the library's file, which is made if the cache lacks it."""
    source = _SOURCE.read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tahoex1_hf"
    digest = hashlib.sha256(source + " ".join(_OPTIONS).encode()).hexdigest()[:16]
    library = folder / f"cells_attention_{digest}.so"
    if not library.exists():
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise OSError("there is no C compiler")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / library.name
            command = [compiler, *_OPTIONS, str(_SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"{compiler} fails: {done.stderr.strip()[:200]}")
            made.replace(library)  # at once, since other processes may look for it
    return library


@torch.inference_mode()
def _check(attention: CompiledAttention) -> None:
    """Compare with torch's attention, on a few cells."""
    heads, key_heads, width, lengths = 2, 1, 64, [1, 33, 70]
    random = torch.Generator().manual_seed(0)
    projected = torch.randn(sum(lengths), (heads + 2 * key_heads) * width, generator=random).bfloat16()
    ours = attention(projected, torch.tensor([0, *np.cumsum(lengths)]), heads, key_heads, width**-0.5)
    exact = torch.cat([_by_torch(cell, heads, key_heads, width) for cell in projected.float().split(lengths)])
    difference = float((ours.float() - exact).abs().max())
    if not difference < _TOLERANCE:
        raise ArithmeticError(f"it differs by {difference} from torch's")


def _by_torch(projected: torch.Tensor, heads: int, key_heads: int, width: int) -> torch.Tensor:
    """Attend within one cell: `(tokens, (heads + 2 * key_heads) * width)` to `(tokens, heads * width)`."""
    joined = projected.unflatten(1, (-1, width)).transpose(0, 1).unsqueeze(0)
    query, key, value = joined.split([heads, key_heads, key_heads], dim=1)
    attended = scaled_dot_product_attention(query, key, value, enable_gqa=heads != key_heads)
    return attended[0].transpose(0, 1).flatten(1)
