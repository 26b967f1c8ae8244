# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Decide whether this process encodes cells with compiled loops; the results are the same either way.

Compiling takes about 4 CPU seconds, once per installation: numba keeps the loops on disk, from where they are loaded
in half a second. Embedding therefore loads them in the background if there are enough cells, and for very many has
another process compile them: compiling in a thread of this one would hold Python's lock, and a GPU would wait (on an
H100, 20,000 cells were embedded at 46 % of the model's rate). They need numba, which the extra "data" installs.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tahoex1_hf.common.free_memory import give_back_memory
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

# Numbers of cells from which on it saves more time than it costs: to compile the loops (6 s in another process; a cell
# of 2,500 genes takes 141 us in numpy and 17 compiled, one of 800 takes 24 and 4), and to load those that an earlier
# process has compiled.
COMPILE_FROM_CELLS = 50_000
LOAD_FROM_CELLS = 5_000

_ready, _lock = threading.Event(), threading.Lock()
_started = False


def is_ready() -> bool:
    """Return whether compiled loops should be used."""
    return _ready.is_set()


def use_now() -> None:
    """Use compiled loops from now on, and compile each when it is first called; do nothing if numba is missing."""
    try:
        from tahoex1_hf.cells import compiled_encoding  # noqa: F401
    except ImportError:
        return
    _ready.set()


def start(dtype: type[np.generic], num_cells: int) -> None:
    """Start loading or compiling in the background if there are enough cells; do nothing where it has begun already.

    Args:
        dtype: Type of the token ids.
        num_cells: Number of cells of the input.
    """
    global _started
    with _lock:
        if num_cells < LOAD_FROM_CELLS or _started:
            return
        _started = True
    arguments = (dtype, num_cells >= COMPILE_FROM_CELLS)
    threading.Thread(target=_prepare, args=arguments, name="compile-encoding", daemon=True).start()


def _prepare(dtype: type[np.generic], may_compile: bool) -> None:
    global _started
    try:
        from tahoex1_hf.cells import kernels, ragged
    except ImportError:
        return
    if not (_is_on_disk(kernels.encode_rows) and _is_on_disk(ragged.compact_csr)):
        if not may_compile:
            _started = False  # an input with more cells may compile
            return
        if not _compile_elsewhere(dtype):
            return
    load_loops(dtype)
    _ready.set()
    give_back_memory()  # of which the compiler took much


def load_loops(dtype: type[np.generic]) -> None:
    """Load the loops for token ids of this type, or compile them, by encoding a cell of one gene."""
    from scipy.sparse import csr_matrix

    from tahoex1_hf.cells.compiled_encoding import compacted_rows, encode_compiled

    tokenizer: Any = SimpleNamespace(
        value_encoding="bins", first_gene_raw=False, context_length=None, overflow="sample", right_binning=False,
        num_bins=51, target_sum=1e4, pad_value=-2.0, cls_token="<cls>", convert_tokens_to_ids=lambda names: [1],
    )  # fmt: skip
    match = GeneMatch(np.array([2]), 1, 1, 0, 0, ())
    found = compacted_rows(csr_matrix(np.ones((1, 1), dtype=np.float32)), match, dtype)
    assert found is not None
    encode_compiled(tokenizer, found[0])


def _compile_elsewhere(dtype: type[np.generic]) -> bool:
    """Have another process compile the loops and keep them on disk; return whether it did."""
    command = [sys.executable, "-m", "tahoex1_hf.cells.compilation", np.dtype(dtype).name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, check=False)
    except OSError:
        return False
    return done.returncode == 0


def _is_on_disk(loop: Any) -> bool:
    """Return whether numba has an index of a function's compiled versions: `MODULE.NAME-LINE.PYTHON.nbi`."""
    function = loop.py_func
    module = Path(function.__code__.co_filename).stem
    names = f"{module}.{function.__name__}-{function.__code__.co_firstlineno}.*.nbi"
    return any(Path(loop.stats.cache_path).glob(names))


if __name__ == "__main__":
    load_loops(np.dtype(sys.argv[1]).type)
