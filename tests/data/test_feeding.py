"""Training batches from prepared datasets are the same for any number of processes and workers, and after any stop."""

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from cells import expressed_in, make_cells, read_dataset, write_vocab
from forked import PATIENCE, Forked
from preparing import run, source
from torch.utils.data import DataLoader

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.readers.prepared import ShardCache
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.data.feeding import CellBatches
from tahoex1_hf.data.order import CellOrder, MixedOrder

BATCH_KEYS = ("input_ids", "expression_values", "target_mask", "labels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of 330 cells in several shards."""
    place = tmp_path_factory.mktemp("dataset")
    make_cells(350).write_h5ad(place / "a.h5ad")
    settings = {"shard_size_mb": 0.006, "validation": {"fraction": 0.06}}
    result = run(place, [source(place / "a.h5ad")], **settings)
    assert len(manifest(result)["splits"]["train"]["shards"]) >= 4
    return result


@pytest.fixture(scope="module")
def collator(folder: Path) -> CellCollator:
    return CellCollator(TahoeX1Tokenizer(str(folder / "vocab.json"), context_length=14))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def num_cells(folder: Path) -> int:
    return manifest(folder)["splits"]["train"]["cells"]


def cells_of(batch: dict[str, Any]) -> list[tuple]:
    """Return every cell of a batch, without its padding."""
    masks = batch["attention_mask"]
    return [tuple(tuple(batch[k][r][masks[r]].tolist()) for k in BATCH_KEYS) for r in range(len(masks))]


def steps_of(batches: Any) -> list[list[tuple]]:
    return [cells_of(batch) for batch in batches]


def bytes_kept_in(folder: Path) -> int:
    """Return the size of a cache's finished files, some of which a thread may be removing just now."""
    total = 0
    for path in folder.rglob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def joined(parts: Any) -> list[tuple]:
    """Return the cells of several batches."""
    return [cell for part in parts for cell in part]


def test_an_epoch_holds_every_cell_once_as_it_is_on_disk(folder: Path) -> None:
    whole = CellCollator(TahoeX1Tokenizer(str(folder / "vocab.json"), value_encoding="raw"), mlm_probability=None)
    batches = CellBatches(folder, whole, batch_size=7, drop_last=False)
    seen = Counter()
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            valid = batch["attention_mask"][row]
            seen[tuple(sorted(zip(batch["input_ids"][row][valid].tolist()[1:], batch["expression_values"][row][valid].tolist()[1:], strict=True)))] += 1  # fmt: skip  # noqa: E501
    rows = read_dataset(folder, "train")
    expected = Counter(tuple(sorted(zip(g.tolist(), c.astype(float).tolist(), strict=True))) for g, c in zip(rows["genes"], rows["counts"], strict=True))  # fmt: skip  # noqa: E501
    assert seen == expected
    assert sum(seen.values()) == num_cells(folder)
    adata = make_cells(350)
    names = {i: token for token, i in json.loads((folder / "vocab.json").read_text()).items()}
    cell = next(iter(seen))
    assert {names[g]: c for g, c in cell} in [expressed_in(adata, i) for i in range(350)]


def test_epochs_differ_and_seeds_differ(folder: Path, collator: CellCollator) -> None:
    batches = CellBatches(folder, collator, batch_size=10)
    first, second = steps_of(batches), steps_of(batches)
    assert batches.epoch == 2
    assert first != second
    assert steps_of(CellBatches(folder, collator, batch_size=10)) == first
    other = CellBatches(folder, collator, batch_size=10, seed=1)
    assert steps_of(other) != first
    other.set_epoch(0)
    back = CellBatches(folder, collator, batch_size=10)
    back.set_epoch(1)
    assert steps_of(back) == second


def test_the_samples_of_a_cell_differ_between_epochs(folder: Path, collator: CellCollator) -> None:
    batches = CellBatches(folder, collator, batch_size=10, shuffle=False, drop_last=False)
    first, second = (joined(steps_of(batches)) for _ in range(2))
    assert len(first) == len(second) == num_cells(folder)
    assert np.mean([a != b for a, b in zip(first, second, strict=True)]) > 0.95


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [1, 9])
def test_threads_change_nothing(folder: Path, collator: CellCollator, threads: int, prefetch: int) -> None:
    expected = steps_of(CellBatches(folder, collator, batch_size=16, num_threads=0))
    ours = CellBatches(folder, collator, batch_size=16, num_threads=threads, prefetch=prefetch)
    assert steps_of(ours) == expected


