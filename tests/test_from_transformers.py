"""Every snippet of docs/from-transformers.md runs, on a small checkpoint under the names that the page uses."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN, REPO_ROOT
from hub_server import fill_cache
from snippets import run, titled_snippets, write_cells, write_model
from transformers import TrainingArguments

PAGE = REPO_ROOT / "docs" / "from-transformers.md"
SNIPPETS = titled_snippets(PAGE)
FIRST = "From transformers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def cells(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cells(tmp_path_factory.mktemp("cells") / "cells.h5ad", folder)


@pytest.fixture
def page_names(
    folder: Path, cells: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Run the page's first lines where its names mean something, and return what they define."""
    shutil.copytree(GOLDEN / "a_70m_like" / "model", tmp_path / "today" / "70m-model")
    fill_cache(hub_cache, "owner/tahoe-x1", {"main": folder})
    fill_cache(hub_cache, "tahoebio/Tahoe-x1", {"main": tmp_path / "today"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    (work / "cells.h5ad").symlink_to(cells)
    monkeypatch.chdir(work)
    names: dict[str, Any] = {"__name__": "page"}
    run(SNIPPETS[FIRST], f"{PAGE}: {FIRST}", names)
    return names


def test_the_page_has_what_people_do() -> None:
    assert len(SNIPPETS) > 20
    assert "tests/test_from_transformers.py" in PAGE.read_text()


@pytest.mark.parametrize("title", [title for title in SNIPPETS if title != FIRST])
def test_it_runs(title: str, page_names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    code = SNIPPETS[title]
    for library in ("peft", "datasets", "accelerate", "torchao"):
        if f"from {library}" in code:
            pytest.importorskip(library)
    compiled = torch.compile
    # The default backend would spend half a minute in a C++ compiler.
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    usual = TrainingArguments.__init__
    # The page's reader has a GPU or not; here there is none to be found busy.
    monkeypatch.setattr(TrainingArguments, "__init__", lambda self, *a, **k: usual(self, *a, **{"use_cpu": True, **k}))
    run(code, f"{PAGE}: {title}", page_names)
