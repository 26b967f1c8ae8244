"""Test the classification of genes: tables, splits, weights, predictions over cells, baselines, whole runs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from alone import Alone
from cells import GENES, as_mouse
from finetuning_runs import digest, write_base
from helpers import largest_difference
from scipy.sparse import csr_matrix
from two_processes import check_that_a_killed_run_resumes, in_processes

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.finetuning.config import GeneClassificationConfig, parse_finetune_config
from tahoex1_hf.finetuning.genes import baselines
from tahoex1_hf.finetuning.genes.baselines import expression_features
from tahoex1_hf.finetuning.genes.objective import GeneObjective
from tahoex1_hf.finetuning.genes.predicting import cell_chunks, predict_gene_classes, predict_genes
from tahoex1_hf.finetuning.genes.table import read_gene_table
from tahoex1_hf.finetuning.genes.task import GeneTask
from tahoex1_hf.finetuning.objectives import HELD_OUT
from tahoex1_hf.finetuning.running import finetune
from tahoex1_hf.hub.adapters import load_adapter, read_record

HIGH = np.arange(len(GENES)) % 3 == 0  # genes that are strong where they are expressed: runs are to learn this
UNEXPRESSED = [7, 30]  # HIGH is true of the second


def gene_cells(num_cells: int = 60) -> anndata.AnnData:
    random = np.random.default_rng(0)
    counts = np.where(HIGH, random.integers(20, 60, (num_cells, 60)), random.integers(1, 8, (num_cells, 60)))
    counts = counts * (random.random(counts.shape) < random.uniform(0.2, 0.9, 60))
    counts[:, UNEXPRESSED] = 0
    counts[np.arange(num_cells), 8] += 1  # no cell is empty
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(num_cells)])
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


def gene_frame() -> pd.DataFrame:
    names = np.where(HIGH, "high", "low").astype(object)
    names[5] = None
    return pd.DataFrame(
        {
            "ensembl_gene_id": [f"{gene}.4" for gene in GENES],
            "level": names,
            "family": [f"f{i // 3}" for i in range(60)],
        }
    )


def write_alike_base(folder: Path) -> None:
    """Write a base whose genes are almost alike without context, so that only their expression tells them apart."""
    model = TahoeX1ForPreTraining.from_pretrained(write_base(folder))
    table = model.tahoe.embeddings.gene_encoder.embedding.weight
    with torch.no_grad():
        table.copy_(table[:1].mul(0) + torch.linspace(-1, 1, 32) + 0.02 * table)
    model.save_pretrained(folder)


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "TREES", 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genes")
    write_alike_base(folder / "base")
    gene_cells().write_h5ad(folder / "cells.h5ad")
    unknown = pd.DataFrame({"ensembl_gene_id": ["ENSG99999999999"], "level": ["low"], "family": ["f0"]})
    pd.concat([gene_frame(), unknown]).to_csv(folder / "genes.csv", index=False)
    return folder


def make_config(place: Path, output: Path, **changes: Any) -> GeneClassificationConfig:
    usual: dict[str, Any] = {
        "task": "gene_classification",
        "model": str(place / "base"),
        "data": str(place / "cells.h5ad"),
        "genes": str(place / "genes.csv"),
        "label": "level",
        "output_dir": str(output),
        "lora_rank": 4,
        "epochs": 6,
        "batch_size": 10,
        "learning_rate": 0.01,
        "precision": "no",
        "report": False,
    }
    return parse_finetune_config({**usual, **changes})  # type: ignore[return-value]


def chunks_of(run: GeneTask) -> Any:
    return cell_chunks(run.cells, run.cells.numbers)


def make_run(place: Path, output: Path, **changes: Any) -> GeneTask:
    output.mkdir(exist_ok=True)
    return GeneTask(make_config(place, output, **changes), Alone())  # type: ignore[arg-type]


# Genes --------------------------------------------------------------------------------------------


def test_genes_that_are_left_out_are_counted(place: Path, tmp_path: Path) -> None:
    genes = make_run(place, tmp_path).genes
    assert genes.left_out == {
        "without a label": 1,
        "not in the vocabulary": 1,
        "repeated": 0,
        "expressed in no cell": 2,
        "of a rare class": 0,
    }
    assert len(genes) == 57
    assert genes.classes == ["high", "low"]
    counts = gene_cells().X.toarray()
    for name, token, label, cells in zip(genes.names, genes.tokens, genes.labels, genes.num_cells, strict=True):
        number = GENES.index(name.partition(".")[0])
        assert token == 3 + 59 - number  # the vocabulary lists the genes in reverse order
        assert genes.classes[label] == ("high" if HIGH[number] else "low")
        assert cells == (counts[:, number] > 0).sum()


@pytest.mark.parametrize("folds", [1, 5])
def test_no_gene_and_no_family_is_in_two_parts(folds: int, place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path, group="family", folds=folds)
    assert run.genes.groups is not None
    splits = [fold.split for fold in run.targets()]
    assert len(splits) == folds
    for split in splits:
        parts = [run.genes.groups[rows] for rows in split.parts().values()]
        assert all(len(part) for part in parts)
        for i in range(3):
            assert not set(parts[i]) & set(parts[(i + 1) % 3])
    if folds > 1:
        assert sorted(np.concatenate([split.test for split in splits])) == list(range(57))


def test_a_column_gives_the_split(place: Path, tmp_path: Path) -> None:
    table = gene_frame().assign(part=["train", "validation", "test"] * 20, fold=["train", "train", "test"] * 20)
    table.to_parquet(tmp_path / "genes.parquet")
    run = make_run(place, tmp_path, genes=str(tmp_path / "genes.parquet"), split="part")
    split = run.targets()[0].split
    for number, rows in enumerate(split.parts().values()):
        assert {GENES.index(name.partition(".")[0]) % 3 for name in run.genes.names[rows]} == {number}
    with pytest.raises(ValueError, match="leakage"):
        make_run(place, tmp_path, genes=str(tmp_path / "genes.parquet"), split="part", group="family").targets()
    split = make_run(place, tmp_path, genes=str(tmp_path / "genes.parquet"), split="fold").targets()[0].split
    assert len(split.validation)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": "levels"}, "label=levels is not a column of .*; there are ensembl_gene_id, level, family"),
        ({"group": "clan"}, "group=clan is not a column"),
        ({"genes_id_column": "gene"}, "genes_id_column=gene is not a column"),
        ({"genes_id_column": "level"}, "genes_id_column=level: .* look like gene symbols"),
        ({"label": "same"}, "has the one value 'x'"),
        ({"label": "number"}, "holds numbers with .* set task=regression"),
        ({"label": "rare"}, "1 classes have fewer than 2 genes: once"),
        ({"genes": "twice.csv"}, "ENSG00000000003.9 occurs twice, with another level: keep one row"),
        ({"genes": "none.csv"}, "no gene with a label is expressed in"),
    ],
)
def test_bad_tables(changes: dict[str, str], said: str, place: Path, tmp_path: Path) -> None:
    table = gene_frame().assign(
        same="x", number=np.linspace(0, 1, 60), rare=["once", *["often"] * 30, *["most"] * 29], level="low"
    )
    table.loc[::2, "level"] = "high"
    table.to_csv(tmp_path / "table.csv", index=False)
    other = pd.DataFrame({"ensembl_gene_id": [f"{GENES[3]}.9"], "level": ["high"], "family": ["f1"]})
    pd.concat([table, other]).to_csv(tmp_path / "twice.csv", index=False)
    table.iloc[UNEXPRESSED].to_csv(tmp_path / "none.csv", index=False)
    changes = {"genes": "table.csv", **changes}
    changes["genes"] = str(tmp_path / changes["genes"])
    with pytest.raises(ValueError, match=said):
        make_run(place, tmp_path, **changes)


def test_settings_that_do_not_go_together(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="genes: task=gene_classification needs it"):
        make_config(place, tmp_path, genes=None)
    with pytest.raises(ValueError, match=r"genes=.* is for task=gene_classification"):
        make_config(place, tmp_path, task="classification")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv does not exist"):
        make_run(place, tmp_path, genes="nowhere.csv")


# Learning and predicting ---------------------------------------------------------------------------


def test_the_head_starts_as_a_probe(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    split = run.targets()[0].split
    weights, bias = run.fitted_head(split)
    model = run.base()
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(weights))
        model.classifier.bias.copy_(torch.from_numpy(bias))
    logits = run.mean_logits(model, run.genes.tokens)
    assert largest_difference(logits, run.contextual @ weights.T + bias) < 1e-3
    assert (logits[split.test].argmax(1) == run.genes.labels[split.test]).mean() > 0.8
    run.genes.labels[split.test] = 1 - run.genes.labels[split.test]
    assert np.array_equal(run.fitted_head(split)[0], weights)  # the test genes are not looked at


def test_labels_and_weights_of_a_batch(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    split = run.targets()[0].split
    objective = GeneObjective(run.config, run.cells, run.genes, split)
    train, held_out = objective.batch(np.arange(60), 0), objective.batch(np.arange(60), HELD_OUT)
    for batch, rows in ((train, split.train), (held_out, split.validation)):
        labels = batch["labels"]
        known = labels != -100
        assert set(labels[known].tolist()) == set(run.genes.tokens[rows].tolist())
        assert torch.equal(labels[known], batch["input_ids"][known])
        assert (known.sum(1) > 0).any()
    tokens = train["labels"][train["labels"] != -100]
    totals = {
        int(t): float(objective.token_weights[t]) * int((tokens == t).sum()) for t in run.genes.tokens[split.train]
    }
    of_class = [
        {round(totals[int(run.genes.tokens[row])], 4) for row in split.train if run.genes.labels[row] == k}
        for k in (0, 1)
    ]
    assert [len(values) for values in of_class] == [1, 1]  # all genes of a class have the same total weight
    highs = (run.genes.labels[split.train] == 0).sum()
    lows = len(split.train) - highs
    assert of_class[0].pop() * highs == pytest.approx(of_class[1].pop() * lows, rel=1e-3)  # and so have the classes
    assert objective.token_weights[tokens].mean().item() == pytest.approx(1, rel=1e-5)


def test_the_loss_by_hand_and_in_parts(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    split = run.targets()[0].split
    objective = GeneObjective(run.config, run.cells, run.genes, split)
    batch = objective.batch(np.arange(8), 0)
    labels = batch.pop("labels")
    model = run.base()
    outputs = model(**batch)
    expected, number = 0.0, 0
    chances = torch.log_softmax(outputs.logits, dim=-1)
    label_of = dict(zip(run.genes.tokens.tolist(), run.genes.labels.tolist(), strict=True))
    for cell, place_in_cell in (labels != -100).nonzero().tolist():
        gene = int(labels[cell, place_in_cell])
        chance = chances[cell, place_in_cell, label_of[gene]]
        expected, number = expected - float(objective.token_weights[gene]) * chance.item(), number + 1
    assert objective(outputs, labels).item() == pytest.approx(expected / number, rel=1e-5)
    halves = 0.0
    for rows in (slice(0, 3), slice(3, 8)):
        part = model(**{name: tensor[rows] for name, tensor in batch.items()})
        halves += objective(part, labels[rows], torch.tensor(number)).item()
    assert halves == pytest.approx(expected / number, rel=1e-5)


def test_another_sample_in_every_epoch(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path, context_length=10)
    split = run.targets()[0].split
    objective = GeneObjective(run.config, run.cells, run.genes, split)
    first, again, second = (objective.batch(np.arange(4), epoch)["input_ids"] for epoch in (0, 0, 1))
    assert first.shape == (4, 10)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_prediction_is_the_mean_over_the_cells_that_express_the_gene(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    model = run.base()
    sums: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        for row in range(60):
            batch = run.cells.batch(np.array([row]))
            for token, logits in zip(batch["input_ids"][0, 1:], model(**batch).logits[0, 1:], strict=True):
                sums.setdefault(int(token), []).append(logits)
    tokens = run.genes.tokens
    expected = torch.stack([torch.stack(sums[int(token)]).mean(0) for token in tokens])
    found = run.mean_logits(model, tokens)
    assert largest_difference(found, expected) < 1e-5
    assert [len(sums[int(token)]) for token in tokens] == run.genes.num_cells.tolist()
    one = predict_genes(model, model.classifier, run.tokenizer, chunks_of(run), tokens[5:6])
    assert largest_difference(one, expected[5:6]) < 1e-5
    never = np.array([3 + 59 - 7])
    assert np.isnan(predict_genes(model, model.classifier, run.tokenizer, chunks_of(run), never)).all()


# Baselines --------------------------------------------------------------------------------------


def test_expression_features_by_hand(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    counts = gene_cells().X.toarray().astype(np.float64)
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    numbers = [GENES.index(name.partition(".")[0]) for name in run.genes.names]
    found = expression_features(run.cells, run.genes.tokens)
    assert np.allclose(found[:, 0], values.mean(0)[numbers], rtol=1e-5)
    assert np.allclose(found[:, 1], (counts > 0).mean(0)[numbers])


# Whole runs ---------------------------------------------------------------------------------------

# The genes of this base are almost alike: a fitted head has weights of 317 and a bias of -455, whose last bit is 3e-5;
# a probability moves by up to a quarter of a logit.
CLOSE = 5e-5


@pytest.mark.parametrize("method", ["lora", "full", "head_only", "linear_probe"])
def test_a_run_learns_what_can_be_learnt(method: str, place: Path, tmp_path: Path) -> None:
    before = digest(place / "base" / "model.safetensors")
    rate = 0.1 if method == "head_only" else 0.01
    config = make_config(place, tmp_path / "run", method=method, report=True, learning_rate=rate)
    assert finetune(config) == 0
    assert digest(place / "base" / "model.safetensors") == before
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    scores = {name: metrics["auroc"]["mean"] for name, metrics in report["metrics"].items()}
    assert scores.pop(f"Tahoe-x1, {method}") > 0.9
    assert scores["majority class"] == 0.5
    # Here a gene's embedding says nothing; what decides is how strongly the gene is expressed where it is.
    assert scores["logistic regression on frozen gene embeddings"] < 0.9
    assert scores["random forest on mean expression and fraction of cells"] > 0.7
    assert report["genes_left_out"]["expressed in no cell"] == 2
    assert report["auprc_of"] == "high"
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"Tahoe-x1, {method} beats majority class by AUROC" in text
    assert "2 expressed in no cell" in text
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Results on genes that were not trained on" in card
    assert f"Tahoe-x1, {method} beats majority class" in card
    assert (tmp_path / "run" / "confusion.png").stat().st_size > 1000
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    table = pd.read_csv(tmp_path / "run" / "predictions.csv")
    with np.load(tmp_path / "run" / "result.npz") as arrays:
        assert len(table) == len(arrays["test"]) == len(arrays["logits"])
        chances = torch.softmax(torch.from_numpy(arrays["logits"]).double(), dim=1).numpy()
    assert np.allclose(table[["probability_high", "probability_low"]], chances, atol=1e-5)
    model, tokenizer = load_adapter(tmp_path / "run")
    assert model.config.id2label == {0: "high", 1: "low"}
    found = predict_gene_classes(tmp_path / "run", gene_cells())
    again = found.loc[[name.partition(".")[0] for name in table["gene"]]]
    for column in ("probability_high", "probability_low"):
        assert np.allclose(again[column], table[column], atol=CLOSE)  # the tested model is the one that was saved
    assert again["predicted"].tolist() == table["predicted"].tolist()
    assert again["cells"].tolist() == table["cells"].tolist()
    assert len(found) == 58
    assert not {GENES[number] for number in UNEXPRESSED} & set(found.index)
    order = np.random.default_rng(0).permutation(60)
    shuffled = predict_gene_classes(tmp_path / "run", gene_cells()[order])
    assert np.allclose(shuffled["probability_high"], found["probability_high"], atol=CLOSE)
    mouse, translated = as_mouse(gene_cells(), tmp_path)
    pd.testing.assert_frame_equal(predict_gene_classes(tmp_path / "run", mouse, **translated), found)
    assert tokenizer.context_length == 48


def test_folds_by_family_and_the_model_of_all_genes(place: Path, tmp_path: Path) -> None:
    config = make_config(place, tmp_path / "run", folds=2, group="family", epochs=1, report=True)
    assert finetune(config) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    table = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert len(table) == 57 == table["gene"].nunique()
    assert len(report["metrics"]["majority class"]["auroc"]["values"]) == 2
    assert "those of a family together" in (tmp_path / "run" / "report.md").read_text()
    assert not list((tmp_path / "run" / "folds").glob("*/checkpoint-*"))
    with np.load(tmp_path / "run" / "result.npz") as arrays:
        assert len(arrays["test"]) == 0
        assert len(arrays["train"]) + len(arrays["validation"]) == 57
    assert read_record(tmp_path / "run")["classes"] == ["high", "low"]
    load_adapter(tmp_path / "run")
    stamp = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert finetune(config) == 0  # all is done: nothing is trained again
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == stamp


def test_a_file_that_has_changed_since_the_run_began_is_noticed(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "cells.h5ad"
    gene_cells().write_h5ad(data)
    config = make_config(place, tmp_path / "run", data=str(data), method="linear_probe")
    assert finetune(config) == 0
    gene_cells(59).write_h5ad(data)
    with pytest.raises(ValueError, match=r"data=.* has changed since the run"):
        finetune(config)


@pytest.mark.slow
def test_two_processes_learn_the_same(place: Path, tmp_path: Path) -> None:
    done = in_processes(make_config(place, tmp_path / "two", epochs=2), 2, "--verbose")
    assert done.returncode == 0, done.stderr[-2000:]
    alone = in_processes(make_config(place, tmp_path / "one", epochs=2), 1)
    assert alone.returncode == 0, alone.stderr[-2000:]
    with np.load(tmp_path / "one" / "result.npz") as one, np.load(tmp_path / "two" / "result.npz") as two:
        assert largest_difference(two["logits"], one["logits"]) < 4 * CLOSE
    assert done.stderr.count("Fold 1 of 1") == 2  # both processes are there, and say so with --verbose


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(place: Path, tmp_path: Path) -> None:
    configs = [make_config(place, tmp_path / name, epochs=3) for name in ("killed", "whole")]
    check_that_a_killed_run_resumes(*configs, step=10)


def test_the_card_and_the_recipe(place: Path, tmp_path: Path) -> None:
    from tahoex1_hf.finetuning.config import read_finetune_config

    recipe = Path(__file__).parents[3] / "examples" / "configs" / "finetune" / "gene_classification.yaml"
    assert read_finetune_config(recipe).task == "gene_classification"
    assert finetune(make_config(place, tmp_path / "run", epochs=1)) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert re.search("gene classification: level", card)
    assert "TahoeX1ForTokenClassification" in card


def test_depmap_genes_in_heart_cells(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Real data hold the expected labelled genes; nothing is trained."""
    table = shared_data("labels/egbench_depmap26q1_gene_universe.parquet")
    cells = shared_data("h5ad/heart_san_1000_native_ensembl.h5ad")
    tokenizer = TahoeX1Tokenizer(shared_data("tahoe/vocab.json"))
    matrix = anndata.read_h5ad(cells)
    expressing = np.zeros(len(tokenizer), dtype=np.int64)
    tokens = tokenizer.match_genes(matrix.var_names).token_ids
    np.add.at(expressing, tokens, np.asarray((matrix.X > 0).sum(axis=0)).ravel())
    config = GeneClassificationConfig(
        task="gene_classification",
        model="none",
        data=str(cells),
        output_dir=str(tmp_path),
        genes=str(table),
        label="label_name",
        rare_classes="drop",
    )
    genes = read_gene_table(config, tokenizer, expressing)
    counts = dict(zip(genes.classes, np.bincount(genes.labels).tolist(), strict=True))
    known = pd.read_parquet(table)
    expressed = set(matrix.var_names[np.asarray((matrix.X > 0).sum(axis=0)).ravel() > 0])
    wanted = known[known["ensembl_gene_id"].isin(expressed)].drop_duplicates("ensembl_gene_id")
    assert counts == wanted["label_name"].value_counts().to_dict()
    assert counts["essential"] > 1500
