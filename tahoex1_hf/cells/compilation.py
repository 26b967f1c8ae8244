# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Decide whether this process encodes cells with compiled loops; the results are the same either way.

Compiling takes about 10 s, once per installation. A few cells are encoded faster without it. Embedding therefore
compiles in the background, and only if there are many cells. Compiling needs numba, which the extra "data" installs.
"""

import threading
from typing import TYPE_CHECKING

import numpy as np

from tahoex1_hf.common.free_memory import give_back_memory
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

if TYPE_CHECKING:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# Compiling saves more time than it costs from this number of cells on.
COMPILE_FROM_CELLS = 20_000

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
    """Start compiling in the background if there are enough cells; later calls in the same process do nothing.

    Args:
        tokenizer: Tokenizer that encodes the cells.
        dtype: Type of the token ids.
        num_cells: Number of cells of the input.
    """
    global _started
    with _lock:
        if num_cells < COMPILE_FROM_CELLS or _started:
            return
        _started = True
    threading.Thread(target=_compile, args=(tokenizer, dtype), name="compile-encoding", daemon=True).start()


def _compile(tokenizer: "TahoeX1Tokenizer", dtype: type[np.generic]) -> None:
    from scipy.sparse import csr_matrix

    try:
        from tahoex1_hf.cells.compiled_encoding import compacted_rows, encode_compiled
    except ImportError:
        return
    token = int(np.flatnonzero(tokenizer.is_gene)[0])
    match = GeneMatch(np.array([token]), 1, 1, 0, 0, ())
    found = compacted_rows(csr_matrix(np.ones((1, 1), dtype=np.float32)), match, dtype)
    assert found is not None
    encode_compiled(tokenizer, found[0])
    _ready.set()
    give_back_memory()  # of which the compiler took much
