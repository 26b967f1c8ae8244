"""A cluster prepares the bytes that one machine prepares, also where each task is done twice."""

from pathlib import Path
from typing import Any

import pytest
from cells import file_bytes, make_cells, write_cells, write_vocab
from preparing import source
from ray_cluster import repeating

from tahoex1_hf.common.cluster import ClusterOptions
from tahoex1_hf.data import preparation
from tahoex1_hf.data.config import parse_config
from tahoex1_hf.data.preparation import prepare


def test_the_bytes_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        write_cells(make_cells(40, seed), tmp_path / f"file{seed}", ["csr", "csc", "dense"][seed])
    settings: dict[str, Any] = {"piece_cells": 16, "shard_size_mb": 0.004, "validation": {"fraction": 0.2}}
    settings |= {"sources": [source(tmp_path / "*.h5ad")], "vocab": str(write_vocab(tmp_path))}
    prepare(parse_config({**settings, "output": str(tmp_path / "one")}, "the test"))
    monkeypatch.setattr(preparation, "connected", repeating)
    prepare(parse_config({**settings, "output": str(tmp_path / "two")}, "the test"), cluster=ClusterOptions())
    assert file_bytes(tmp_path / "two") == file_bytes(tmp_path / "one")
    assert len(file_bytes(tmp_path / "two")) > 6


def test_processes_of_this_machine_beside_a_cluster_are_refused(tmp_path: Path) -> None:
    settings = {"sources": [source(tmp_path)], "vocab": "vocab.json", "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"num_proc=2 \(--num-proc\) is for this machine"):
        prepare(parse_config(settings, "the test"), num_proc=2, cluster=ClusterOptions())
