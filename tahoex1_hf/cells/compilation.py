# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Decide whether this process encodes cells with compiled loops; the results are the same either way.

Compiling takes about 10 CPU seconds, once per installation: numba keeps the loops on disk, from where they are loaded
in half a second. A few cells are encoded faster without them. Embedding therefore compiles or loads them in the
background, and only if there are enough cells. They need numba, which the extra "data" installs.
"""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.free_memory import give_back_memory
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

if TYPE_CHECKING:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# Numbers of cells from which on it saves more time than it costs: to compile the loops (a cell of 2,500 genes takes
# 141 us in numpy and 17 compiled; one of 800, 24 and 4), and to load those that an earlier process has compiled.
COMPILE_FROM_CELLS = 20_000
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


def start(tokenizer: "TahoeX1Tokenizer", dtype: type[np.generic], num_cells: int) -> None:
    """Start compiling or loading in the background if there are enough cells; do nothing where it has begun already.

    Args:
        tokenizer: Tokenizer that encodes the cells.
        dtype: Type of the token ids.
        num_cells: Number of cells of the input.
    """
    global _started
    with _lock:
        if num_cells < LOAD_FROM_CELLS or _started:
            return
        _started = True
    arguments = (tokenizer, dtype, num_cells >= COMPILE_FROM_CELLS)
    threading.Thread(target=_prepare, args=arguments, name="compile-encoding", daemon=True).start()


def _prepare(tokenizer: "TahoeX1Tokenizer", dtype: type[np.generic], may_compile: bool) -> None:
    global _started
    from scipy.sparse import csr_matrix

    try:
        from tahoex1_hf.cells import kernels, ragged
        from tahoex1_hf.cells.compiled_encoding import compacted_rows, encode_compiled
    except ImportError:
        return
    if not (may_compile or (_is_on_disk(kernels.encode_rows) and _is_on_disk(ragged.compact_csr))):
        _started = False  # an input with more cells may compile
        return
    token = int(np.flatnonzero(tokenizer.is_gene)[0])
    match = GeneMatch(np.array([token]), 1, 1, 0, 0, ())
    found = compacted_rows(csr_matrix(np.ones((1, 1), dtype=np.float32)), match, dtype)
    assert found is not None
    encode_compiled(tokenizer, found[0])
    _ready.set()
    give_back_memory()  # of which the compiler took much


def _is_on_disk(loop: Any) -> bool:
    """Return whether numba has an index of a function's compiled versions: `MODULE.NAME-LINE.PYTHON.nbi`."""
    function = loop.py_func
    module = Path(function.__code__.co_filename).stem
    names = f"{module}.{function.__name__}-{function.__code__.co_firstlineno}.*.nbi"
    return any(Path(loop.stats.cache_path).glob(names))
