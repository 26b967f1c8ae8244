"""A cluster gives the bytes that one machine gives, also where each piece is made twice, and whoever began the run."""

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from cells import NUM_GENES, make_cells, write_cells, write_vocab
from embeddings import assert_same_file
from helpers import tiny_config, tiny_model
from ray_cluster import repeating

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.common.cluster import ClusterOptions
from tahoex1_hf.embedding import files, making, on_cluster
from tahoex1_hf.embedding.files import embed_files
from tahoex1_hf.embedding.on_cluster import Arithmetic
from tahoex1_hf.embedding.shards import ShardFolder
from tahoex1_hf.inference.encoder import CellEncoder

Parts = tuple[TahoeX1ForPreTraining, TahoeX1Tokenizer]


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    vocab = write_vocab(tmp_path_factory.mktemp("vocab"), drug_token=True)
    config = tiny_config(vocab_size=NUM_GENES + 4, num_drugs=3, drug_token_id=3)
    tokenizer = TahoeX1Tokenizer(str(vocab), context_length=16, drug_to_id={"<pad>": 0, "s1": 1, "s2": 2})
    return tiny_model(config, TahoeX1ForPreTraining), tokenizer


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "connected", repeating)


def test_the_bytes_of_one_machine(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that one process began goes on, with every option that puts something into the shards."""
    kinds = enumerate(("csr", "csc", "zarr"))
    sources = [write_cells(make_cells(300, seed=i), tmp_path / str(i), kind) for i, kind in kinds]
    options: dict[str, Any] = {"obs": "sample", "draws": 2, "drugs": "sample", "score": 2, "progress": False}

    def embed(name: str, **more: Any) -> None:
        embed_files(
            sources,
            tmp_path / f"{name}.parquet",
            *parts,
            cell_gene_embeddings=tmp_path / f"{name} genes.parquet",
            **options,
            **more,
        )

    embed("one")
    with monkeypatch.context() as patch:
        patch.setattr(making, "_SHARD_SECONDS", 0.0)
        real, calls = CellEncoder.begin, Counter[str]()

        def stopping(*arguments: Any) -> np.ndarray:
            calls["embed"] += 1
            if calls["embed"] > 4:
                raise Stop
            return real(*arguments)

        patch.setattr(CellEncoder, "begin", stopping)
        with pytest.raises(Stop):
            embed("two")
    assert len(ShardFolder(str(tmp_path / "two.parquet.shards")).finished()) == 2
    embed("two", cluster=ClusterOptions())
    assert_same_file(tmp_path / "two.parquet", tmp_path / "one.parquet")
    assert_same_file(tmp_path / "two genes.parquet", tmp_path / "one genes.parquet")
    assert not (tmp_path / "two.parquet.shards").exists()


def test_means_count_each_cell_once_whatever_lost_workers_left(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_cells(make_cells(600), tmp_path / "cells", "csr")
    options: dict[str, Any] = {"gene_embeddings": True, "progress": False}
    embed_files(source, tmp_path / "one.h5ad", *parts, **options)
    monkeypatch.setattr(on_cluster, "_PIECE_CHUNKS", 1)
    write = on_cluster.write_piece

    def full(row: dict[str, Any], job: Any) -> dict[str, Any]:
        if row["start"] == 0:
            raise OSError(28, "No space left on device", "out.h5ad.shards")
        return write(row, job)

    monkeypatch.setattr(on_cluster, "write_piece", full)
    with pytest.raises(OSError, match=r"No space left on device: 'out.h5ad.shards'"):
        embed_files(source, tmp_path / "two.h5ad", *parts, cluster=ClusterOptions(), **options)
    monkeypatch.setattr(on_cluster, "write_piece", write)
    shards = ShardFolder(str(tmp_path / "two.h5ad.shards"))
    assert shards.finished() == [(1, 2), (2, 3)]
    # What a worker leaves that was taken for lost: the shard and the sums of two pieces that others have made.
    (_, _, sums), *_ = shards.read_sums()
    shards.write(1, 3, shards.read(1, 2))
    shards.write_sums("000000000001-000000000003", [(1, 3)], sums)
    embed_files(source, tmp_path / "two.h5ad", *parts, cluster=ClusterOptions(), **options)
    one, two = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("one", "two"))
    np.testing.assert_array_equal(two.obsm["X_tahoe_x1"], one.obsm["X_tahoe_x1"])
    np.testing.assert_array_equal(two.varm["X_tahoe_x1"], one.varm["X_tahoe_x1"])
    assert two.uns["tahoe_x1"]["device"] == "cpu"


def test_another_file_under_the_same_name_is_refused(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that sees another file system."""
    source = write_cells(make_cells(300), tmp_path / "cells", "csr")
    begin = files._Run.begin

    def changing(*arguments: Any) -> Any:
        todo = begin(*arguments)
        write_cells(make_cells(300, seed=1), tmp_path / "cells", "csr")
        return todo

    monkeypatch.setattr(files._Run, "begin", changing)
    with pytest.raises(ValueError, match=r"cells.h5ad on this worker is not the file that the run began with"):
        embed_files(source, tmp_path / "out.npy", *parts, cluster=ClusterOptions(), progress=False)


def test_a_value_that_is_not_finite_names_its_cell(tmp_path: Path, parts: Parts) -> None:
    """The worker with the model, which has no file open, opens it for the message."""
    source = write_cells(make_cells(300), tmp_path / "cells", "csr")
    broken = copy.deepcopy(parts[0])
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"NaN or infinite values for cell 'cell0-0' \(number 0, from 0\)"):
        embed_files(source, tmp_path / "out.npy", broken, parts[1], cluster=ClusterOptions(), progress=False)


