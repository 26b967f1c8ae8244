"""Every snippet of docs/from-transformers.md runs, on a small checkpoint under the names that the page uses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import GOLDEN, REPO_ROOT, tiny_config
from hub_server import fill_cache
from transformers import TrainingArguments

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer

PAGE = REPO_ROOT / "docs" / "from-transformers.md"
_TITLE_OR_CODE = re.compile(r"^#+ (?P<title>[^\n]+)$|^```python\n(?P<code>.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def snippets() -> dict[str, str]:
    """Return the page's snippets by the titles above them."""
    found: dict[str, str] = {}
    title = ""
    for match in _TITLE_OR_CODE.finditer(PAGE.read_text(encoding="utf-8")):
        title = match["title"] or title
        if match["code"]:
            assert title not in found, f"{title}: one snippet under a title"
            found[title] = match["code"]
    return found


SNIPPETS = snippets()
FIRST = "From transformers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with its code, as `tahoex1 export` builds a repository."""
    place = tmp_path_factory.mktemp("checkpoint")
    genes = [f"ENSG{number:011d}" for number in (3, 5, *range(100, 160))]
    tokens = {token: number for number, token in enumerate(["<pad>", "<cls>", *genes])}
    (place / "vocab.json").write_text(json.dumps(tokens))
    torch.manual_seed(0)
    model = TahoeX1ForPreTraining(tiny_config(vocab_size=len(tokens)))
    model.save_pretrained(place, with_code=True)
    TahoeX1Tokenizer(place / "vocab.json", context_length=64).save_pretrained(place, with_code=True)
    return place


@pytest.fixture(scope="module")
def cells(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabularies = (folder / "vocab.json", GOLDEN / "a_70m_like" / "model" / "vocab.json")  # one for each name
    known = [[token for token in json.loads(path.read_text()) if token.startswith("ENSG")] for path in vocabularies]
    genes = list(dict.fromkeys([*known[0], *known[1][:40]]))
    random = np.random.default_rng(0)
    counts = random.integers(1, 30, (12, len(genes))) * (random.random((12, len(genes))) < 0.4)
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)))
    adata.var_names = genes
    adata.obs["cell_type"] = pd.Categorical(["B", "NK", "T"] * 4)
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


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
    exec(compile(SNIPPETS[FIRST], f"{PAGE}: {FIRST}", "exec"), names)
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
    exec(compile(code, f"{PAGE}: {title}", "exec"), page_names)
