"""`tahoex1 evaluate cell-types` on made-up cells, the answers to which are known."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from scipy.sparse import csr_matrix
from typer.testing import CliRunner, Result

from tahoex1_hf.benchmarking import cell_types, cz_benchmarks, resampling
from tahoex1_hf.benchmarking.cell_embeddings import Computing, embed_cells
from tahoex1_hf.benchmarking.cell_types import RANDOM, CellTypes, few_cells, needed
from tahoex1_hf.benchmarking.cells import read_cells
from tahoex1_hf.benchmarking.sources import Source, read_sources
from tahoex1_hf.cli.app import app
from tahoex1_hf.hub.loading import load_model_and_tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo_checkpoint"
TYPES, EACH, GENES = 4, 30, 80


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "REPLICATES", 16)
    monkeypatch.setattr(cz_benchmarks, "TREES", 5)


@pytest.fixture
def scores_in_splits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the scores of clusters and of cz-benchmarks, and the figure."""
    monkeypatch.setattr(CellTypes, "_clusters", lambda self, features: iter(()))
    monkeypatch.setattr(cell_types, "cz_scores", lambda features, labels: iter(()))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Cells of four types, each with some genes of its own, in two batches."""
    random = np.random.default_rng(0)
    types = np.repeat(np.arange(TYPES), EACH)
    rates = np.full((TYPES, GENES), 0.3)
    for kind in range(TYPES):
        rates[kind, kind * 8 : kind * 8 + 8] = 4
    names = [name for name in json.loads((DEMO / "vocab.json").read_text()) if name.startswith("ENSG")][:GENES]
    obs = pd.DataFrame({"cell_type": [f"type {kind}" for kind in types], "batch": np.arange(len(types)) % 2})
    obs["shuffled"] = random.permutation(obs["cell_type"])
    adata = anndata.AnnData(csr_matrix(random.poisson(rates[types]).astype(np.float32)), obs=obs)
    adata.obs_names, adata.var_names = [f"cell{n}" for n in range(len(types))], names
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    adata.write_h5ad(tmp_path / "made_up.h5ad")
    # The types themselves as embeddings, in another order of the cells.
    order = random.permutation(len(types))
    np.savez(
        tmp_path / "types.npz", names=adata.obs_names.to_numpy(str)[order], embeddings=np.eye(TYPES)[types][order]
    )
    return tmp_path / "made_up.h5ad"


def run(cells: Path, output: Path, *more: object, label: str = "cell_type") -> Result:
    arguments = ["evaluate", "cell-types", "--cells", cells, "--label", label, "--output", output, *more]
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_planted_answers(cells: Path, tmp_path: Path) -> None:
    """The types themselves are read without a fault, random numbers by chance, and the untrained twin in between."""
    planted = f"types={tmp_path / 'types.npz'}"
    result = run(cells, tmp_path / "out", "--source", planted, "--source", f"demo={DEMO}", "--batch", "batch")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert (table.lower <= table.upper).all()
    means = table[table.fold.isna()].set_index(["split", "method", "metric"]).value
    for split in ("random folds", "batch left out", "3 cells a class"):
        for reader in ("kNN", "logistic regression"):
            assert means[split, f"types, {reader}", "macro_f1"] == 1
            assert means[split, f"random, {reader}", "macro_f1"] < 0.45
    assert means["random folds", "PCA, kNN", "macro_f1"] > 0.9
    assert means["all cells", "types, distances", "silhouette"] == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["verdicts"]) == set(report["cost"])
    assert report["verdicts"]["random"]["verdict"] == "worse"
    assert report["verdicts"]["types"]["difference"] >= 0
    assert "The labels can be read" in (tmp_path / "out" / "report.md").read_text()
    (entry,) = yaml.safe_load((tmp_path / "out" / "model-index.yaml").read_text())["model-index"]
    (result,) = entry["results"]
    index = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert entry["name"] == "demo"
    for split in ("random folds", "batch left out"):
        assert index[f"macro-F1, kNN, {split}"] == pytest.approx(means[split, "demo, kNN", "macro_f1"], abs=1e-4)
    assert (tmp_path / "out" / "scores.png").stat().st_size > 1000


def test_adapter_is_a_source_and_the_record_of_its_base_counts(cells: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(DEMO)
    adapted = get_peft_model(model, LoraConfig(r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    source = Source("ours", "model", str(tmp_path / "adapter"))
    read = read_cells(cells)
    fresh = embed_cells(source, read, 0, Computing())  # the weights that LoRA begins with change nothing
    base = embed_cells(Source("demo", "model", str(DEMO)), read, 0, Computing())
    assert np.abs(fresh - base).max() < 1e-5
    twin = embed_cells(Source("twin", "untrained", str(tmp_path / "adapter")), read, 0, Computing())
    assert np.abs(twin - fresh).max() > 0.1
    read.adata.uns["reference"] = "Zheng et al. 2017"
    with pytest.raises(ValueError, match="the model was trained on"):
        CellTypes(read, "cell_type").prepare([source])


@pytest.mark.usefixtures("scores_in_splits_alone")
def test_shuffled_labels_are_unfit(cells: Path, tmp_path: Path) -> None:
    result = run(cells, tmp_path / "out", "--source", "PCA=pca", label="shuffled")
    assert result.exit_code == 0, result.output
    assert "**Unfit label**" in (tmp_path / "out" / "report.md").read_text()


def test_fitness_of_a_label() -> None:
    assert needed(0.1) == pytest.approx(0.3)
    assert needed(0.5) == pytest.approx(0.75)  # three times chance would be more than there is


@pytest.mark.usefixtures("scores_in_splits_alone")
def test_sources_that_are_done_are_not_evaluated_again(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(cells, tmp_path / "out", "--source", "PCA=pca").exit_code == 0
    first = (tmp_path / "out" / "scores.csv").read_text()
    forget_cpu_seconds(tmp_path / "out" / "done" / "PCA.npz")
    evaluated: list[str] = []
    original = CellTypes.evaluate
    monkeypatch.setattr(CellTypes, "evaluate", lambda self, s: (evaluated.append(s.name), original(self, s))[1])
    planted = f"types={tmp_path / 'types.npz'}"
    assert run(cells, tmp_path / "out", "--source", "PCA=pca", "--source", planted).exit_code == 0
    assert evaluated == ["types"]
    again = (tmp_path / "out" / "scores.csv").read_text()
    assert set(first.splitlines()) < set(again.splitlines())
    report = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"PCA: \d+ s, peak", report)
    assert re.search(r"types: \d+ s \(\d+ s of CPU time\), peak", report)


def forget_cpu_seconds(path: Path) -> None:
    """Make a file with the scores of a source what the first version wrote, which did not note the CPU time."""
    with np.load(path) as stored:
        arrays = dict(stored)
    head = json.loads(str(arrays["head"]))
    del head["cpu_seconds"]
    np.savez(path, **(arrays | {"head": np.array(json.dumps(head))}))


@pytest.mark.usefixtures("scores_in_splits_alone")
def test_scores_of_other_inputs_are_not_taken_over(cells: Path, tmp_path: Path) -> None:
    planted = f"types={tmp_path / 'types.npz'}"
    assert run(cells, tmp_path / "out", "--source", planted).exit_code == 0
    names = np.load(tmp_path / "types.npz")["names"]
    np.savez(tmp_path / "types.npz", names=names, embeddings=np.random.default_rng(1).random((len(names), 3)))
    result = run(cells, tmp_path / "out", "--source", planted)
    assert result.exit_code == 1
    assert "choose another --output, or discard them with --restart" in result.output
    assert run(cells, tmp_path / "out", "--source", planted, "--restart").exit_code == 0


def test_faults_of_options_are_told(cells: Path, tmp_path: Path) -> None:
    def message(*more: object, label: str = "cell_type") -> str:
        result = run(cells, tmp_path / "out", "--source", "PCA=pca", *more, label=label)
        assert result.exit_code == 1
        return result.output

    assert "--label kind is not a column of obs" in message(label="kind")
    assert "--families is not an option of cell-types" in message("--families", "x.csv")
    np.savez(tmp_path / "few.npz", names=np.array(["cell0"]), embeddings=np.ones((1, 2)))
    assert "has no embedding, or NaN, for 119 cells" in message("--source", f"few={tmp_path / 'few.npz'}")


def test_counts_that_are_none_are_refused(cells: Path) -> None:
    adata = anndata.read_h5ad(cells)
    adata.X = adata.X * 0.5
    adata.write_h5ad(cells)
    with pytest.raises(ValueError, match="X does not hold raw counts"):
        read_cells(cells)


def test_few_cells_of_every_class() -> None:
    labels = np.array([0] * 6 + [1] * 5 + [2] * 3)
    train, test = few_cells(labels, 0)
    assert np.bincount(labels[train]).tolist() == [3, 3]
    assert sorted(np.concatenate([train, test]).tolist()) == list(range(11))


def test_leiden_finds_the_types(cells: Path) -> None:
    pytest.importorskip("igraph")
    task = CellTypes(read_cells(cells), "cell_type")
    pca = next(source for source in read_sources(["PCA=pca"]) if source.kind == "pca")
    found = {(m.reader, m.metric): m.value for m in task.evaluate(pca)}
    assert found["Leiden", "ari"] > 0.9
    assert found["Leiden", "nmi"] > 0.9


@pytest.mark.parametrize(("name", "expected"), [("gut_crohn_scp1884", 0.81), ("pbmc_kang_muscat", 0.90)])
def test_pca_on_real_cells(shared_data: Callable[[str], Path], name: str, expected: float) -> None:
    """The figures of issue 17: other numbers would mean that PCA, kNN or the folds are not what is used elsewhere."""
    task = CellTypes(read_cells(shared_data(f"h5ad/{name}.h5ad")), "cell_type")
    features = embed_cells(Source("PCA", "pca"), task.cells, 0, Computing())
    value = task.read(features, RANDOM, task.folds()[RANDOM], "kNN").value
    assert value == pytest.approx(expected, abs=0.03)
    assert value > needed(task.chance(features))


def test_pca_of_other_cells_is_projected(cells: Path, tmp_path: Path) -> None:
    """The axes are the other cells'; genes that these cells lack, and the cells themselves, do not count."""
    read = read_cells(cells)
    others = read.adata[::2, 5:].copy()
    extra = anndata.AnnData(csr_matrix(np.ones((others.n_obs, 1), dtype=np.float32)), obs=others.obs)
    extra.var_names = ["ENSG09999999999"]
    anndata.concat([others, extra], axis=1, merge="same").write_h5ad(tmp_path / "others.h5ad")
    (source,) = (each for each in read_sources([f"p=projected:{tmp_path / 'others.h5ad'}"]) if each.name == "p")
    assert source.simple
    found = embed_cells(source, read, 0, Computing())
    training = read_cells(tmp_path / "others.h5ad").values[:, :-1].toarray().astype(np.float64)
    axes = np.linalg.svd(training - training.mean(axis=0), full_matrices=False)[2]
    expected = (read.values[:, 5:].toarray() - training.mean(axis=0)) @ axes[0]
    assert np.abs(np.abs(found[:, 0]) - np.abs(expected)).max() < 1e-3
    with pytest.raises(ValueError, match="holds the cells of"):
        embed_cells(Source("p", "projected", str(cells)), read, 0, Computing())
