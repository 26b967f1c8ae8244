"""A layer of expected expression depends on the cells alone, is written whole, and comes with a test of its worth."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import GENES, NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer, impute_file
from tahoex1_hf.cells import encoding
from tahoex1_hf.cli.app import app
from tahoex1_hf.imputation import running
from tahoex1_hf.imputation.targets import TargetPredictor
from tahoex1_hf.perturbation import cells as perturbation_cells

LAYER = "tahoe_x1_expected"
Parts = tuple[TahoeX1ForPreTraining, TahoeX1Tokenizer]
QUIET: dict[str, Any] = {"progress": False, "dtype": "float32"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (encoding, perturbation_cells, running):
        monkeypatch.setattr(module, "CHUNK_CELLS", 8)
    monkeypatch.setattr(running, "_PART_CHUNKS", 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A model with its head, and a tokenizer whose context is shorter than many cells."""
    vocab = write_vocab(tmp_path_factory.mktemp("vocab"))
    config = tiny_config(vocab_size=NUM_GENES + 3, attention_mask_style="observed_or_self")
    return tiny_model(config, TahoeX1ForPreTraining), TahoeX1Tokenizer(str(vocab), context_length=15)


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    adata = make_cells(50)
    adata.var["name"] = [f"gene {number}" for number in range(NUM_GENES)]
    return adata


def imputed(path: Path, parts: Parts, **options: Any) -> anndata.AnnData:
    impute_file(path, path.with_name("out.h5ad"), *parts, **{**QUIET, **options})
    assert not list(path.parent.glob("*.parts*"))
    return anndata.read_h5ad(path.with_name("out.h5ad"))


