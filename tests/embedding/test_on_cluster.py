"""A cluster gives the bytes that one machine gives, whatever is lost on the way, and whoever began the run."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model
from ray_cluster import small_cluster

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.common.cluster import ClusterOptions
from tahoex1_hf.embedding import making, on_cluster
from tahoex1_hf.embedding.files import embed_files
from tahoex1_hf.embedding.shards import ShardFolder
from tahoex1_hf.inference.encoder import CellEncoder


class Stop(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Any:
    with small_cluster():
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[TahoeX1ForPreTraining, TahoeX1Tokenizer]:
    vocab = write_vocab(tmp_path_factory.mktemp("vocab"), drug_token=True)
    config = tiny_config(vocab_size=NUM_GENES + 4, num_drugs=3, drug_token_id=3)
    tokenizer = TahoeX1Tokenizer(str(vocab), context_length=16, drug_to_id={"<pad>": 0, "s1": 1, "s2": 2})
    return tiny_model(config, TahoeX1ForPreTraining), tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("cells")
    return [
        write_cells(make_cells(300, seed=i), place / str(i), kind) for i, kind in enumerate(("csr", "csc", "zarr"))
    ]


def dying_once(work: Any, marker: Path, before: bool) -> Any:
    """Return a function that does the work, and whose process is killed the first time, before or after it."""
    place = str(marker)

    def dying(row: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        first = not os.path.exists(place)
        if first:
            open(place, "w").close()
        if first and before:
            os.kill(os.getpid(), 9)
        made: dict[str, Any] = work(row, **arguments)
        if first:
            os.kill(os.getpid(), 9)
        return made

    return dying


def test_the_bytes_of_one_machine(tmp_path: Path, parts, sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that one process began goes on, a worker with the model and a writer that has committed are lost."""
    options: dict[str, Any] = {"obs": "sample", "draws": 2, "drugs": "sample", "score": 2, "progress": False}
    embed_files(sources, tmp_path / "one.parquet", *parts, **options)
    with monkeypatch.context() as patch:
        patch.setattr(making, "_SHARD_SECONDS", 0.0)
        real, calls = CellEncoder.embed, Counter[str]()

        def stopping(*arguments: Any) -> np.ndarray:
            calls["embed"] += 1
            if calls["embed"] > 4:
                raise Stop
            return real(*arguments)

        patch.setattr(CellEncoder, "embed", stopping)
        with pytest.raises(Stop):
            embed_files(sources, tmp_path / "two.parquet", *parts, **options)
    assert len(ShardFolder(str(tmp_path / "two.parquet.shards")).finished()) == 2
    died = tmp_path / "model died"

    class Dying(on_cluster.PieceEmbedder):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            if not os.path.exists(str(died)):
                open(str(died), "w").close()
                os.kill(os.getpid(), 9)
            return super().__call__(row)

    monkeypatch.setattr(on_cluster, "PieceEmbedder", Dying)
    monkeypatch.setattr(on_cluster, "write_piece", dying_once(on_cluster.write_piece, tmp_path / "writer died", False))
    embed_files(sources, tmp_path / "two.parquet", *parts, cluster=ClusterOptions("local", 1, 1), **options)
    assert died.exists()
    assert (tmp_path / "writer died").exists()
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert not (tmp_path / "two.parquet.shards").exists()


def test_gene_embeddings_and_an_error_of_a_worker(tmp_path: Path, parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that is made twice counts once in the means; an error is that of the worker, and the run resumes."""
    source = write_cells(make_cells(600), tmp_path / "cells", "csr")
    options: dict[str, Any] = {"gene_embeddings": True, "progress": False}
    embed_files(source, tmp_path / "one.h5ad", *parts, **options)
    monkeypatch.setattr(on_cluster, "_PIECE_CHUNKS", 1)
    write = on_cluster.write_piece

    def refusing(row: dict[str, Any], job: Any) -> dict[str, Any]:
        if row["start"] == 2:
            raise OSError(28, "No space left on device", "out.h5ad.shards")
        return write(row, job)

    monkeypatch.setattr(on_cluster, "write_piece", refusing)
    with pytest.raises(OSError, match=r"No space left on device: 'out.h5ad.shards'"):
        embed_files(source, tmp_path / "two.h5ad", *parts, cluster=ClusterOptions("local", 1, 1), **options)
    monkeypatch.setattr(on_cluster, "write_piece", write)
    shards = ShardFolder(str(tmp_path / "two.h5ad.shards"))
    assert (2, 3) not in shards.finished()
    # What a worker leaves that was taken for lost: the shard and the sums of two pieces that others make.
    first = shards.read(*shards.finished()[0])
    sums = next(shards.read_sums())[2]
    shards.write(0, 2, first._replace(embeddings=np.zeros_like(first.embeddings)))
    shards.write_sums("000000000000-000000000002", [(0, 2)], sums)
    embed_files(source, tmp_path / "two.h5ad", *parts, cluster=ClusterOptions("local", 1, 1), **options)
    one, two = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("one", "two"))
    np.testing.assert_array_equal(two.obsm["X_tahoe_x1"], one.obsm["X_tahoe_x1"])
    np.testing.assert_array_equal(two.varm["X_tahoe_x1"], one.varm["X_tahoe_x1"])
    assert two.uns["tahoe_x1"]["device"] == "cpu"
