"""Scores come with the embeddings into every kind of output, whatever the files, the processes and the stops."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer, embed_anndata, embed_files
from tahoex1_hf.cells import encoding
from tahoex1_hf.cli.app import app
from tahoex1_hf.embedding import making
from tahoex1_hf.inference.encoder import CellEncoder

SCORE, DEVIATION = "tahoe_x1_score", "tahoe_x1_score_sd"
Parts = tuple[TahoeX1ForPreTraining, TahoeX1Tokenizer]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, each a shard, of few cells."""
    monkeypatch.setattr(encoding, "CHUNK_CELLS", 16)
    monkeypatch.setattr(making, "_SHARD_SECONDS", 0.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A model with its head, and a tokenizer whose context is shorter than many cells."""
    vocab = write_vocab(tmp_path_factory.mktemp("vocab"))
    config = tiny_config(vocab_size=NUM_GENES + 3, attention_mask_style="observed_or_self")
    return tiny_model(config, TahoeX1ForPreTraining), TahoeX1Tokenizer(str(vocab), context_length=16)


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return make_cells(60)


def scored(adata: anndata.AnnData, parts: Parts, **options: Any) -> pd.DataFrame:
    copy = adata.copy()
    embed_anndata(copy, *parts, progress=False, dtype="float32", **options)
    return copy.obs[[SCORE, DEVIATION]]


def test_every_output_holds_the_scores(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path, expected = write_cells(cells, tmp_path / "cells", "csr"), scored(cells, parts, score=2)
    assert expected.notna().all().all()
    assert (expected.dtypes == np.float32).all()
    options = {"score": 2, "progress": False, "dtype": "float32"}
    embed_files(path, tmp_path / "out.h5ad", *parts, **options)
    copied = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert copied.obs.columns.tolist() == [*cells.obs.columns, SCORE, DEVIATION]
    assert copied.uns["tahoe_x1"]["score_masks"] == 2
    embed_files(path, tmp_path / "out.zarr", *parts, **options)
    embed_files(path, tmp_path / "out.parquet", *parts, draws=2, obs="sample", **options)
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table.columns.tolist() == ["cell", "sample", "tahoe_x1_sd", SCORE, DEVIATION, "X_tahoe_x1"]
    for found in (copied.obs, anndata.read_zarr(tmp_path / "out.zarr").obs, table):
        np.testing.assert_array_equal(found[[SCORE, DEVIATION]].to_numpy(), expected.to_numpy())
    others = make_cells(20, seed=1)
    two = [path, write_cells(others, tmp_path / "others", "csr")]
    embed_files(two, tmp_path / "two.h5ad", *parts, key_added="X_mine", **options)
    joined = anndata.read_h5ad(tmp_path / "two.h5ad").obs
    both = np.concatenate([expected.to_numpy(), scored(others, parts, score=2).to_numpy()])
    np.testing.assert_array_equal(joined[["mine_score", "mine_score_sd"]].to_numpy(), both)


def test_a_resumed_run_gives_the_same_scores(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.h5ad"
    real, calls = CellEncoder.begin, [0]

    def embed(self: CellEncoder, *arguments: Any) -> np.ndarray:
        calls[0] += 1
        if calls[0] > 2:
            raise InterruptedError
        return real(self, *arguments)

    options = {"progress": False, "dtype": "float32"}
    monkeypatch.setattr(CellEncoder, "begin", embed)
    with pytest.raises(InterruptedError):
        embed_files(path, output, *parts, score=2, **options)
    monkeypatch.setattr(CellEncoder, "begin", real)
    for other in (False, 3):
        with pytest.raises(ValueError, match=r"other settings \(score_masks\)"):
            embed_files(path, output, *parts, score=other, **options)
    embed_files(path, output, *parts, score=2, **options)
    found = anndata.read_h5ad(output).obs[[SCORE, DEVIATION]]
    np.testing.assert_array_equal(found.to_numpy(), scored(cells, parts, score=2).to_numpy())


def test_scores_do_not_depend_on_the_order_of_the_cells(cells: anndata.AnnData, parts: Parts) -> None:
    order = np.random.default_rng(0).permutation(60)
    moved = scored(cells[order].copy(), parts, score=True).to_numpy()
    # The samples of long cells and the masks are the same; only float32 sums may be rounded in another order.
    np.testing.assert_allclose(moved, scored(cells, parts, score=4).to_numpy()[order], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_scored_is_said_before_any_work(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    model, tokenizer = parts
    for options, message in (
        ({"score": True, "return_array": True}, "score=True is written into obs"),
        ({"score": -2}, "score=-2: pass True"),
        ({"score": True, "hidden_layer": 1}, "predicted from the output of the last layer"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_anndata(cells.copy(), *parts, progress=False, **options)
    with pytest.raises(ValueError, match="needs the pretraining head, which a TahoeX1Model lacks"):
        embed_files(path, tmp_path / "out.h5ad", model.tahoe, tokenizer, score=True, progress=False)
    with pytest.raises(ValueError, match=r"further numbers \(tahoe_x1_score, tahoe_x1_score_sd\), which 'o.npy'"):
        embed_files(path, tmp_path / "o.npy", *parts, score=True, progress=False)
    assert not list(tmp_path.glob("*out*"))


def test_the_command(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path, folder = write_cells(cells[:20].copy(), tmp_path / "cells", "csr"), tmp_path / "model"
    for part in parts:
        part.save_pretrained(folder)

    def run(*more: str) -> Any:
        arguments = [str(path), str(tmp_path / "out.h5ad"), "--model", str(folder), "--dtype", "float32", *more]
        return CliRunner().invoke(app, ["embed", *arguments])

    refused = run("--score-masks", "3")
    assert refused.exit_code != 0
    assert "goes with --score" in refused.output
    result = run("--score", "--score-masks", "3")
    assert result.exit_code == 0, result.output
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obs[[SCORE, DEVIATION]]
    np.testing.assert_array_equal(found.to_numpy(), scored(cells[:20], parts, score=3).to_numpy())
