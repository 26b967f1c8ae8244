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


def test_a_store_holds_all_that_a_run_needs_to_go_on(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped while it reads, and while it gathers, is resumed from the store alone, by anyone."""
    import fsspec

    for seed in range(3):
        write_cells(make_cells(40, seed), tmp_path / f"file{seed}", ["csr", "csc", "dense"][seed])
    settings: dict[str, Any] = {"piece_cells": 16, "shard_size_mb": 0.004, "validation": {"fraction": 0.2}}
    settings |= {"sources": [source(tmp_path / "*.h5ad")], "vocab": str(write_vocab(tmp_path))}
    prepare(parse_config({**settings, "output": str(tmp_path / "one")}, "the test"))
    expected = file_bytes(tmp_path / "one")
    store = fsspec.filesystem("s3")
    store.mkdir("prepared")
    monkeypatch.setattr(preparation, "connected", repeating)
    config = parse_config({**settings, "output": "s3://prepared/some/where"}, "the test")

    def objects() -> dict[str, bytes]:
        store.invalidate_cache()
        root = "prepared/some/where/"
        return {path.removeprefix(root): store.cat_file(path) for path in store.find(root)}

    for name, most in (("make_batches", 4), ("write_shard", 2)):
        real, calls = getattr(preparation, name), []

        def stopping(*arguments: Any, _real: Any = real, _most: int = most, _calls: list[int] = calls) -> Any:
            _calls.append(1)
            if len(_calls) > _most:
                raise KeyboardInterrupt
            return _real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(preparation, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                prepare(config, cluster=ClusterOptions() if name == "write_shard" else None)
        assert "manifest.json" not in objects()
        assert any(path.startswith(".prepare/pieces/") for path in objects())
    shards = [path for path in objects() if path.startswith("data/")]
    assert len(shards) == 2  # the stand-in does each task twice, and finds the second time that it is done
    assert all(objects()[path] == expected[path] for path in shards)
    prepare(config, cluster=ClusterOptions())
    assert objects() == expected
    prepare(config)  # it is complete: nothing is left to do
    assert objects() == expected
    with pytest.raises(ValueError, match=r"output='s3://prepared/some/where' holds.*other settings \(seed\)"):
        prepare(config.model_copy(update={"seed": 5}))
    prepare(config.model_copy(update={"piece_cells": 100}), overwrite=True)
    assert {path for path in objects() if path.startswith("data/")} == {
        path for path in expected if path.startswith("data/")
    }
