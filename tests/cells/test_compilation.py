"""Loops are compiled for very many cells, and loaded for fewer where an earlier process has compiled them."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tahoex1_hf.cells import compilation, kernels, ragged


@pytest.fixture(autouse=True)
def not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a process that has not begun to compile."""
    monkeypatch.setattr(compilation, "_ready", threading.Event())
    monkeypatch.setattr(compilation, "_started", False)


def started(num_cells: int) -> bool:
    """Return whether the loops are ready once what was started has ended."""
    compilation.start(np.uint16, num_cells)
    for thread in threading.enumerate():
        if thread.name == "compile-encoding":
            thread.join()
    return compilation.is_ready()


@pytest.mark.parametrize(
    ("num_cells", "on_disk", "ready"),
    [(4_999, True, False), (5_000, True, True), (5_000, False, False), (49_999, False, False), (50_000, False, True)],
)
def test_when_loops_are_used(num_cells: int, on_disk: bool, ready: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_elsewhere = []
    monkeypatch.setattr(compilation, "_is_on_disk", lambda loop: on_disk)
    monkeypatch.setattr(compilation, "_compile_elsewhere", lambda dtype: not compiled_elsewhere.append(dtype))
    assert started(num_cells) == ready
    assert compiled_elsewhere == [np.uint16] * (ready and not on_disk)


def test_an_input_with_more_cells_may_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_is_on_disk", lambda loop: False)
    monkeypatch.setattr(compilation, "_compile_elsewhere", lambda dtype: True)
    assert not started(10_000)
    assert started(50_000)


def test_without_another_process_cells_are_encoded_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_is_on_disk", lambda loop: False)
    monkeypatch.setattr(compilation.sys, "executable", "/nowhere/python")
    assert not started(50_000)


def test_another_process_compiles_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compilation.load_loops(np.uint16)  # at most the first test of an installation waits for the compiler
    monkeypatch.chdir(tmp_path)
    assert compilation._compile_elsewhere(np.uint16)


def test_loops_are_found_on_disk(tmp_path: Path) -> None:
    compilation.load_loops(np.uint16)
    for loop in (kernels.encode_rows, ragged.compact_csr):
        assert compilation._is_on_disk(loop)
        empty = SimpleNamespace(py_func=loop.py_func, stats=SimpleNamespace(cache_path=str(tmp_path)))
        assert not compilation._is_on_disk(empty)
