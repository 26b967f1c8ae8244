"""Python snippets of a page of documentation, and the commands in its shell blocks."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from helpers import GOLDEN, tiny_config
from typer.main import get_command

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.cli.app import app

_BLOCK = re.compile(r"^( *)```(?P<kind>python|sh)\n(?P<code>.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
_TITLE_OR_CODE = re.compile(r"^#+ (?P<title>[^\n]+)$|^```python\n(?P<code>.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def titled_snippets(page: Path) -> dict[str, str]:
    """Return the page's Python snippets by the titles above them, one for each."""
    found: dict[str, str] = {}
    title = ""
    for match in _TITLE_OR_CODE.finditer(page.read_text(encoding="utf-8")):
        title = match["title"] or title
        if match["code"]:
            assert title not in found, f"{title}: one snippet under a title"
            found[title] = match["code"]
    return found


def blocks(page: Path, kind: str) -> list[str]:
    """Return the blocks of code of a page: those of Python, or of a shell (`sh`)."""
    return [match["code"] for match in _BLOCK.finditer(page.read_text(encoding="utf-8")) if match["kind"] == kind]


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of each call of tahoex1 in the page's shell blocks, launchers and comments taken off."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words[:1] == ["tahoex1"]:
                    found.append(words[1:])
                elif "tahoex1_hf" in words and words[words.index("tahoex1_hf") - 1] == "-m":
                    found.append(words[words.index("tahoex1_hf") + 1 :])
                elif words[:2] == ["docker", "run"]:
                    image = next(i for i, word in enumerate(words) if word.startswith("tahoex1"))
                    found.append(words[image + 1 :])
    return found


def every_command() -> dict[str, Any]:
    """Return the commands by their words: `embed`, `index build`."""
    found: dict[str, Any] = {}
    for name, each in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(each, "commands", None)
        found |= {name: each} if inner is None else {f"{name} {word}": command for word, command in inner.items()}
    return found


def run(code: str, origin: str, names: dict[str, Any]) -> None:
    """Execute a snippet among the names of its page."""
    exec(compile(code, origin, "exec"), names)


def write_model(place: Path) -> Path:
    """Write a tiny model with its code, as `tahoex1 export` builds a repository."""
    genes = [f"ENSG{number:011d}" for number in (3, 5, *range(100, 160))]
    tokens = {token: number for number, token in enumerate(["<pad>", "<cls>", *genes])}
    (place / "vocab.json").write_text(json.dumps(tokens))
    torch.manual_seed(0)
    model = TahoeX1ForPreTraining(tiny_config(vocab_size=len(tokens)))
    model.save_pretrained(place, with_code=True)
    TahoeX1Tokenizer(place / "vocab.json", context_length=64).save_pretrained(place, with_code=True)
    return place


def write_cells(path: Path, model: Path, num_cells: int = 12) -> Path:
    """Write cells with genes of the model, and of the golden one that stands for the Hub's."""
    vocabularies = (model / "vocab.json", GOLDEN / "a_70m_like" / "model" / "vocab.json")
    known = [[token for token in json.loads(file.read_text()) if token.startswith("ENSG")] for file in vocabularies]
    genes = list(dict.fromkeys([*known[0], *known[1][:40]]))
    random = np.random.default_rng(0)
    counts = random.integers(1, 30, (num_cells, len(genes))) * (random.random((num_cells, len(genes))) < 0.4)
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)))
    adata.var_names = genes
    adata.obs["cell_type"] = pd.Categorical(["B", "NK", "T"] * (num_cells // 3))
    adata.write_h5ad(path)
    return path
