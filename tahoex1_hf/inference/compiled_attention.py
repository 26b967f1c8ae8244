# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention within cells, by a small C program that is compiled where it serves.

In bfloat16, on processors with matrix tiles (AMX), torch's attention takes twice as long (700 tokens, two cores of a
Xeon). In float32, with AVX-512, it takes 1.2 to 1.5 times as long, with AVX2 1.1 to 1.4 times (300 to 4,096 tokens).
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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import record_function

logger = logging.getLogger(__name__)

SWITCH = "TAHOEX1_COMPILED_ATTENTION"
NAME = "tahoex1_hf::compiled_attention"  # as torch's profiler shows it
_SOURCE = Path(__file__).with_name("cells_attention.c")
_SOURCES = [_SOURCE, *(_SOURCE.with_name(f"attention_{dtype}.h") for dtype in ("bfloat16", "float32"))]


@dataclass(frozen=True)
class _Program:
    """What the source is compiled to.

    Args:
        instructions: Those that the processor must have, as /proc/cpuinfo names them, and as compilers do.
        tolerance: Most that values of about 1 may differ from torch's.
    """

    instructions: Mapping[str, str]
    tolerance: float

    @property
    def options(self) -> list[str]:
        return ["-O3", "-std=gnu11", "-shared", "-fPIC", *(f"-m{name}" for name in self.instructions.values())]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# The first one serves whose instructions are there.
