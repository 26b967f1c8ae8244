"""`tahoex1 evaluate contextual-essentiality` and `tissue` on made-up cell lines, the answers to which are known."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import r2_score, roc_auc_score
from typer.testing import CliRunner

from tahoex1_hf.benchmarking import contextual_essentiality, resampling
from tahoex1_hf.benchmarking.cell_embeddings import Computing, loaded
from tahoex1_hf.benchmarking.cell_lines import read_dependencies, read_lines
from tahoex1_hf.benchmarking.contextual_essentiality import ContextualEssentiality, gene_auroc, pooled_auroc, r2
from tahoex1_hf.benchmarking.line_genes import pair_embeddings
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.cli.app import app
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.inference.gene_embeddings import embed_genes

DEMO = Path(__file__).parents[2] / "examples" / "demo_checkpoint"
LINES, GENES = 36, 24


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "REPLICATES", 8)
    monkeypatch.setattr(contextual_essentiality, "TREES", 6)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Lines of three tissues: half of the genes depend on the tissue, and are essential where it expresses them."""
    random = np.random.default_rng(0)
    ids = [name for name in json.loads((DEMO / "vocab.json").read_text()) if name.startswith("ENSG")][:GENES]
    tissue = np.arange(LINES) % 3
    wanted = (np.arange(GENES)[None] % 3 == tissue[:, None]) | (np.arange(GENES)[None] % 2 == 0)
    expressed = np.where(np.arange(GENES)[None] % 3 == tissue[:, None], 20.0, 1.0)
    names = [f"LINE{n}" for n in range(LINES)]
    counts = pd.DataFrame(random.poisson(expressed).T, columns=names)
    counts.insert(0, "Name", [f"{name}.1" for name in ids])
    counts.insert(1, "Description", [f"SYMBOL{n}" for n in range(GENES)])
    counts.to_csv(tmp_path / "made_up.gct", sep="\t", index=False)
    models = pd.DataFrame({"ModelID": [f"ACH-{n}" for n in range(LINES)], "CCLEName": names})
    models["OncotreeLineage"] = np.array(["Lung", "Skin", "Bone"])[tissue]
    models.to_csv(tmp_path / "Model.csv", index=False)
    chances = np.clip(np.where(wanted, 0.8, 0.2) + random.normal(0, 0.1, wanted.shape), 0, 1)
    columns = [f"SYMBOL{n} ({n})" for n in range(GENES)]
    table = pd.DataFrame(chances, columns=columns, index=pd.Index(models["ModelID"], name=None))
    table.iloc[0, 0] = np.nan
    table.to_csv(tmp_path / "CRISPRGeneDependency.csv")
    np.savez(tmp_path / "tissue.npz", names=np.array(names), embeddings=np.eye(3)[tissue])
    return tmp_path


def run(files: Path, task: str, *more: object) -> tuple[pd.Series, dict[str, object]]:
    command = ["evaluate", task, "--cells", files / "made_up.gct", "--lines", files / "Model.csv", *more]
    command += ["--source", f"tissue={files / 'tissue.npz'}", "--output", files / task]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    table = pd.read_csv(files / task / "scores.csv")
    report = json.loads((files / task / "report.json").read_text())
    return table[table.fold.isna()].set_index(["split", "method", "metric"]).value.sort_index(), report


def test_planted_dependencies(files: Path) -> None:
    """The tissue tells the lines apart and the mean of the training lines does not."""
    means, report = run(files, "contextual-essentiality", "--dependencies", files / "CRISPRGeneDependency.csv")
    of = {name: means["mean of the strata", f"{name}, random forest"] for name in report["cost"]}  # type: ignore[attr-defined]
    assert of["mean of the training lines"]["gene_auroc"] == pytest.approx(0.5)
    assert of["tissue"]["auroc"] > of["mean of the training lines"]["auroc"] + 0.02
    assert of["tissue"]["gene_auroc"] > 0.7
    assert of["expression"]["gene_auroc"] > 0.7
    assert abs(of["random"]["gene_auroc"] - 0.5) < 0.1
    assert of["tissue"]["r2"] > of["random"]["r2"]
    assert report["verdicts"]["random"]["verdict"] == "worse"  # type: ignore[index]
    assert "36 cell lines, 24 genes" in report["notes"][-2]  # type: ignore[index]


def test_planted_tissues(files: Path) -> None:
    means, report = run(files, "tissue")
    assert means["random folds", "tissue, kNN", "macro_f1"] == 1
    # 11 lines of the own tissue among 20 neighbours, a third by chance.
    assert means["all cells", "tissue, 20 neighbours", "purity over chance"] == pytest.approx(3 * 11 / 20)
    assert means["all cells", "random, 20 neighbours", "purity over chance"] == pytest.approx(1, abs=0.3)
    assert report["task"] == "tissue"


def test_metrics_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.random((30, 4)), random.integers(0, 6, (30, 4)) / 6
    truth[3, 0] = truth[7:12, 2] = np.nan
    truth[:, 3] = 0.1  # no line depends on it
    known = np.isfinite(truth)
    assert pooled_auroc(truth, predicted) == pytest.approx(roc_auc_score(truth[known] > 0.5, predicted[known]))
    each = [roc_auc_score(truth[known[:, n], n] > 0.5, predicted[known[:, n], n]) for n in range(3)]
    assert gene_auroc(truth, predicted) == pytest.approx(np.mean(each))
    assert r2(truth, predicted) == pytest.approx(r2_score(truth[known], predicted[known]))


def test_strata_and_folds(files: Path) -> None:
    lines = read_lines(files / "made_up.gct", files / "Model.csv")
    dependencies, lines = read_dependencies(files / "CRISPRGeneDependency.csv", lines)
    task = ContextualEssentiality(lines, dependencies)
    tests = [test for _, test in task.folds()]
    assert sorted(np.concatenate(tests).tolist()) == list(range(LINES))
    for train, test in task.folds():
        assert not set(train) & set(test)
    for name, columns in task.strata().items():
        low = int(name.split("-")[0]) / 100
        assert ((dependencies.means[columns] >= low) & (dependencies.means[columns] <= low + 0.1)).all()


def test_embeddings_of_pairs_are_those_of_the_cells(files: Path) -> None:
    """Against the encoder's own tokens; a gene that a line lacks has its embedding without cells."""
    lines = read_lines(files / "made_up.gct", files / "Model.csv")
    genes = lines.genes[[7, 3, 20]]
    source = Source("demo", "model", str(DEMO))
    with pair_embeddings(source, lines, genes, 0, Computing()) as pairs_of:
        found = pairs_of(np.array([5, 2]), np.array([0, 2]))
    model, tokenizer = loaded(source, 0)
    encoder = CellEncoder(model, tokenizer, dtype="float32")
    tokens = np.array([tokenizer.gene_token(name) for name in genes.tolist()])
    without = embed_genes(encoder, tokens, ("TE",), None).kinds["TE"]
    for row, line in enumerate((5, 2)):
        cell = tokenizer(lines.adata[[line]], return_tensors="pt")
        states = model(**cell).last_hidden_state[0].detach().numpy()
        for column, gene in enumerate((0, 2)):
            place = np.flatnonzero(cell["input_ids"][0].numpy() == tokens[gene])
            expected = states[place[0]] if len(place) else without[gene]
            assert found[row, column] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
