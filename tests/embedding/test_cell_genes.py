"""Every cell's gene embeddings, as a table that pandas and datasets read."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from cells import GENES, NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_files
from tahoex1_hf.cells import encoding
from tahoex1_hf.embedding import cell_genes, making
from tahoex1_hf.embedding.cell_genes import CellGenes
from tahoex1_hf.inference.encoder import CellEncoder

Parts = tuple[TahoeX1Model, TahoeX1Tokenizer]
KEY = "X_tahoe_x1"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, each a shard, of few cells, and row groups of a few cells."""
    monkeypatch.setattr(encoding, "CHUNK_CELLS", 8)
    monkeypatch.setattr(making, "_SHARD_SECONDS", 0.0)
    monkeypatch.setattr(cell_genes, "_GROUP_VALUES", 50 * 32)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A model, and a tokenizer whose context is shorter than many cells."""
    config = tiny_config(vocab_size=NUM_GENES + 4)
    vocab = write_vocab(tmp_path / "vocab", drug_token=True)
    return tiny_model(config, TahoeX1Model), TahoeX1Tokenizer(str(vocab), context_length=16)


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Cells, one of which expresses nothing."""
    adata = make_cells(30)
    counts = adata.X.toarray()
    counts[4] = 0
    adata.X = type(adata.X)(counts)
    return adata


def embed(sources: Any, output: Path, parts: Parts, **options: Any) -> pd.DataFrame:
    genes = output.parent / "genes.parquet"
    genes.unlink(missing_ok=True)
    embed_files(sources, output, *parts, cell_gene_embeddings=genes, progress=False, dtype="float32", **options)
    assert not [path for path in output.parent.iterdir() if ".shards" in path.name or ".partial" in path.name]
    return pd.read_parquet(genes)


