"""Prepare datasets in tests."""

import json
from pathlib import Path
from typing import Any

from cells import write_vocab

from tahoex1_hf.data.config import parse_config
from tahoex1_hf.data.preparation import prepare

METADATA = {"name": "_index", "cell_type": "cell_type", "sample": "sample"}


def run(
    tmp_path: Path, sources: list[dict[str, Any]], output: str = "out", num_proc: int = 1, **settings: Any
) -> Path:
    vocab = write_vocab(tmp_path)
    config = {"sources": sources, "output": str(tmp_path / output), "vocab": str(vocab), **settings}
    prepare(parse_config(config, "the test"), num_proc)
    return tmp_path / output


def source(path: Path, kind: str = "anndata", **settings: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "paths": [str(path)],
        "metadata": METADATA if kind == "anndata" else {"name": "_index"},
    } | settings


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())
