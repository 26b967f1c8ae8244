"""A cluster prepares the bytes that one machine prepares, whatever is lost on the way."""

import os
from pathlib import Path
from typing import Any

import pytest
from cells import file_bytes, make_cells, write_cells, write_vocab
from preparing import source
from ray_cluster import small_cluster

from tahoex1_hf.common.cluster import ClusterOptions
from tahoex1_hf.data import preparation
from tahoex1_hf.data.config import parse_config
from tahoex1_hf.data.preparation import prepare


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Any:
    with small_cluster():
        yield


def dying_once(task: Any, marker: str, before: bool) -> Any:
    """Return a function that does a task, and whose process is killed the first time, before or after it."""

    def dying(given: Any) -> Any:
        first = not os.path.exists(marker)
        if first:
            open(marker, "w").close()
        if first and before:
            os.kill(os.getpid(), 9)
        result = task(given)
        if first:
            os.kill(os.getpid(), 9)
        return result

    return dying


def test_the_bytes_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers die before they have a piece and when a shard is written; paths are those of the first process."""
    for seed in range(2):
        write_cells(make_cells(40, seed), tmp_path / f"file{seed}", ["csr", "csc"][seed])
    write_vocab(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"piece_cells": 16, "shard_size_mb": 0.004, "validation": {"fraction": 0.2}}
    settings |= {"sources": [source(Path("*.h5ad"))], "vocab": "vocab.json"}
    prepare(parse_config({**settings, "output": "one"}, "the test"))
    monkeypatch.setattr(preparation, "make_piece", dying_once(preparation.make_piece, f"{tmp_path}/early", True))
    monkeypatch.setattr(preparation, "make_shard", dying_once(preparation.make_shard, f"{tmp_path}/late", False))
    prepare(parse_config({**settings, "output": "two"}, "the test"), cluster=ClusterOptions())
    assert (tmp_path / "early").exists()
    assert (tmp_path / "late").exists()
    assert file_bytes(tmp_path / "two") == file_bytes(tmp_path / "one")


def test_processes_of_this_machine_beside_a_cluster_are_refused(tmp_path: Path) -> None:
    settings = {"sources": [source(tmp_path)], "vocab": "vocab.json", "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"num_proc=2 \(--num-proc\) is for this machine"):
        prepare(parse_config(settings, "the test"), num_proc=2, cluster=ClusterOptions())
