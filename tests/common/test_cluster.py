"""Pieces of work on a cluster: what is lost is done again, and errors say what happened."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cells import NUM_GENES, file_bytes, make_cells, write_cells, write_vocab
from embeddings import assert_same_file
from helpers import tiny_config, tiny_model
from preparing import source
from ray_cluster import small_cluster

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.common import cluster as cluster_module
from tahoex1_hf.common import cluster_progress
from tahoex1_hf.common.cluster import Cluster, ClusterError, ClusterOptions, Stage, cluster_options, connected
from tahoex1_hf.common.cluster_progress import ClusterProgress
from tahoex1_hf.data import preparation
from tahoex1_hf.data.config import parse_config
from tahoex1_hf.embedding import on_cluster
from tahoex1_hf.embedding.files import embed_files


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Any:
    with small_cluster():
        yield


def test_a_lost_worker_is_replaced_and_its_piece_done_again(tmp_path: Path) -> None:
    """One dies before it has a result, one after it has committed its own: each piece is there once."""

    def double(row: dict[str, Any], place: str) -> dict[str, Any]:
        if row["number"] == 3 and not (Path(place) / "died early").exists():
            (Path(place) / "died early").touch()
            os.kill(os.getpid(), 9)
        return {**row, "double": 2 * row["number"]}

    class Adding:
        def __init__(self, amount: int) -> None:
            self.amount = amount

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return {**row, "sum": row["double"] + self.amount}

    def write(row: dict[str, Any], place: str) -> dict[str, Any]:
        target = Path(place) / f"{row['number']}.json"
        target.with_suffix(f".{os.getpid()}").write_text(json.dumps(row))
        target.with_suffix(f".{os.getpid()}").rename(target)
        if row["number"] == 5 and not (Path(place) / "died late").exists():
            (Path(place) / "died late").touch()
            os.kill(os.getpid(), 9)
        return {"number": row["number"]}

    with connected(ClusterOptions("local", 1, 1)) as found:
        stages = [
            Stage(double, {"place": str(tmp_path)}, cpus=0.5),
            Stage(Adding, {"amount": 1}, cpus=0.5),
            Stage(write, {"place": str(tmp_path)}, cpus=0.5),
        ]
        rows = list(found.run([{"number": number} for number in range(8)], stages))
    assert sorted(row["number"] for row in rows) == list(range(8))
    assert (tmp_path / "died early").exists()
    assert (tmp_path / "died late").exists()
    written = [json.loads((tmp_path / f"{number}.json").read_text())["sum"] for number in range(8)]
    assert written == [2 * number + 1 for number in range(8)]


def test_errors_say_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a piece is that of the worker; a piece that kills every worker ends the run after some tries."""

    def refuse(row: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("cells.h5ad: cell 7 has a negative count.")

    def die(row: dict[str, Any], place: str) -> dict[str, Any]:
        with open(f"{place}/tries", "a") as file:
            file.write("x")
        os.kill(os.getpid(), 9)
        return row

    with pytest.raises(ValueError, match=r"^cells.h5ad: cell 7 has a negative count.$"):
        with connected(ClusterOptions()) as found:
            list(found.run([{"number": 1}], [Stage(refuse, cpus=0.5)]))
    monkeypatch.setattr(cluster_module, "_RETRIES", 1)
    with pytest.raises(ClusterError, match=r"lost what it could not replace.*The same command resumes"):
        with connected(ClusterOptions()) as found:
            list(found.run([{"number": 1}], [Stage(die, {"place": str(tmp_path)}, cpus=0.5)]))
    assert len((tmp_path / "tries").read_text()) == 2  # once, and once again


def test_embedding_and_preparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of one process, though a worker with the model dies, and one that has just written a shard."""
    for seed in range(2):
        write_cells(make_cells(300, seed), tmp_path / f"{seed}", "csr")
    parts = tiny_model(tiny_config(vocab_size=NUM_GENES + 3)), TahoeX1Tokenizer(str(write_vocab(tmp_path)))
    model_died, shard_died = str(tmp_path / "model died"), str(tmp_path / "shard died")

    class Dying(on_cluster.PieceEmbedder):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            made = super().__call__(row)
            if not os.path.exists(model_died):
                open(model_died, "w").close()
                os.kill(os.getpid(), 9)
            return made

    make_shard = preparation.make_shard

    def dying(task: Any) -> Any:
        made = make_shard(task)
        if not os.path.exists(shard_died):
            open(shard_died, "w").close()
            os.kill(os.getpid(), 9)
        return made

    monkeypatch.chdir(tmp_path)  # where the workers are not
    config = {"sources": [source(Path("*.h5ad"))], "vocab": "vocab.json", "piece_cells": 100, "shard_size_mb": 0.01}
    for name, cluster in (("one", None), ("two", ClusterOptions("local", 1, 1))):
        if cluster is not None:
            monkeypatch.setattr(on_cluster, "PieceEmbedder", Dying)
            monkeypatch.setattr(preparation, "make_shard", dying)
        embed_files(["0.h5ad", "1.h5ad"], f"{name}.parquet", *parts, cluster=cluster, progress=False)
        preparation.prepare(parse_config({**config, "output": name}, "the test"), cluster=cluster)
    assert os.path.exists(model_died)
    assert os.path.exists(shard_died)
    assert_same_file(tmp_path / "two.parquet", tmp_path / "one.parquet")
    assert file_bytes(tmp_path / "two") == file_bytes(tmp_path / "one")


@pytest.mark.parametrize(
    ("rows", "together", "cpus", "blocks", "megabytes"),
    [
        (1000, 20, 2, 50, 16),
        (100_000, 20, 2, 2000, 128),  # however many there are
        (30, 20, 2, 8, 16),  # enough for all CPUs
        (30, 20, 64, 30, 16),
        (5, 1, 2, 5, 16),
        (1500, 1, 2, 1500, 16),
        (2001, 1, 2, 2000, 128),
    ],
)
def test_small_pieces_share_blocks(rows: int, together: int, cpus: int, blocks: int, megabytes: int) -> None:
    class Asked(Exception):
        pass

    def from_items(items: Any, override_num_blocks: int) -> None:
        assert len(items) == rows
        raise Asked(override_num_blocks)

    context = SimpleNamespace(target_max_block_size=0)
    data = SimpleNamespace(from_items=from_items, DataContext=SimpleNamespace(get_current=lambda: context))
    ray = SimpleNamespace(data=data, cluster_resources=lambda: {"CPU": cpus})
    with pytest.raises(Asked) as asked:
        list(Cluster(ray, ClusterOptions()).run([{"number": 0}] * rows, [], together))
    assert asked.value.args == (blocks,)
    assert context.target_max_block_size == megabytes * 2**20


def test_options_of_the_command_line() -> None:
    assert cluster_options(None, None, None) is None
    assert cluster_options("auto", None, 4) == ClusterOptions("auto", 1, 4)
    with pytest.raises(ValueError, match="--min-workers and --max-workers go with --ray ADDRESS"):
        cluster_options(None, 2, None)
    with pytest.raises(ValueError, match=r"min_workers=0 \(--min-workers\): pass at least 1"):
        cluster_options("local", 0, None)
    with pytest.raises(ValueError, match=r"max_workers=1 \(--max-workers\) is less than min_workers=2"):
        cluster_options("local", 2, 1)


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"^--ray needs Ray \(ray is missing\): pip install 'tahoex1_hf\[ray\]'.$"):
        with connected(ClusterOptions()):
            pass


def test_lines_of_progress_come_while_nothing_is_done(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_progress, "_SECONDS", 0.01)
    caplog.set_level(logging.INFO, logger="tahoex1_hf.progress")
    with ClusterProgress("out.npy", "cell", 30, 3, lambda: 2, shown=False) as watch:
        while not caplog.messages:
            time.sleep(0.005)
        watch.update(10)
    first, last = json.loads(caplog.messages[0]), json.loads(caplog.messages[-1])
    assert (first["cells_done"], first["pieces_done"], first["machines"]) == (0, 0, 2)
    assert (last["cells_done"], last["cells"], last["pieces_done"], last["pieces"]) == (10, 30, 1, 3)
