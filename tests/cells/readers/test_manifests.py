"""Manifests that name files outside their dataset, are damaged, or whose shards are others."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cells import make_cells, write_cells
from preparing import run, source

from tahoex1_hf.cells.readers.manifests import check_local, parse_manifest
from tahoex1_hf.cells.readers.prepared import PreparedDataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return run(tmp_path, [source(write_cells(make_cells(20), tmp_path / "cells", "csr"))])


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"][0]


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "data/../../x", "C:\\x", "s3://x/y", "", "."])
def test_files_outside_the_folder(dataset: Path, name: str) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = name
    with pytest.raises(ValueError, match="outside its folder"):
        parse_manifest(json.dumps(manifest))


def test_links_that_lead_out_of_the_folder(dataset: Path, tmp_path: Path) -> None:
    record = record_of(dataset)
    shard = dataset / record["file"]
    shard.rename(tmp_path / "elsewhere.arrow")
    shard.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(ValueError, match=rf"{shard.name} is a link that leads out of the dataset's folder"):
        check_local(dataset, record)


def test_links_of_the_hubs_cache(dataset: Path, tmp_path: Path) -> None:
    record = record_of(dataset)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "data").mkdir(parents=True)
    (dataset / record["file"]).rename(blobs / "1234")
    (snapshot / record["file"]).symlink_to(blobs / "1234")
    assert check_local(snapshot, record) == snapshot / record["file"]


def test_a_shard_of_the_same_size_with_another_content(dataset: Path) -> None:
    record = record_of(dataset)
    shard = dataset / record["file"]
    assert check_local(dataset, record) == shard
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(0, 0))
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged, or not the shard"):
        PreparedDataset(dataset, "train").shard(0)


@pytest.mark.parametrize(
    "change", [{"splits": []}, {"splits": {"train": {}}}, {"splits": {"train": {"shards": [{}]}}}]
)
def test_damaged_manifests(dataset: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        PreparedDataset(dataset, "train")
