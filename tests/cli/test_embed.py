"""`tahoex1 embed` as a user runs it, on files."""

import json
import logging
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN
from scipy.sparse import csr_matrix
from typer.testing import CliRunner, Result

from tahoex1_hf.cells.gene_symbols import read_gene_symbols
from tahoex1_hf.cli import running
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


def test_columns_of_obs_a_wide_table_and_every_cells_genes(tmp_path: Path, converted: Path) -> None:
    source = anndata.read_h5ad(CELLS)
    column = source.obs.columns[0]
    more = "--obs", column, "--wide", "--cell-gene-embeddings", tmp_path / "genes.parquet"
    result = embed(CELLS, tmp_path / "out.parquet", converted, *more)
    assert "genes.parquet" in result.output
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table.columns[:3].tolist() == ["cell", column, "X_tahoe_x1_0"]
    assert table[column].tolist() == source.obs[column].tolist()
    assert pd.read_parquet(tmp_path / "genes.parquet")["cell"].nunique() == 50


def test_hidden_layer_and_kinds_of_gene_embeddings(tmp_path: Path, converted: Path) -> None:
    more = "--hidden-layer", "-2", "--gene-embeddings", "--gene-kinds", "GE,te"
    embed(CELLS, tmp_path / "out.h5ad", converted, *more)
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert set(result.varm) == {"X_tahoe_x1", "X_tahoe_x1_GE", "X_tahoe_x1_TE"}
    assert result.uns["tahoe_x1"]["hidden_layer"] == 2
    assert len(result.uns["tahoe_x1"]["genes_not_expressed"]) > 0


def test_parquet_and_npy_hold_the_same_numbers(tmp_path: Path, converted: Path) -> None:
    embed(CELLS, tmp_path / "out.npy", converted)
    embed(CELLS, tmp_path / "out.parquet", converted, "--key-added", "X_mine")
    assert np.abs(np.load(tmp_path / "out.npy") - EXPECTED).max() < 1e-6
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table["cell"].tolist() == anndata.read_h5ad(CELLS).obs_names.tolist()
    assert table.columns.tolist() == ["cell", "X_mine"]
    np.testing.assert_array_equal(np.stack(table["X_mine"]), np.load(tmp_path / "out.npy"))
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
        ((CELLS, "out.txt", "--model", MODEL), "must end in .h5ad, .zarr, .parquet or .npy"),
        ((CELLS, "out.npy", "--model", MODEL, "--gene-embeddings"), "need an output that ends in .h5ad or .zarr"),
        (("nothing.h5ad", "out.npy", "--model", MODEL), "nothing.h5ad does not exist"),
        ((CELLS, "nowhere/out.npy", "--model", MODEL), "folder nowhere does not exist"),
        ((CELLS, "out.npy", "--model", "no-such-folder"), "neither a folder nor a Hub repository"),
        ((CELLS, "out.npy", "--model", MODEL, "--gene-id-column", "no"), "gene_id_column='no' (--gene-id-column)"),
        ((CELLS, "out.h5ad", "--model", MODEL, "--gene-kinds", "GE,X"), "some of GE, TE, EA"),
        (
            (CELLS, "out.npy", "--model", MODEL, "--gene-id-column", "ensembl_id", "--hidden-layer", "9"),
            "pass 0, what enters the first layer, to 3",
        ),
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


def test_what_a_biologists_file_needs_no_options_for(tmp_path: Path, converted: Path) -> None:
    """Symbols as names, ids in a column, counts in raw, antibodies beside them, a third of the counts unknown."""
    adata = anndata.read_h5ad(CELLS)
    counts, ids = adata.X.toarray(), adata.var["ensembl_id"].to_numpy(dtype=object)
    expected = run(CELLS, tmp_path / "all.npy", "--model", converted, "--dtype", "float32")
    assert expected.exit_code == 0
    more = np.stack([counts.sum(1) // 2, counts.sum(1)], axis=1)
    var = pd.DataFrame(
        {
            "gene_ids": [*ids, "ENSG09999999999", ids[0]],
            "feature_types": ["Gene Expression"] * 601 + ["Antibody Capture"],
        },
        index=[*(f"SYMBOL{i}" for i in range(600)), "LOST", "ADT"],
    )
    raw = anndata.AnnData(csr_matrix(np.hstack([counts, more]).astype(np.float32)), obs=adata.obs, var=var)
    new = raw[:, :100].copy()
    new.X, new.raw = np.log1p(new.X.toarray()), raw
    new.write_h5ad(tmp_path / "in.h5ad")
    done = run(tmp_path / "in.h5ad", tmp_path / "out.h5ad", "--model", converted, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(result.obsm["X_tahoe_x1"], np.load(tmp_path / "all.npy"))
    facts = result.uns["tahoe_x1"]
    assert facts["counts_from"] == "raw/X"
    assert facts["genes_from"] == "Ensembl ids in 'gene_ids'"
    assert facts["unknown_counts_share"] == pytest.approx(1 / 3, abs=0.01)
    assert facts["unknown_genes_with_most_counts"] == "LOST"
    assert facts["matched_genes"] == 600
    refused = run(tmp_path / "in.h5ad", tmp_path / "g.h5ad", "--model", converted, "--gene-embeddings")
    assert refused.exit_code == 1
    assert "the counts are those of raw, whose genes are not those of var" in refused.output


def test_mouse_cells_by_a_table_of_orthologues(tmp_path: Path, converted: Path) -> None:
    adata = anndata.read_h5ad(CELLS)
    human = adata.var["ensembl_id"].to_numpy(dtype=object)
    adata.var = pd.DataFrame(index=[gene.replace("ENSG", "ENSMUSG") for gene in human])
    adata.write_h5ad(tmp_path / "mouse.h5ad")
    (tmp_path / "table.csv").write_text("".join(f"{m},{h}\n" for m, h in zip(adata.var_names, human, strict=True)))
    refused = run(tmp_path / "mouse.h5ad", tmp_path / "out.npy", "--model", converted)
    assert refused.exit_code == 1
    assert "--species mouse" in refused.output
    both = ["--species", "mouse", "--orthologs", tmp_path / "table.csv", "--model", converted, "--dtype", "float32"]
    done = run(tmp_path / "mouse.h5ad", tmp_path / "out.npy", *both)
    assert done.exit_code == 0, done.output
    assert np.abs(np.load(tmp_path / "out.npy") - EXPECTED).max() < 1e-6


def test_a_slot_with_a_slash_is_refused(tmp_path: Path, converted: Path) -> None:
    refused = run(CELLS, tmp_path / "out.h5ad", "--model", converted, "--key-added", "a/b")
    assert refused.exit_code == 1
    assert "key_added='a/b' (--key-added)" in refused.output


def test_workers_without_a_cluster_are_refused(tmp_path: Path) -> None:
    result = run(CELLS, tmp_path / "out.npy", "--model", MODEL, "--max-workers", 2)
    assert result.exit_code == 1
    assert "--min-workers and --max-workers go with --ray ADDRESS" in result.output


def test_lines_of_progress_are_json_by_themselves() -> None:
    formatter = running._Lines("%(levelname)s: %(message)s")
    line = logging.makeLogRecord({"name": "tahoex1_hf.progress", "levelname": "INFO", "msg": '{"pieces": 3}'})
    assert json.loads(formatter.format(line)) == {"pieces": 3}
    line.name = "tahoex1_hf.embedding.files"
    assert formatter.format(line) == 'INFO: {"pieces": 3}'