_PROGRAMS = {
    torch.bfloat16: [
        _Program(
            {"amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "avx512_bf16": "avx512bf16"}
            | _same("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
            tolerance=0.02,  # two roundings to bfloat16
        )
    ],
    torch.float32: [_Program(_same("avx512f", "fma"), 1e-5), _Program(_same("avx2", "fma"), 1e-5)],
}
# Variables that have torch, or oneDNN, do without some of the processor's instructions; so does this program, then.
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WIDEST = 256  # numbers of a head


@dataclass(frozen=True, eq=False)
class CompiledAttention:
    """The compiled program.

    Args:
        library: The loaded library.
        dtype: Type of the numbers that it computes with.
        parallel: Function of the library by which torch computes in several threads; None for one thread.
    """

    library: ctypes.CDLL
    dtype: torch.dtype
    parallel: ctypes.c_void_p | None = None

    def __call__(
        self,
        projected: torch.Tensor,
        boundaries: torch.Tensor,
        heads: int,
        key_heads: int,
        scaling: float,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let the tokens of each cell attend to one another.

        Args:
            projected: `(tokens, (heads + 2 * key_heads) * width)`: queries, keys and values of each token.
            boundaries: `(cells + 1,)` int64, from 0 to the number of tokens.
            heads: Number of heads of the queries.
            key_heads: Number of heads of keys and values, each for as many of the queries'.
            scaling: Factor of the scores.
            out: Where to write the result, without gaps; None for new memory.
            bias: `((heads + 2 * key_heads) * width,)` float32 that is to be added to each token's queries, keys and
                values, in float32 alone; None for nothing.

        Returns:
            `(tokens, heads * width)`.

        Raises:
            ValueError: If an argument does not fit.
            MemoryError: If there is no memory for a cell's keys and values.
        """
        projected, bounds = projected.contiguous(), boundaries.to("cpu", torch.int64).contiguous()
        width, rest = divmod(projected.shape[1], heads + 2 * key_heads)
        if projected.dtype != self.dtype or rest or not serves_heads(heads, key_heads, width):
            raise ValueError(
                f"{tuple(projected.shape)} {projected.dtype} is not what {heads} and {key_heads} heads take."
            )
        lengths = np.diff(bounds.numpy())
        if bounds[0] != 0 or bounds[-1] != len(projected) or (lengths < 0).any():
            raise ValueError(f"boundaries must rise from 0 to the number of tokens ({len(projected)}).")
        shape = (len(projected), heads * width)
        output = torch.empty(shape, dtype=self.dtype) if out is None else out
        if output.shape != shape or output.dtype != self.dtype or not output.is_contiguous():
            raise ValueError(
                f"out must be {shape} {self.dtype} without gaps, not {tuple(output.shape)} {output.dtype}."
            )
        if bias is not None and (self.dtype, bias.dtype, bias.shape) != (
            torch.float32,
            torch.float32,
            projected.shape[1:],
        ):
            raise ValueError(f"bias must be {tuple(projected.shape[1:])} float32, for a program in float32.")
        biases = None if bias is None else bias.contiguous()
        with record_function(NAME):
            failed = self.library.tahoex1_attend(
                *(
                    ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
                    for tensor in (projected, biases, output, bounds)
                ),
                *(ctypes.c_int64(number) for number in (len(lengths), heads, key_heads, width)),
                ctypes.c_float(scaling), ctypes.c_int64(torch.get_num_threads()), self.parallel or ctypes.c_void_p(),
            )  # fmt: skip
        if failed:
            raise MemoryError(f"There is no memory for attention within a cell of {lengths.max()} tokens.")
        return output


def serves_heads(heads: int, key_heads: int, width: int) -> bool:
    """Return whether the program computes heads of this width, and so many of them."""
    return heads % key_heads == 0 and width % 32 == 0 and width <= _WIDEST


def compiled_attention(dtype: torch.dtype) -> CompiledAttention | None:
    """Return the program, compiled when it is first asked for; None where it cannot be used, or is not to be."""
    if os.environ.get(SWITCH, "1") == "0" or any(os.environ.get(name) for name in _LIMITS):
        return None
    return _loaded(dtype)


@cache
def _loaded(dtype: torch.dtype) -> CompiledAttention | None:
    there = _instructions()
    program = next((each for each in _PROGRAMS.get(dtype, []) if set(each.instructions) <= there), None)
    if program is None:
        return None
    try:
        library = ctypes.CDLL(str(_compiled(program)))
        if library.tahoex1_may_compute():
            raise OSError("the system does not allow matrix tiles")
        attention = CompiledAttention(library, dtype, _parallel())
        _check(attention, program.tolerance)
    except Exception as error:  # no compiler, no place for the file, another system: torch attends
        logger.info("Attention in %s is torch's: it cannot be compiled here (%s).", dtype, str(error)[:300])
        return None
    return attention


def _instructions() -> set[str]:
    """Return what this processor can do, as /proc/cpuinfo names it; nothing on other systems."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return set()
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return set()
    return set(flags.split())


def _parallel() -> ctypes.c_void_p | None:
    """Return `GOMP_parallel` of torch's own copy of OpenMP; None if it cannot be told from others."""
    mapped = {Path(line.split(maxsplit=5)[5].strip()) for line in Path("/proc/self/maps").open() if "omp" in line}
    found = [path for path in mapped if path.name.startswith(("libgomp", "libiomp5"))]
    beside = Path(torch.__file__).parent
    own = [path for path in found if beside in path.parents or path.parent.name == "torch.libs"] or found
    if len(own) != 1:
        return None
    return ctypes.cast(ctypes.CDLL(str(own[0])).GOMP_parallel, ctypes.c_void_p)


def _compiled(program: _Program) -> Path:
    """Return the library's file, which is made if the cache lacks it."""
    source = b"".join(path.read_bytes() for path in _SOURCES)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tahoex1_hf"
    digest = hashlib.sha256(source + " ".join(program.options).encode()).hexdigest()[:16]
    library = folder / f"cells_attention_{digest}.so"
    if not library.exists():
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise OSError("there is no C compiler")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / library.name
            command = [compiler, *program.options, str(_SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"{compiler} fails: {done.stderr.strip()[:200]}")
            made.replace(library)  # at once, since other processes may look for it
    return library


@torch.inference_mode()
def _check(attention: CompiledAttention, tolerance: float) -> None:
    """Compare with torch's attention, on a few cells."""
    heads, key_heads, width, lengths = 2, 1, 64, [1, 33, 170]
    random = torch.Generator().manual_seed(0)
    projected = torch.randn(sum(lengths), (heads + 2 * key_heads) * width, generator=random).to(attention.dtype)
    ours = attention(projected, torch.tensor([0, *np.cumsum(lengths)]), heads, key_heads, width**-0.5)
    exact = torch.cat([_by_torch(cell, heads, key_heads, width) for cell in projected.float().split(lengths)])
    difference = float((ours.float() - exact).abs().max())
    if not difference < tolerance:
        raise ArithmeticError(f"it differs by {difference} from torch's")


def _by_torch(projected: torch.Tensor, heads: int, key_heads: int, width: int) -> torch.Tensor:
    """Attend within one cell: `(tokens, (heads + 2 * key_heads) * width)` to `(tokens, heads * width)`."""
    joined = projected.unflatten(1, (-1, width)).transpose(0, 1).unsqueeze(0)
    query, key, value = joined.split([heads, key_heads, key_heads], dim=1)
    attended = scaled_dot_product_attention(query, key, value, enable_gqa=heads != key_heads)
    return attended[0].transpose(0, 1).flatten(1)
