"""Loops are compiled for many cells, and loaded for fewer where an earlier process has compiled them."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cells import write_vocab

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells import compilation, kernels, ragged


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TahoeX1Tokenizer:
    """Return a tokenizer, in a process that has not begun to compile."""
    monkeypatch.setattr(compilation, "_ready", threading.Event())
    monkeypatch.setattr(compilation, "_started", False)
    return TahoeX1Tokenizer(str(write_vocab(tmp_path)))


def started(tokenizer: TahoeX1Tokenizer, num_cells: int) -> bool:
    """Return whether the loops are ready once what was started has ended."""
    compilation.start(tokenizer, np.uint16, num_cells)
    for thread in threading.enumerate():
        if thread.name == "compile-encoding":
            thread.join()
    return compilation.is_ready()


@pytest.mark.parametrize(
    ("num_cells", "on_disk", "ready"),
    [(4_999, True, False), (5_000, True, True), (5_000, False, False), (19_999, False, False), (20_000, False, True)],
)
def test_when_loops_are_used(
    tokenizer: TahoeX1Tokenizer, num_cells: int, on_disk: bool, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_is_on_disk", lambda loop: on_disk)
    assert started(tokenizer, num_cells) == ready


def test_an_input_with_more_cells_may_compile(tokenizer: TahoeX1Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_is_on_disk", lambda loop: False)
    assert not started(tokenizer, 10_000)
    assert started(tokenizer, 20_000)


def test_loops_are_found_on_disk(tokenizer: TahoeX1Tokenizer, tmp_path: Path) -> None:
    assert started(tokenizer, 20_000)
    for loop in (kernels.encode_rows, ragged.compact_csr):
        assert compilation._is_on_disk(loop)
        empty = SimpleNamespace(py_func=loop.py_func, stats=SimpleNamespace(cache_path=str(tmp_path)))
        assert not compilation._is_on_disk(empty)