def expected(adata: anndata.AnnData, parts: Parts) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield cell, gene and embedding, cell by cell through the model itself."""
    model, tokenizer = parts
    encoded = tokenizer.encode_counts(adata.X, tokenizer.match_genes(adata.var_names))
    for row, name in enumerate(adata.obs_names):
        batch = encoded.padded([row], pad_token_id=tokenizer.pad_token_id, pad_value=tokenizer.pad_value)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state[0]
        for token, vector in zip(batch["input_ids"][0].tolist()[1:], hidden[1:].numpy(), strict=True):
            yield name, tokenizer.convert_ids_to_tokens(token), vector


def test_the_table_is_that_of_the_model(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    table = embed(write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.h5ad", parts)
    reference = list(expected(cells, parts))
    assert table.columns.tolist() == ["cell", "gene", KEY]
    assert list(zip(table["cell"], table["gene"], strict=True)) == [row[:2] for row in reference]
    assert set(table["gene"]) <= set(GENES)
    np.testing.assert_allclose(np.stack(table[KEY]), np.stack([row[2] for row in reference]), atol=1e-5, rtol=0)
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm[KEY].shape == (30, 32)
    file = pq.ParquetFile(tmp_path / "genes.parquet")
    assert str(file.schema_arrow.field(KEY).type).startswith("fixed_size_list")
    assert file.num_row_groups > 3
    assert json.loads(file.metadata.metadata[b"tahoe_x1"])["matched_genes"] == 60


def test_embeddings_that_are_not_finite_stop_the_run(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    torch.nn.init.constant_(parts[0].norm.weight, 3e38)
    path = write_cells(cells, tmp_path / "cells", "csr")
    with pytest.raises(ValueError, match=r"genes\.parquet: the gene embeddings of cell '\w+-\d+' have NaN"):
        embed(path, tmp_path / "out.npy", parts)
    with pytest.raises(ValueError, match=r"gives NaN or infinite values for cell '\w+-\d+' \(number \d+, from 0\)"):
        embed_files(path, tmp_path / "out.npy", *parts, progress=False, dtype="float32")
    assert not (tmp_path / "out.npy").exists()


def test_datasets_reads_it(tmp_path: Path, cells: anndata.AnnData, parts: Parts, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    table = embed(write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.npy", parts, key_added="X_mine")
    found = datasets.Dataset.from_parquet(str(tmp_path / "genes.parquet"), cache_dir=str(tmp_path / "cache"))
    assert found.features["X_mine"].length == 32
    np.testing.assert_array_equal(found.with_format("numpy")[:]["X_mine"], np.stack(table["X_mine"]))


class Stop(Exception):
    pass


@pytest.mark.parametrize("lost", [None, "genes", "chunks"])
def test_a_stopped_run_goes_on(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts, monkeypatch: pytest.MonkeyPatch, lost: str | None
) -> None:
    path, real = write_cells(cells, tmp_path / "cells", "csr"), CellEncoder.pooled_batches
    whole = embed(path, tmp_path / "whole.h5ad", parts, gene_embeddings=True)
    calls: list[int] = []

    def counted(self: CellEncoder, chunk: Any, *more: Any) -> Iterator[Any]:
        calls.append(int(chunk.cell_numbers[0]))
        for number, batch in enumerate(real(self, chunk, *more)):
            if calls[-1] == 16 and number == 1 and len(calls) < 4:
                raise Stop  # in the middle of a chunk
            yield batch

    monkeypatch.setattr(CellEncoder, "pooled_batches", counted)
    options = {"gene_embeddings": True, "batch_tokens": 40}
    with pytest.raises(Stop):
        embed(path, tmp_path / "out.h5ad", parts, **options)
    assert not (tmp_path / "genes.parquet").exists()
    shards = tmp_path / "out.h5ad.shards"
    assert [len(list(shards.glob(f"{kind}-*"))) for kind in ("chunks", "genes")] == [2, 2]
    if lost is not None:
        next(iter(sorted(shards.glob(f"{lost}-*")))).unlink()
    with pytest.raises(ValueError, match=r"other settings \(cell_gene_embeddings, names\)"):
        embed_files(path, tmp_path / "out.h5ad", *parts, progress=False, dtype="float32", **options)
    calls[:] = [-1] * 4
    again = embed(path, tmp_path / "out.h5ad", parts, **options)
    assert calls[4:] == ([16, 24] if lost is None else [0, 8, 16, 24])
    pd.testing.assert_frame_equal(again.drop(columns=KEY), whole.drop(columns=KEY))
    # Other batches than the whole run's, so that last digits may differ.
    np.testing.assert_allclose(np.stack(again[KEY]), np.stack(whole[KEY]), atol=1e-5, rtol=0)


def test_several_sources(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    paths = [
        write_cells(each, tmp_path / f"{i}", kind)
        for i, (each, kind) in enumerate([(cells, "csr"), (make_cells(11, seed=3), "csc")])
    ]
    table = embed(paths, tmp_path / "out.parquet", parts)
    assert table.columns.tolist() == ["cell", "source", "gene", KEY]
    reference = [row for each in (cells, make_cells(11, seed=3)) for row in expected(each, parts)]
    assert list(zip(table["cell"], table["gene"], strict=True)) == [row[:2] for row in reference]
    first = table["cell"].isin(cells.obs_names)
    assert set(table["source"][first]) == {paths[0].name}
    assert set(table["source"][~first]) == {paths[1].name}
    table = embed(paths, tmp_path / "whole.parquet", parts, full_paths=True)
    assert set(table["source"]) == {str(path) for path in paths}


def test_in_an_object_store(cells: anndata.AnnData, parts: Parts, tmp_path: Path) -> None:
    import fsspec

    path, folder = write_cells(cells, tmp_path / "cells", "csr"), "memory://cellgenes"
    whole = embed(path, tmp_path / "out.npy", parts)
    options: dict[str, Any] = {"progress": False, "dtype": "float32"}
    embed_files(path, f"{folder}/out.npy", *parts, cell_gene_embeddings=f"{folder}/genes.parquet", **options)
    memory = fsspec.filesystem("memory")
    with memory.open("/cellgenes/genes.parquet") as file:
        pd.testing.assert_frame_equal(pd.read_parquet(file), whole)
    assert sorted(memory.ls("/cellgenes", detail=False)) == ["/cellgenes/genes.parquet", "/cellgenes/out.npy"]


def test_no_more_than_a_batch_is_in_memory(tmp_path: Path, cells: anndata.AnnData, parts: Parts, monkeypatch) -> None:
    """Tables of a chunk are let go of as soon as they are written."""
    monkeypatch.setattr(encoding, "CHUNK_CELLS", 4096)
    alive: list[weakref.ref[Any]] = []
    most, real = [0], CellGenes._rows

    def watched(self: CellGenes, *arguments: Any) -> Any:
        table = real(self, *arguments)
        alive.append(weakref.ref(table))
        most[0] = max(most[0], sum(each() is not None for each in alive))
        return table

    monkeypatch.setattr(CellGenes, "_rows", watched)
    embed(write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.npy", parts)
    assert len(alive) == 30
    assert most[0] <= 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("genes.csv", "must end in .parquet"),
        ("out.parquet", "name another file"),
        ("./sub/../out.parquet", "name another file"),
        ("no/genes.parquet", "no does not"),
    ],
)
def test_what_cannot_be_written_is_said_first(tmp_path: Path, parts: Parts, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        embed_files("nowhere.h5ad", tmp_path / "out.parquet", *parts, cell_gene_embeddings=tmp_path / name)