@pytest.mark.parametrize("window", [1, 50, 10**6])
def test_windows_shuffle_without_losing_a_cell(folder: Path, collator: CellCollator, window: int) -> None:
    batches = CellBatches(folder, collator, batch_size=5, window=window, drop_last=False)
    assert len({cell[0] for step in steps_of(batches) for cell in step}) > 0.98 * num_cells(folder)


# Processes and workers ------------------------------------------------------------------------------


def test_global_batches_are_the_same_for_any_number_of_ranks(folder: Path, collator: CellCollator) -> None:
    expected = steps_of(CellBatches(folder, collator, batch_size=32))
    assert len(expected) == num_cells(folder) // 32
    for world in (2, 4):
        ranks = [
            steps_of(CellBatches(folder, collator, batch_size=32 // world, rank=r, world_size=world))
            for r in range(world)
        ]
        assert [joined(parts) for parts in zip(*ranks, strict=True)] == expected


def test_the_last_cells_are_divided_or_dropped(folder: Path, collator: CellCollator) -> None:
    total = num_cells(folder)
    for world in (1, 2, 3, 4):
        kept = [
            CellBatches(folder, collator, batch_size=9, rank=r, world_size=world, drop_last=False, num_threads=0)
            for r in range(world)
        ]
        steps = [steps_of(rank) for rank in kept]
        assert [len(rank) for rank in kept] == [len(rank) for rank in steps]
        everyone = [cell for rank in steps for step in rank for cell in step]
        assert len(everyone) == total
        assert len(set(everyone)) > 0.98 * total
        dropped = CellBatches(folder, collator, batch_size=9, rank=world - 1, world_size=world)
        assert len(dropped) == total // (9 * world) == len(steps_of(dropped))


PROCESS = """
import json, os, sys, torch
import torch.distributed as dist
from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.data.feeding import CellBatches
folder, out, store, rank, world = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
collator = CellCollator(TahoeX1Tokenizer(folder + "/vocab.json", context_length=14), pad_to_multiple_of=14)
batches = CellBatches(folder, collator, batch_size=32 // world, rank=dist.get_rank(), world_size=dist.get_world_size())
steps = []
for batch in batches:
    step = torch.stack([batch[k].float() for k in ("input_ids", "expression_values", "target_mask", "labels")])
    parts = [torch.empty_like(step) for _ in range(world)]
    dist.all_gather(parts, step.contiguous())  # processes that are out of step would hang here
    steps.append(torch.cat(parts, dim=1))
if rank == 0:
    torch.save(torch.stack(steps), out)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_two_and_four_processes_see_the_same_global_batches(folder: Path, tmp_path: Path) -> None:
    results = []
    for world in (1, 2, 4):
        arguments = [str(folder), str(tmp_path / f"{world}.pt"), str(tmp_path / f"store{world}")]
        processes = [Forked([sys.executable, "-c", PROCESS, *arguments, rank, world]) for rank in range(world)]
        assert [process.wait(timeout=PATIENCE) for process in processes] == [0] * world
        results.append(torch.load(tmp_path / f"{world}.pt", weights_only=True))
    assert results[0].shape[:3] == (num_cells(folder) // 32, 4, 32)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@pytest.mark.parametrize(("workers", "start"), [(1, "fork"), (3, "fork"), (1, "spawn")])
def test_a_data_loaders_workers_change_nothing(folder: Path, collator: CellCollator, workers: int, start: str) -> None:
    expected = steps_of(CellBatches(folder, collator, batch_size=16))
    batches = CellBatches(folder, collator, batch_size=16, num_threads=0)
    state = batches.state_dict()
    loader = DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=start)
    assert steps_of(loader) == expected
    state["cells"] = 5 * 16  # loaded here, before there are workers
    batches.load_state_dict(state)
    assert steps_of(DataLoader(batches, batch_size=None, num_workers=workers)) == expected[5:]


def test_a_trainer_takes_rows_of_datasets_through_the_collator(folder: Path, collator: CellCollator) -> None:
    import datasets

    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "hf"))
    batch = next(iter(DataLoader(rows, batch_size=8, collate_fn=collator)))
    assert batch["input_ids"].shape == (8, 14)


# Resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 7, 20])
@pytest.mark.parametrize("threads", [0, 2])
def test_resume_is_exact_in_mid_epoch(folder: Path, collator: CellCollator, stop: int, threads: int) -> None:
    whole = CellBatches(folder, collator, batch_size=8, num_threads=threads)
    expected = steps_of(whole) + steps_of(whole)
    batches = CellBatches(folder, collator, batch_size=8, num_threads=threads)
    seen, iterator = [], iter(batches)
    for _ in range(stop):
        seen.append(cells_of(next(iterator)))
    state = json.loads(json.dumps(batches.state_dict()))
    iterator.close()
    resumed = CellBatches(folder, collator, batch_size=8, num_threads=threads)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)  # as a trainer does; the position must survive it
    assert seen + steps_of(resumed) + steps_of(resumed) == expected


def test_resume_at_the_end_and_in_a_later_epoch(folder: Path, collator: CellCollator) -> None:
    whole = CellBatches(folder, collator, batch_size=8)
    epochs = [steps_of(whole) for _ in range(3)]
    batches = CellBatches(folder, collator, batch_size=8)
    list(batches)
    iterator = iter(batches)
    for _ in range(5):
        next(iterator)
    state = batches.state_dict()
    assert state["epoch"] == 1
    resumed = CellBatches(folder, collator, batch_size=8)
    resumed.load_state_dict(state)
    assert steps_of(resumed) == epochs[1][5:]
    assert steps_of(resumed) == epochs[2]


def test_resume_with_another_number_of_processes(folder: Path, collator: CellCollator) -> None:
    expected = steps_of(CellBatches(folder, collator, batch_size=16))
    batches = CellBatches(folder, collator, batch_size=4, rank=1, world_size=4)
    iterator = iter(batches)
    for _ in range(6):
        next(iterator)
    state = batches.state_dict()
    ranks = []
    for rank in range(2):
        resumed = CellBatches(folder, collator, batch_size=8, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        ranks.append(steps_of(resumed))
    assert [a + b for a, b in zip(*ranks, strict=True)] == expected[6:]
    uneven = CellBatches(folder, collator, batch_size=10)
    with pytest.raises(ValueError, match=r"96 cells were seen, not a multiple of batch_size \* world_size = 10"):
        uneven.load_state_dict(state)


def test_a_state_from_other_data_or_settings_is_refused(folder: Path, collator: CellCollator, tmp_path: Path) -> None:
    state = CellBatches(folder, collator, batch_size=8).state_dict()
    make_cells(100, seed=5).write_h5ad(tmp_path / "a.h5ad")
    other = run(tmp_path, [source(tmp_path / "a.h5ad")])
    with pytest.raises(ValueError, match="the state was saved with other shards, num_cells"):
        CellBatches(other, collator, batch_size=8).load_state_dict(state)
    for settings, name in (({"seed": 1}, "seed"), ({"window": 7}, "window"), ({"shuffle": False}, "shuffle")):
        with pytest.raises(ValueError, match=f"the state was saved with other {name}"):
            CellBatches(folder, collator, batch_size=8, **settings).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_stateful_loader_resumes_exactly(folder: Path, collator: CellCollator, workers: int) -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        batches = CellBatches(folder, collator, batch_size=16, num_threads=0)
        return loaders.StatefulDataLoader(batches, batch_size=None, num_workers=workers)

    expected = steps_of(CellBatches(folder, collator, batch_size=16))
    for stop in (1, 4, 7):
        first = loader()
        iterator = iter(first)
        seen = [cells_of(next(iterator)) for _ in range(stop)]
        state = first.state_dict()
        del iterator
        resumed = loader()
        resumed.load_state_dict(state)
        assert seen + steps_of(resumed) == expected, stop


# Mixing -----------------------------------------------------------------------------------


def test_a_mixture_has_its_weights_and_resumes(folder: Path, collator: CellCollator, tmp_path: Path) -> None:
    make_cells(60, seed=5).write_h5ad(tmp_path / "b.h5ad")
    other = run(tmp_path, [source(tmp_path / "b.h5ad")])
    settings: dict[str, Any] = {"weights": [3, 1], "epoch_cells": 2048, "batch_size": 64}
    batches = CellBatches([folder, other], collator, **settings)
    counted: Counter = Counter()
    for step in range(len(batches)):
        for rows, dataset, _, _ in batches._cells(0, step * 64, step * 64 + 64)[0]:
            counted[dataset] += len(rows)
    assert counted.total() == 2048
    assert abs(counted[1] - 512) < 60
    expected = steps_of(batches) + steps_of(batches)
    again = CellBatches([folder, other], collator, **settings)
    iterator = iter(again)
    for _ in range(9):
        next(iterator)
    resumed = CellBatches([folder, other], collator, **settings)
    resumed.load_state_dict(again.state_dict())
    assert steps_of(resumed) + steps_of(resumed) == expected[9:]
    ranks = [
        steps_of(CellBatches([folder, other], collator, **{**settings, "batch_size": 16}, rank=r, world_size=4))
        for r in range(4)
    ]
    assert [joined(parts) for parts in zip(*ranks, strict=True)] == expected[: len(ranks[0])]


def test_several_datasets_without_weights_are_one_pool(folder: Path, collator: CellCollator, tmp_path: Path) -> None:
    make_cells(60, seed=5).write_h5ad(tmp_path / "b.h5ad")
    other = run(tmp_path, [source(tmp_path / "b.h5ad")])
    batches = CellBatches([folder, other], collator, batch_size=10, drop_last=False)
    counted: Counter = Counter()
    for rows, dataset, _, _ in batches._cells(0, 0, batches.num_cells)[0]:
        counted[dataset] += len(rows)
    assert counted == {0: num_cells(folder), 1: num_cells(other)}


# Drugs, formats, remote places ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_drugs_are_looked_up_in_the_tokenizers_table(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tahoe-100M's control is in no drug table, and some of its names end in a blank."""
    adata = make_cells(60)
    names = ["Selinexor ", "DMSO_TF", "aspirin"]
    adata.obs["drug"] = [None if i % 5 == 0 else names[i % 3] for i in range(60)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    vocab = write_vocab(tmp_path / "model", drug_token=True)
    from tahoex1_hf.data.config import parse_config
    from tahoex1_hf.data.preparation import prepare

    sources = [source(tmp_path / "a.h5ad", metadata={"name": "_index", "drug": "drug"})]
    config = {
        "sources": sources,
        "output": str(tmp_path / "out"),
        "vocab": str(vocab),
        "validation": {"fraction": 0.3},
    }
    prepare(parse_config({**config, "format": form, "shard_size_mb": 0.005}, "test"))
    table = {"<pad>": 0, "Selinexor": 1, "aspirin": 2}
    collator = CellCollator(TahoeX1Tokenizer(str(vocab), drug_to_id=table))
    rows = read_dataset(tmp_path / "out", "train")
    kind = rows["drug"].astype(object).where(rows["drug"].notna(), None)
    with caplog.at_level(logging.WARNING):
        batches = CellBatches(tmp_path / "out", collator, batch_size=len(rows), shuffle=False)
        drugs = next(iter(batches))["drug_ids"].tolist()
        CellBatches(tmp_path / "out", collator, batch_size=4, split="validation")
        other = CellCollator(TahoeX1Tokenizer(str(vocab), drug_to_id=table))
        next(iter(CellBatches(tmp_path / "out", other, batch_size=4, rank=1, world_size=2)))
    assert drugs == [0 if name is None else table.get(name.strip(), 0) for name in kind]
    assert set(drugs) == {0, 1, 2}
    (record,) = caplog.records  # one for all splits and processes, before the first batch
    assert f"'DMSO_TF' ({kind.tolist().count('DMSO_TF')})" in record.getMessage()
    refuses = CellCollator(TahoeX1Tokenizer(str(vocab), drug_to_id=table, unknown_drugs="error"))
    for rank in (0, 1):
        with pytest.raises(ValueError, match="'DMSO_TF' is not in the drug table"):
            CellBatches(tmp_path / "out", refuses, batch_size=8, rank=rank, world_size=2)


def test_parquet_and_wide_types_feed_the_same(tmp_path: Path) -> None:
    make_cells(90).write_h5ad(tmp_path / "a.h5ad")
    results = []
    for form in ("arrow", "parquet"):
        folder = run(tmp_path, [source(tmp_path / "a.h5ad")], form, format=form, shard_size_mb=0.005)
        collator = CellCollator(TahoeX1Tokenizer(str(folder / "vocab.json"), context_length=14))
        results.append(steps_of(CellBatches(folder, collator, batch_size=8)))
    assert results[0] == results[1]


def test_float_counts_feed_the_same_bins(tmp_path: Path) -> None:
    """Bins do not depend on scale, so counts written as float32 halves give the bins of the uint16 counts."""
    adata = make_cells(50)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.X = adata.X * np.float32(0.5)
    adata.write_h5ad(tmp_path / "b.h5ad")
    results = []
    for name in ("a", "b"):
        folder = run(tmp_path, [source(tmp_path / f"{name}.h5ad", non_integer_counts="keep")], name)
        collator = CellCollator(TahoeX1Tokenizer(str(folder / "vocab.json"), context_length=14))
        results.append(steps_of(CellBatches(folder, collator, batch_size=8)))
    assert results[0] == results[1]


@pytest.fixture
def remote(folder: Path) -> str:
    import fsspec

    files = fsspec.filesystem("memory")
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)
    files.put(str(folder), "/bucket/dataset", recursive=True)
    return "memory://bucket/dataset"


def test_a_remote_dataset_feeds_the_same_through_a_bounded_cache(
    folder: Path, collator: CellCollator, remote: str, tmp_path: Path
) -> None:
    expected = steps_of(CellBatches(folder, collator, batch_size=8, window=40))
    sizes = [shard["bytes"] for shard in manifest(folder)["splits"]["train"]["shards"]]
    batches = CellBatches(
        remote, collator, batch_size=8, window=40, cache_folder=tmp_path / "cache", cache_bytes=3 * max(sizes)
    )
    seen, largest = [], 0
    for batch in batches:
        seen.append(cells_of(batch))
        largest = max(largest, bytes_kept_in(tmp_path / "cache"))
    assert seen == expected
    # There may be one shard above the bound, since a shard in use stays.
    assert 0 < largest <= 5 * max(sizes) < sum(sizes) + 5 * max(sizes)
    again = CellBatches(remote, collator, batch_size=8, window=40, cache_folder=tmp_path / "cache")
    assert steps_of(again) == expected


def test_a_damaged_remote_shard_is_noticed(folder: Path, collator: CellCollator, remote: str, tmp_path: Path) -> None:
    import fsspec

    name = manifest(folder)["splits"]["train"]["shards"][0]["file"]
    files = fsspec.filesystem("memory")
    data = bytearray(files.cat(f"/bucket/dataset/{name}"))
    data[200] ^= 1
    files.pipe(f"/bucket/dataset/{name}", bytes(data))
    with pytest.raises(ValueError, match="does not have the checksum that its manifest names"):
        list(CellBatches(remote, collator, batch_size=8, cache_folder=tmp_path))


def test_a_dropped_connection_is_tried_again_by_the_next_call(folder: Path, tmp_path: Path, remote: str) -> None:
    record = manifest(folder)["splits"]["train"]["shards"][0]
    cache = ShardCache("memory://bucket/nowhere", tmp_path, 1e9, {})
    with pytest.raises(FileNotFoundError):
        cache.fetch(record)
    cache.url = remote
    assert cache.fetch(record).stat().st_size == record["bytes"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_copy_is_fetched_again(folder: Path, tmp_path: Path, remote: str) -> None:
    record = manifest(folder)["splits"]["train"]["shards"][0]
    path = ShardCache(remote, tmp_path, 1e9, {}).fetch(record)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    assert ShardCache(remote, tmp_path, 1e9, {}).fetch(record).read_bytes() == (folder / record["file"]).read_bytes()


def test_another_users_copy_is_read(
    folder: Path, tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its owner may set the time at which a copy was last used."""
    record = manifest(folder)["splits"]["train"]["shards"][0]
    path = ShardCache(remote, tmp_path, 1e9, {}).fetch(record)

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refuse)
    assert ShardCache(remote, tmp_path, 1e9, {}).fetch(record) == path


def test_a_copy_that_another_process_removes_is_fetched_again(folder: Path, tmp_path: Path, remote: str) -> None:
    record = manifest(folder)["splits"]["train"]["shards"][0]
    cache = ShardCache(remote, tmp_path, 1e9, {})
    read = []

    def read_late(path: Path) -> bytes:
        read.append(path)
        if len(read) == 1:
            path.unlink()
        return path.read_bytes()

    assert cache.use(record, read_late) == (folder / record["file"]).read_bytes()
    assert len(read) == 2
    # Like a file that goes away between the listing of the folder and the look at its size.
    (cache.folder / "gone").symlink_to(tmp_path / "nowhere")
    cache.max_bytes = 0
    assert cache.fetch(manifest(folder)["splits"]["train"]["shards"][1]).is_file()


def test_s3_feeds_the_same(folder: Path, collator: CellCollator, tmp_path: Path, s3: str) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="cells")
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "cells", f"run1/{path.relative_to(folder)}")
    options = {"client_kwargs": {"endpoint_url": s3}}
    batches = CellBatches("s3://cells/run1", collator, batch_size=16, cache_folder=tmp_path, storage_options=options)
    assert steps_of(batches) == steps_of(CellBatches(folder, collator, batch_size=16))


# Errors ---------------------------------------------------------------------------------------------


def test_unusable_folders_and_settings_are_refused(folder: Path, collator: CellCollator, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a prepared dataset.*tahoex1 prepare"):
        CellBatches(tmp_path, collator, batch_size=8)
    with pytest.raises(ValueError, match=r"split='test'.*\['train', 'validation'\]"):
        CellBatches(folder, collator, batch_size=8, split="test")
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        CellBatches(folder, collator, batch_size=8, rank=2, world_size=2)
    with pytest.raises(ValueError, match="do not make a batch for each of 4 processes"):
        CellBatches(folder, collator, batch_size=100, world_size=4)
    with pytest.raises(ValueError, match=r"weights=\[1, 2\]"):
        CellBatches(folder, collator, batch_size=8, weights=[1, 2])
    with pytest.raises(ValueError, match="epoch_cells=5 needs weights"):
        CellBatches(folder, collator, batch_size=8, epoch_cells=5)
    with pytest.raises(ValueError, match="batch_size=0"):
        CellBatches(folder, collator, batch_size=0)
    with pytest.raises(ValueError, match="window=0"):
        CellBatches(folder, collator, batch_size=8, window=0)
    with pytest.raises(ValueError, match="share below 1 in 8192"):
        MixedOrder([CellOrder([5], 0, 5), CellOrder([5], 0, 5)], [1, 1e-6], 10, 0)
    other = CellCollator(TahoeX1Tokenizer(str(write_vocab(tmp_path / "other", ["ENSG00000000001"]))))
    with pytest.raises(ValueError, match="another vocabulary"):
        CellBatches(folder, other, batch_size=8)


def test_shards_that_do_not_fit_their_manifest(folder: Path, collator: CellCollator, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / manifest(copy)["splits"]["train"]["shards"][1]["file"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged, or not the shard"):
        list(CellBatches(copy, collator, batch_size=8))
    with pa.ipc.new_file(str(shard), pa.schema([("genes", pa.list_(pa.uint16())), ("counts", pa.list_(pa.uint16()))])):
        pass
    listed = manifest(copy)
    listed["splits"]["train"]["shards"][1] |= {
        "bytes": shard.stat().st_size,
        "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
    }
    (copy / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"has 0 cells, not \d+ as its manifest says"):
        list(CellBatches(copy, collator, batch_size=8))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing"):
        list(CellBatches(copy, collator, batch_size=8))