def test_a_store_holds_all_that_a_run_needs_to_go_on(
    tmp_path: Path, parts: Parts, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    source = write_cells(make_cells(600), tmp_path / "cells", "csc")
    embed_files(source, tmp_path / "one.parquet", *parts, progress=False)
    store = fsspec.filesystem("s3")
    store.mkdir("on-cluster")
    monkeypatch.setattr(on_cluster, "_PIECE_CHUNKS", 1)
    read = on_cluster.read_piece

    def stopping(row: dict[str, Any], job: Any) -> dict[str, Any]:
        if row["start"] == 0:
            raise Stop
        return read(row, job)

    monkeypatch.setattr(on_cluster, "read_piece", stopping)
    with pytest.raises(Stop):
        embed_files(source, "s3://on-cluster/out.parquet", *parts, cluster=ClusterOptions(), progress=False)
    assert len(store.glob("on-cluster/out.parquet.shards/chunks-*")) == 2
    monkeypatch.setattr(on_cluster, "read_piece", read)
    embed_files(source, "s3://on-cluster/out.parquet", *parts, cluster=ClusterOptions(), progress=False)
    store.invalidate_cache()
    assert store.ls("on-cluster", detail=False) == ["on-cluster/out.parquet"]
    assert store.cat_file("on-cluster/out.parquet") == (tmp_path / "one.parquet").read_bytes()
    assert pd.read_parquet(tmp_path / "one.parquet").shape == (600, 2)


def test_workers_compute_as_the_first_process_does(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a thread that Ray begins later, on a worker whose torch was set otherwise."""
    source = write_cells(make_cells(40), tmp_path / "cells", "csr")
    before = Arithmetic.of_this_process()
    other = Arithmetic(before.threads + 1, "medium", not before.onednn)
    seen: list[Arithmetic] = []
    make = on_cluster.make_shards

    def noting(*arguments: Any, **options: Any) -> Any:
        seen.append(Arithmetic.of_this_process())
        return make(*arguments, **options)

    class Elsewhere(on_cluster.PieceEmbedder):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            before.use()
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(super().__call__, row).result()

    monkeypatch.setattr(on_cluster, "make_shards", noting)
    monkeypatch.setattr(on_cluster, "PieceEmbedder", Elsewhere)
    try:
        other.use()
        embed_files(source, tmp_path / "out.npy", *parts, cluster=ClusterOptions(), progress=False)
    finally:
        before.use()
    assert seen == [other, other]  # the stand-in does the only piece twice
