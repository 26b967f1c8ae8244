"""`tahoex1 embed` as a user runs it, on files."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN
from typer.testing import CliRunner, Result

from tahoex1_hf.cells.gene_symbols import read_gene_symbols
from tahoex1_hf.cli.app import app
from tahoex1_hf.original.convert import convert_original_folder

CELLS, MODEL = GOLDEN / "a_70m_like" / "adata.h5ad", GOLDEN / "a_70m_like" / "model"
EXPECTED = np.load(GOLDEN / "a_70m_like" / "emb_flash.npz")["cell_embs"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "70m"
    convert_original_folder(MODEL, folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    return tmp_path / "hf_home"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["embed", *map(str, arguments)])


def embed(source: Path, output: Path, model: Path, *more: object) -> Result:
    # Without this the command takes bfloat16 on CPUs that are fast at it.
    result = run(source, output, "--model", model, "--gene-id-column", "ensembl_id", "--dtype", "float32", *more)
    assert result.exit_code == 0, result.output
    return result


def test_h5ad_is_the_input_plus_the_new_slots(tmp_path: Path, converted: Path) -> None:
    source = anndata.read_h5ad(CELLS)
    source.layers["counts"], source.uns["note"] = source.X.copy(), {"by": "someone"}
    source.obsm["X_pca"] = np.ones((50, 2), dtype=np.float32)
    source.write_h5ad(tmp_path / "in.h5ad")
    embed(tmp_path / "in.h5ad", tmp_path / "out.h5ad", converted, "--gene-embeddings")
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert np.abs(result.obsm["X_tahoe_x1"] - EXPECTED).max() < 1e-6
    assert result.varm["X_tahoe_x1"].shape == (600, 64)
    assert result.uns["tahoe_x1"]["matched_genes"] == 600
    assert (result.X != source.X).nnz == 0
    assert (result.layers["counts"] != source.X).nnz == 0
    assert result.uns["note"] == {"by": "someone"}
    assert set(result.obsm) == {"X_pca", "X_tahoe_x1"}
    pd.testing.assert_frame_equal(result.obs, source.obs)
    assert {path.name for path in tmp_path.iterdir()} == {"in.h5ad", "out.h5ad"}


def test_parquet_and_npy_hold_the_same_numbers(tmp_path: Path, converted: Path) -> None:
    embed(CELLS, tmp_path / "out.npy", converted)
    embed(CELLS, tmp_path / "out.parquet", converted, "--key-added", "X_mine")
    assert np.abs(np.load(tmp_path / "out.npy") - EXPECTED).max() < 1e-6
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table["cell"].tolist() == anndata.read_h5ad(CELLS).obs_names.tolist()
    assert table.columns[1] == "X_mine_0"
    np.testing.assert_array_equal(table.iloc[:, 1:].to_numpy(), np.load(tmp_path / "out.npy"))
    metadata = pq.read_metadata(tmp_path / "out.parquet").metadata
    assert json.loads(metadata[b"mine"])["matched_genes"] == 600


def test_in_place_and_again(tmp_path: Path, converted: Path) -> None:
    shutil.copyfile(CELLS, tmp_path / "cells.h5ad")
    for seed in (0, 1):  # the second run replaces the first one's slots
        embed(tmp_path / "cells.h5ad", tmp_path / "cells.h5ad", converted, "--seed", seed, "--gene-embeddings")
    result = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert np.abs(result.obsm["X_tahoe_x1"] - EXPECTED).max() < 1e-6
    assert result.uns["tahoe_x1"]["seed"] == 1


def test_a_folder_in_the_originals_layout_is_loaded_in_place(tmp_path: Path, cache: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "models" / "70m-model")
    embed(CELLS, tmp_path / "out.npy", tmp_path / "models", "--size", "70m")
    (link,) = (cache / "tahoex1_hf").rglob("model.safetensors")
    assert link.is_symlink()
    assert link.resolve() == tmp_path / "models" / "70m-model" / "model.safetensors"
    stamp = link.lstat().st_mtime_ns
    embed(CELLS, tmp_path / "again.npy", tmp_path / "models" / "70m-model")
    assert np.abs(np.load(tmp_path / "out.npy") - EXPECTED).max() < 1e-6
    assert [path.lstat().st_mtime_ns for path in (cache / "tahoex1_hf").rglob("model.safetensors")] == [stamp]


def test_a_hub_repository_in_the_cache(tmp_path: Path, cache: Path, converted: Path, monkeypatch) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    for repo, folder, content in (("new", "", converted), ("today", "70m-model", MODEL)):
        snapshot = hub / f"models--tahoebio--{repo}" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(content, snapshot / folder, dirs_exist_ok=True)
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text(snapshot.name)
    embed(CELLS, tmp_path / "new.h5ad", Path("tahoebio/new"))
    embed(CELLS, tmp_path / "today.npy", Path("tahoebio/today"), "--size", "70m")
    assert np.abs(np.load(tmp_path / "today.npy") - EXPECTED).max() < 1e-6
    result = anndata.read_h5ad(tmp_path / "new.h5ad")
    assert np.abs(result.obsm["X_tahoe_x1"] - EXPECTED).max() < 1e-6
    assert result.uns["tahoe_x1"]["revision"] == "0123456789abcdef0123456789abcdef01234567"
    missing = run(CELLS, tmp_path / "x.npy", "--model", "tahoebio/today", "--size", "7b")
    assert missing.exit_code == 1
    assert "it has the sizes 70m" in missing.output
    unreachable = run(CELLS, tmp_path / "x.npy", "--model", "tahoebio/nowhere")
    assert "could not be reached" in unreachable.output


def test_a_failed_run_leaves_no_file(tmp_path: Path, converted: Path) -> None:
    adata = anndata.read_h5ad(CELLS)
    adata.X.data[-1] = -1
    adata.write_h5ad(tmp_path / "negative.h5ad")
    result = run(
        tmp_path / "negative.h5ad", tmp_path / "out.h5ad", "--model", converted, "--gene-id-column", "ensembl_id"
    )
    assert result.exit_code == 1
    assert "negative" in result.output
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["negative.h5ad"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CELLS, "out.txt", "--model", MODEL), "must end in .h5ad, .parquet or .npy"),
        ((CELLS, "out.npy", "--model", MODEL, "--gene-embeddings"), "need an output that ends in .h5ad"),
        (("nothing.h5ad", "out.npy", "--model", MODEL), "nothing.h5ad does not exist"),
        ((CELLS, "nowhere/out.npy", "--model", MODEL), "folder nowhere does not exist"),
        ((CELLS, "out.npy", "--model", "no-such-folder"), "neither a folder nor a Hub repository"),
        ((CELLS, "out.npy", "--model", MODEL), "gene_id_column"),
        ((CELLS, "out.npy", "--model", MODEL, "--size", "3b"), "has no size '3b'"),
    ],
)
def test_errors(tmp_path: Path, monkeypatch, arguments: tuple, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_gene_symbols_in_either_order(tmp_path: Path) -> None:
    table = tmp_path / "genes.csv"
    table.write_text("symbol,id\nENSA,ENSG00000143420\nENSG00000188290,HES4,x\n")
    assert read_gene_symbols(table) == {"ENSA": "ENSG00000143420", "HES4": "ENSG00000188290"}
    table.write_text("a,b\n")
    with pytest.raises(ValueError, match="no line with a gene symbol"):
        read_gene_symbols(table)