def test_own_genes_have_a_value_where_the_counts_have(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    out = imputed(path, parts)
    layer = out.layers[LAYER]
    assert layer.dtype == np.float32
    assert (layer.indptr == cells.X.indptr).all()
    assert (layer.indices == cells.X.indices).all()
    assert np.isfinite(layer.data).all()
    assert (out.X != cells.X).nnz == 0
    assert out.uns[LAYER]["unit"] == "bins"
    order = np.random.default_rng(0).permutation(50)
    genes = np.random.default_rng(1).permutation(NUM_GENES)
    (tmp_path / "moved").mkdir()
    moved = imputed(write_cells(cells[order, genes].copy(), tmp_path / "moved" / "cells", "csc"), parts)
    np.testing.assert_allclose(moved.layers[LAYER].toarray(), layer.toarray()[order][:, genes], rtol=1e-4, atol=1e-5)


def test_a_gene_never_sees_itself(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    """Its prediction stays the same when its count changes, so long as the others keep their bins and their half."""
    few = cells[:12].copy()
    changed = few.copy()
    dense = few.X.toarray()
    top = dense.argmax(1)
    dense[np.arange(12), top] += 100  # the largest count: all bins stay
    changed.X = csr_matrix(dense)
    paths = [tmp_path / name / "cells" for name in ("one", "two")]
    found = []
    for adata, path in zip((few, changed), paths, strict=True):
        path.parent.mkdir()
        asked = imputed(write_cells(adata, path, "csr"), parts, genes=GENES[:20], max_length=80).layers[LAYER]
        found.append(asked.toarray())
    mine = top < 20
    assert mine.any()
    np.testing.assert_allclose(found[0][mine, top[mine]], found[1][mine, top[mine]], atol=1e-5)


def test_asked_genes_have_a_value_in_every_cell(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    genes = [GENES[7], "gene 3", *GENES[20:30]]  # more than half the context: two groups
    layer = imputed(path, parts, genes=genes).layers[LAYER].toarray()
    columns = [3, 7, *range(20, 30)]
    assert np.isfinite(layer).all()
    assert (layer[:, columns] != 0).all()
    assert not np.delete(layer, columns, axis=1).any()
    counts = imputed(path, parts, genes=genes, unit="counts").layers[LAYER].toarray()[:, columns]
    largest = cells.X.max(1).toarray()
    assert ((counts >= 0) & (counts <= largest)).all()


def test_a_stopped_run_is_resumed(
    tmp_path: Path, cells: anndata.AnnData, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_cells(cells, tmp_path / "cells", "csr")
    expected = imputed(path, parts).layers[LAYER].toarray()
    (tmp_path / "out.h5ad").unlink()
    real, calls = TargetPredictor.own_genes, [0]

    def own_genes(self: TargetPredictor, batch: Any) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 4:
            raise InterruptedError
        return real(self, batch)

    monkeypatch.setattr(TargetPredictor, "own_genes", own_genes)
    with pytest.raises(InterruptedError):
        impute_file(path, tmp_path / "out.h5ad", *parts, **QUIET)
    assert not (tmp_path / "out.h5ad").exists()
    with pytest.raises(ValueError, match=r"other settings \(unit\)"):
        impute_file(path, tmp_path / "out.h5ad", *parts, unit="counts", **QUIET)
    np.testing.assert_array_equal(imputed(path, parts).layers[LAYER].toarray(), expected)
    assert calls[0] == 4 + 4  # seven parts of eight cells: three were there


def test_errors_are_told_before_any_work(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path, output = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "out.h5ad"
    model, tokenizer = parts
    for options, message in (
        ({"genes": ["NONE1"]}, r"\['NONE1'\] are not among the genes"),
        ({"unit": "tpm"}, "unit='tpm'"),
        ({"layer_added": "a/b"}, "take a slash for a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            impute_file(path, output, *parts, **{**QUIET, **options})
    with pytest.raises(ValueError, match="needs the pretraining head"):
        impute_file(path, output, model.tahoe, tokenizer, **QUIET)
    with pytest.raises(FileNotFoundError, match=r"none.h5ad does not exist"):
        impute_file(tmp_path / "none.h5ad", output, *parts, **QUIET)
    with pytest.raises(ValueError, match=r"The output must be an .h5ad file"):
        impute_file(path, tmp_path / "out.csv", *parts, **QUIET)
    stored = cells.copy()
    stored.layers["counts"], stored.X = stored.X.copy(), csr_matrix(stored.shape, dtype=np.float32)
    stored.write_h5ad(tmp_path / "layered.h5ad")
    with pytest.raises(ValueError, match="holds the counts"):
        impute_file(tmp_path / "layered.h5ad", output, *parts, layer="counts", layer_added="counts", **QUIET)
    assert not list(tmp_path.glob("out*"))  # and no folder of a run that did nothing


def test_the_command_tells_the_verdict(tmp_path: Path, cells: anndata.AnnData, parts: Parts) -> None:
    path, folder = write_cells(cells, tmp_path / "cells", "csr"), tmp_path / "model"
    for part in parts:
        part.save_pretrained(folder)
    arguments = [str(path), "--output", str(tmp_path / "out.h5ad"), "--model", str(folder), "--dtype", "float32"]
    result = CliRunner().invoke(app, ["impute", *arguments, "--genes", "gene 1,gene 2", "--unit", "counts"])
    assert result.exit_code == 0, result.output
    assert "The model loses to the mean of the gene at how much" in result.output  # its weights are random
    written = tmp_path / "out.h5ad.imputation"
    assert {each.name for each in written.iterdir()} == {"report.json", "report.md", "scores.csv", "scores.png"}
    facts = json.loads((written / "report.json").read_text())
    assert {score["method"] for score in facts["scores"]} == {
        "Tahoe-x1",
        "mean of the gene",
        "kNN smoothing (15 cells)",
    }
    assert "counts of the cell" in (written / "report.md").read_text()
    refused = CliRunner().invoke(app, ["impute", *arguments, "--genes", "all"])
    assert refused.exit_code == 1
    assert "genes=all (--genes)" in refused.output
