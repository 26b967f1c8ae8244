"""`tahoex1 evaluate hallmark` on made-up sets of genes, the answers to which are known."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from tahoex1_hf.benchmarking import heads, resampling
from tahoex1_hf.benchmarking.cell_embeddings import Computing
from tahoex1_hf.benchmarking.cells import read_cells
from tahoex1_hf.benchmarking.gene_embeddings import gene_embeddings
from tahoex1_hf.benchmarking.gene_sets import read_gene_sets
from tahoex1_hf.benchmarking.hallmark import LOGISTIC, Hallmark, partition
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.cli.app import app

DEMO = Path(__file__).parents[2] / "examples" / "demo_checkpoint"
GENES, SETS = 240, 6


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "REPLICATES", 20)
    monkeypatch.setattr(heads, "_MOST_EPOCHS", 60)
    monkeypatch.setitem(heads.GRIDS, "small", [heads.Shape(64, 1, 0.1)])


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Sets of every sixth gene, cells that express one set each, and the sets themselves as embeddings."""
    random = np.random.default_rng(0)
    names = sorted(name for name in json.loads((DEMO / "vocab.json").read_text()) if name.startswith("ENSG"))[:GENES]
    member = np.eye(SETS)[random.permutation(np.arange(GENES) % SETS)]
    lines = ["\t".join([f"set{n}", "made up", *np.array(names)[member[:, n] > 0]]) for n in range(SETS)]
    (tmp_path / "sets.gmt").write_text("\n".join(lines))
    cells = anndata.AnnData(csr_matrix(random.poisson(0.2 + 2 * member.T[np.arange(60) % SETS]).astype(np.float32)))
    cells.var_names = names
    cells.write_h5ad(tmp_path / "cells.h5ad")
    noisy = member + random.normal(0, 0.2, member.shape)  # without noise the loss of the MLP falls for ever
    np.savez(tmp_path / "sets.npz", names=np.array(names), embeddings=noisy)
    return tmp_path


def test_planted_answers(inputs: Path, tmp_path: Path) -> None:
    command = ["evaluate", "hallmark", "--cells", inputs / "cells.h5ad", "--gene-sets", inputs / "sets.gmt"]
    command += ["--source", f"sets={inputs / 'sets.npz'}", "--source", f"demo={DEMO}", "--seeds", "2"]
    result = CliRunner().invoke(app, [*map(str, command), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    means = table[table.fold.isna()].set_index(["method", "metric"]).value
    for reader in ("logistic regression", "MLP"):
        for metric in ("macro_auprc", "auprc"):
            assert means[f"sets, {reader}", metric] > 0.95
            assert means[f"random, {reader}", metric] < 0.35  # a sixth of the genes is in each set
        for kind in ("GE", "TE", "EA"):
            assert 0 <= means[f"demo {kind}, {reader}", "macro_auprc"] <= 1
    assert means["PCA, logistic regression", "macro_auprc"] > 0.95
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdicts"]["random"]["verdict"] == "worse"
    assert report["settings"]["seeds"] == 2
    assert "240 genes of 6 sets, 48 of them tested with each seed" in report["notes"][0]
    assert "macro AUPRC" in (tmp_path / "out" / "report.md").read_text()


def test_parts_are_the_originals() -> None:
    """`np.random.seed(1)` and `np.random.permutation(20)`, cut behind 14, 15 and 16 of them."""
    parts = partition(20, 1)
    assert [len(part) for part in parts] == [14, 1, 1, 4]
    assert np.concatenate(parts).tolist() == [3, 16, 6, 10, 2, 14, 4, 17, 7, 1, 13, 0, 19, 18, 9, 15, 8, 12, 11, 5]


def test_faults_are_told(inputs: Path, tmp_path: Path) -> None:
    def message(*more: object) -> str:
        arguments = ["--cells", inputs / "cells.h5ad", "--source", "PCA=pca", "--output", tmp_path / "out", *more]
        result = CliRunner().invoke(app, ["evaluate", "hallmark", *map(str, arguments)])
        assert result.exit_code == 1
        return result.output

    assert "hallmark needs --gene-sets" in message()
    assert "--label is not an option of hallmark" in message("--label", "cell_type")
    np.savez(inputs / "few.npz", names=np.load(inputs / "sets.npz")["names"][:30], embeddings=np.ones((30, 2)))
    few = ("--gene-sets", inputs / "sets.gmt", "--source", f"few={inputs / 'few.npz'}")
    assert "30 genes are left, too few for four parts (210 unknown to few)" in " ".join(message(*few).split())


@pytest.mark.slow
def test_baselines_on_real_genes(shared_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of issue 17, by logistic regression; docs/evaluation.md has those of the MLP, and of more cells."""
    monkeypatch.setattr(resampling, "REPLICATES", 2)
    sets = [read_cells(shared_data("h5ad/lung_lines_sc_mixology.h5ad"))]
    task = Hallmark(sets, read_gene_sets(shared_data("labels/h.all.v7.0.symbols.gmt")))
    for kind, expected, bound in (("random", 0.039, 0.005), ("pca", 0.126, 0.02)):
        features = gene_embeddings(Source(kind, kind), sets, task.genes.names, 0, Computing())[""]
        found = {m.metric: m.value for m in task.read("", features, LOGISTIC)}
        assert found["macro_auprc"] == pytest.approx(expected, abs=bound), kind
