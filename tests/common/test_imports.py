"""Work waits for an import."""

import importlib
import sys
from pathlib import Path

import pytest

from tahoex1_hf.common import imports
from tahoex1_hf.common.imports import call_after_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "watched_module.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports._WATCHER, "actions", dict(imports._WATCHER.actions))
    monkeypatch.delitem(sys.modules, "watched_module", raising=False)
    return "watched_module"


def test_it_waits_for_the_import(module: str) -> None:
    seen: list[int] = []
    call_after_import(module, lambda: seen.append(sys.modules[module].VALUE))
    assert seen == []
    importlib.import_module(module)
    importlib.import_module(module)  # which only looks it up
    assert seen == [1]
    del sys.modules[module]


def test_it_acts_at_once_where_the_module_is_there(module: str) -> None:
    importlib.import_module(module)
    seen: list[str] = []
    call_after_import(module, lambda: seen.append(module))
    assert seen == [module]
    del sys.modules[module]


def test_a_module_that_does_not_exist_is_still_an_error() -> None:
    call_after_import("no_such_module_anywhere", lambda: pytest.fail("it was not imported"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")
    del imports._WATCHER.actions["no_such_module_anywhere"]
