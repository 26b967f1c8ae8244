"""`tahoex1 evaluate essentiality` on made-up genes, the answers to which are known."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from tahoex1_hf.benchmarking import essentiality, resampling
from tahoex1_hf.benchmarking.cell_embeddings import Computing
from tahoex1_hf.benchmarking.cells import read_cells
from tahoex1_hf.benchmarking.essentiality import FAMILY, LOGISTIC, Essentiality
from tahoex1_hf.benchmarking.gene_embeddings import expression, gene_embeddings, loadings
from tahoex1_hf.benchmarking.gene_labels import read_gene_labels
from tahoex1_hf.cli.app import app

DEMO = Path(__file__).parents[2] / "examples" / "demo_checkpoint"
GENES, FAMILIES = 200, 40


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "REPLICATES", 20)
    monkeypatch.setattr(essentiality, "TREES", 10)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Genes of 40 families, essential by family, and cells that express the essential ones more."""
    random = np.random.default_rng(0)
    names = [name for name in json.loads((DEMO / "vocab.json").read_text()) if name.startswith("ENSG")][:GENES]
    family = np.arange(GENES) % FAMILIES
    labels = (family % 2).astype(int)
    table = pd.DataFrame({"ensembl_gene_id": names, "label": labels})
    table.to_parquet(tmp_path / "labels.parquet")
    pd.DataFrame({"ensembl_gene_id": names, "cluster_id": [f"f{n}" for n in family]}).to_csv(tmp_path / "families.csv")
    for number in range(2):
        counts = random.poisson(np.where(labels == 1, 2.0, 0.5), (40, GENES)).astype(np.float32)
        adata = anndata.AnnData(csr_matrix(counts))
        adata.var_names = names
        adata.write_h5ad(tmp_path / f"cells{number}.h5ad")
    np.savez(tmp_path / "family.npz", names=np.array(names), embeddings=np.eye(FAMILIES)[family])
    return {name: tmp_path / file for name, file in (("labels", "labels.parquet"), ("families", "families.csv"))}


def test_planted_answers(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Expression tells the genes apart; their family does so only while genes of it are trained on."""
    options = [part for name, path in inputs.items() for part in (f"--{name}", str(path))]
    cells = [part for number in range(2) for part in ("--cells", str(tmp_path / f"cells{number}.h5ad"))]
    sources = ["--source", f"family={tmp_path / 'family.npz'}", "--source", f"demo={DEMO}"]
    command = ["evaluate", "essentiality", *sources, *cells, *options, "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    means = table[table.fold.isna()].set_index(["split", "method", "metric"]).value
    for split in ("family folds", "random folds"):
        assert means[split, "expression, random forest", "auroc"] > 0.99
        assert abs(means[split, "random, random forest", "auroc"] - 0.5) < 0.2
    assert means["random folds", "family, random forest", "auroc"] > 0.95
    assert means["family folds", "family, random forest", "auroc"] < 0.6
    for kind in ("GE", "TE", "EA"):
        assert 0 <= means["family folds", f"demo {kind}, logistic regression", "auprc"] <= 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdicts"]["family"]["verdict"] == "worse"
    assert report["verdicts"]["family"]["against"].startswith(("expression", "PCA"))
    assert "200 genes, 100 of them essential" in report["notes"][0]


def test_no_family_is_on_both_sides(inputs: dict[str, Path], tmp_path: Path) -> None:
    genes = read_gene_labels([inputs["labels"]], inputs["families"])
    task = Essentiality([read_cells(tmp_path / "cells0.h5ad")], genes)
    folds = task.folds[FAMILY]
    assert np.array_equal(np.sort(np.concatenate([fold.test for fold in folds])), np.arange(GENES))
    for fold in folds:
        train = np.concatenate([fold.train, fold.validation])
        assert not set(genes.families[train]) & set(genes.families[fold.test])


def test_sources_are_compared_on_the_genes_that_all_know(inputs: dict[str, Path], tmp_path: Path) -> None:
    genes = read_gene_labels([inputs["labels"]], inputs["families"])
    task = Essentiality([read_cells(tmp_path / "cells0.h5ad")], genes)
    assert sum(len(fold.test) for fold in task.folds[FAMILY]) == GENES
    np.savez(tmp_path / "some.npz", names=genes.names[:50], embeddings=np.ones((50, 2)))
    task.prepare([essentiality.Source("some", "file", str(tmp_path / "some.npz"))])
    assert np.array_equal(task.genes.names, genes.names[:50])
    assert sum(len(fold.test) for fold in task.folds[FAMILY]) == 50
    assert "150 unknown to some" in task.notes[0]


def test_expression_is_mean_and_fraction(tmp_path: Path, inputs: dict[str, Path]) -> None:
    cells = read_cells(tmp_path / "cells0.h5ad")
    counts = cells.adata.X.toarray()
    logs = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    found = expression(cells, np.array([cells.genes[3], "ENSG09999999999"]))
    assert found[0] == pytest.approx([logs[:, 3].mean(), (counts[:, 3] > 0).mean()], rel=1e-5)
    assert found[1].tolist() == [0, 0]


def test_loadings_are_those_of_all_cells_together(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Against a dense singular value decomposition; a component's sign is free."""
    sets = [read_cells(tmp_path / f"cells{number}.h5ad") for number in range(2)]
    dense = np.concatenate([each.values.toarray() for each in sets]).astype(np.float64)
    axes = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)[2]
    found = loadings(sets, sets[0].genes, None, 0)
    assert np.abs(np.abs(found[:, 0]) - np.abs(axes[0])).max() < 1e-4


@pytest.mark.slow
def test_baselines_on_real_genes(shared_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of issue 17, by logistic regression; docs/evaluation.md has those of the forest, and of PCA."""
    monkeypatch.setattr(resampling, "REPLICATES", 2)
    names = ("heart_san_1000_native_ensembl", "gut_crohn_scp1884", "lung_lines_sc_mixology", "pbmc_sorted_zheng")
    sets = [read_cells(shared_data(f"h5ad/{name}.h5ad")) for name in names]
    labels = shared_data("labels/egbench_depmap26q1_gene_universe.parquet")
    families = shared_data("labels/egbench_depmap_family5fold_splits.parquet")
    task = Essentiality(sets, read_gene_labels([labels], families))
    assert len(task.genes.names) == 13_062
    folds = task.folds[FAMILY]
    for kind, expected, bound in (("random", 0.49, 0.03), ("expression", 0.855, 0.015)):
        features = gene_embeddings(essentiality.Source(kind, kind), sets, task.genes.names, 0, Computing())[""]
        found = {m.metric: m.value for m in task.read("", features, FAMILY, folds, LOGISTIC)}
        assert found["auroc"] == pytest.approx(expected, abs=bound), kind
