"""Test the response to drugs: conditions, baselines and metrics by hand, new drugs, runs on a simulated screen."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from alone import Alone
from cells import as_mouse
from drug_screens import (
    CONTROL,
    DRUGS,
    GENES,
    LINES,
    NEW,
    fingerprints,
    simulated_screen,
    write_drug_base,
    write_new_drugs,
)
from finetuning_runs import RECIPES, digest, write_base
from helpers import DRUG, largest_difference
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from two_processes import check_that_a_killed_run_resumes, in_processes

from tahoex1_hf import TahoeX1ForPreTraining
from tahoex1_hf.finetuning.config import DrugResponseConfig, parse_finetune_config, read_finetune_config
from tahoex1_hf.finetuning.drugs import screen as drug_screen
from tahoex1_hf.finetuning.drugs.metrics import (
    CONTEXT_MEAN,
    DRUG_MEAN,
    NULL,
    by_unit,
    change_baselines,
    pearson_rows,
    score,
)
from tahoex1_hf.finetuning.drugs.objective import DrugObjective, inner_model
from tahoex1_hf.finetuning.drugs.predicting import predict_drug_response
from tahoex1_hf.finetuning.drugs.task import DrugTask
from tahoex1_hf.finetuning.objectives import HELD_OUT
from tahoex1_hf.finetuning.running import finetune, run_fold
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.finetuning.task import Fold
from tahoex1_hf.hub.adapters import load_adapter, read_record
from tahoex1_hf.hub.added_drugs import ADDED, add_drugs, add_saved_drugs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screen")
    write_drug_base(folder / "base")
    simulated_screen().write_h5ad(folder / "cells.h5ad")
    write_new_drugs(folder)
    return folder


def make_config(place: Path, output: Path, **changes: Any) -> DrugResponseConfig:
    usual: dict[str, Any] = {
        "task": "drug_response",
        "model": str(place / "base"),
        "data": str(place / "cells.h5ad"),
        "output_dir": str(output),
        "drugs": "drug",
        "control": CONTROL,
        "context": "line",
        "drug_table": str(place / "drug_to_id_pad.json"),
        "drug_fingerprints": str(place / "drug_fps_pad.npy"),
        "epochs": 2,
        "batch_size": 32,
        "learning_rate": 0.01,
        "controls_per_condition": 2,
        "early_stopping_patience": None,
        "precision": "no",
        "report": False,
    }
    return parse_finetune_config({**usual, **changes})  # type: ignore[return-value]


def make_run(place: Path, output: Path, **changes: Any) -> DrugTask:
    output.mkdir(exist_ok=True)
    return DrugTask(make_config(place, output, **changes), Alone())  # type: ignore[arg-type]


def make_objective(run: DrugTask, split: Split) -> DrugObjective:
    return DrugObjective(run.config, run.cells, run.screen, (run.drug_ids, run.control_id), split.train)


# Conditions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 4096])
def test_conditions_by_hand(block: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drug_screen, "_CHUNK_CELLS", block)
    rows: list[tuple[str, str, str]] = [
        *[("A", "p1", CONTROL)] * 3,
        *[("A", "p2", CONTROL)] * 2,
        *[("A", "p1", DRUGS[0])] * 2,
        *[("A", "p2", DRUGS[0])] * 2,
        *[("A", "p2", DRUGS[1])] * 2,
        *[("B", "p1", CONTROL)] * 1,  # too few
        *[("B", "p1", DRUGS[0])] * 2,
        ("A", "p1", DRUGS[2]),  # too few
        ("A", "p1", "nan"),
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    rows = [rows[i] for i in order]
    random = np.random.default_rng(1)
    counts = random.integers(0, 9, (len(rows), 30)) + np.eye(30, dtype=int)[: len(rows)]
    counts[:, 4] = 0
    obs = pd.DataFrame(rows, columns=["line", "plate", "drug"], index=[f"c{i}" for i in range(len(rows))])
    matrix = csr_matrix(counts.astype(np.float32))
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=GENES)).write_h5ad(tmp_path / "cells.h5ad")
    changes: dict[str, Any] = {"data": str(tmp_path / "cells.h5ad"), "min_condition_cells": 2, "batch": "plate"}
    screen = make_run(place, tmp_path, **changes).screen
    found = list(zip(screen.contexts, screen.batches, screen.drugs, screen.num_cells, strict=True))
    assert found == [("A", "p1", DRUGS[0], 2), ("A", "p2", DRUGS[0], 2), ("A", "p2", DRUGS[1], 2)]
    assert list(screen.left_out.values()) == [1, 1, 1]
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    keys = [tuple(row) for row in rows]
    columns = [GENES.index(gene) for gene in genes_of(place, screen)]
    assert len(columns) == 29  # all but the gene that no cell expresses
    for row, (context, plate, drug, _) in enumerate(found):
        treated = values[[key == (context, plate, drug) for key in keys]].mean(0)
        control = values[[key == (context, plate, CONTROL) for key in keys]].mean(0)
        assert np.allclose(screen.changes[row], (treated - control)[columns], atol=1e-5)
        group = screen.controls[row]
        assert np.allclose(screen.control_profiles[group], control[columns], atol=1e-5)
        assert [keys[number] for number in screen.control_cells[group]] == [(context, plate, CONTROL)] * (
            3 if plate == "p1" else 2
        )
    few = make_run(place, tmp_path, **{**changes, "response_genes": 5}).screen
    used = [key[2] != "nan" and key[0] == "A" and key[2] != DRUGS[2] for key in keys]
    best = np.argsort(-values[used].var(axis=0))[:5]
    assert set(genes_of(place, few)) == {GENES[number] for number in best}


def genes_of(place: Path, screen: Any) -> list[str]:
    vocabulary = json.loads((place / "base" / "vocab.json").read_text())
    names = {number: name for name, number in vocabulary.items()}
    return [names[int(token)] for token in screen.genes]


@pytest.mark.parametrize("kind", ["drug", "context"])
def test_held_out_conditions_are_not_trained_on(kind: str, place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path, folds=3)
    splits = run.splits(kind)
    for split in splits:
        parts = [set(run.units(kind)[rows]) for rows in split.parts().values()]
        assert all(parts)
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]
    tested = np.concatenate([split.test for split in splits])
    assert sorted(tested) == list(range(len(DRUGS) * len(LINES)))


# Pairs --------------------------------------------------------------------------------------------


def test_pairs_of_a_batch(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    split = run.splits("drug")[0]
    objective = make_objective(run, split)
    rows = objective.samples(split.train[:10])
    assert rows.tolist() == [row for c in split.train[:10] for row in (2 * c, 2 * c + 1)]
    batch = objective.batch(rows, 0)
    for name in ("input_ids", "expression_values", "attention_mask"):
        treated, untreated = batch[name].chunk(2)
        assert torch.equal(treated, untreated)
    treated, untreated = batch["drug_ids"].chunk(2)
    assert treated.tolist() == run.drug_ids[rows // 2].tolist()
    assert set(untreated.tolist()) == {0}  # the solvent, which no drug table holds
    scale = np.sqrt((run.screen.changes[split.train].astype(np.float64) ** 2).mean())
    assert np.allclose(batch["changes"], run.screen.changes[rows // 2] / scale, atol=1e-5)
    obs = anndata.read_h5ad(run.config.data).obs
    cells = anndata.read_h5ad(run.config.data).X.toarray()
    for place_in_batch, row in enumerate(rows):  # the cell is a control of the same line
        ids = batch["input_ids"][place_in_batch][batch["attention_mask"][place_in_batch].bool()][2:]
        expressed = {run.tokenizer.convert_ids_to_tokens(int(i)) for i in ids}
        same = [i for i in range(len(cells)) if {GENES[g] for g in np.flatnonzero(cells[i])} == expressed]
        line = run.screen.contexts[row // 2]
        assert any(obs["drug"].iloc[i] == CONTROL and obs["line"].iloc[i] == line for i in same)
    again, other = objective.batch(rows, 0), objective.batch(rows, 1)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    assert other["input_ids"].shape != batch["input_ids"].shape or not torch.equal(
        other["input_ids"], batch["input_ids"]
    )
    part = objective.batch(rows[4:6], 0)  # a pair does not depend on the others of its batch
    length = part["input_ids"].shape[1]
    assert torch.equal(part["input_ids"][:2], batch["input_ids"][4:6, :length])


def test_the_loss_does_not_depend_on_batches(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    split = run.splits("drug")[0]
    objective, model = make_objective(run, split), run.base().eval()
    rows = objective.samples(split.validation)
    with torch.no_grad():
        whole = objective.sums(model, objective.batch(rows, HELD_OUT))
        parts = sum(objective.sums(model, objective.batch(part, HELD_OUT)) for part in np.array_split(rows, 5))
    assert whole[1] == len(rows)
    assert torch.allclose(whole, torch.as_tensor(parts), rtol=1e-4)
    assert objective.metrics(whole, 0)["loss"] == pytest.approx(float(whole[0] / len(rows)))


def test_no_drug_no_change(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    run.drug_ids[:] = run.control_id
    model = run.base().eval()
    assert np.abs(run.changes(model, np.arange(4))).max() == 0
    run.drug_ids[:] = 5
    assert np.abs(run.changes(model, np.arange(4))).max() > 0.01


# New drugs ----------------------------------------------------------------------------------------


def test_new_drugs_are_rows_of_the_table(place: Path, tmp_path: Path) -> None:
    run = make_run(place, tmp_path)
    known = 1 + len(DRUGS) - len(NEW)
    before = TahoeX1ForPreTraining.from_pretrained(place / "base")
    model = run.base()
    assert model.config.num_drugs == known + len(NEW)
    table = model.tahoe.embeddings.drug_encoder.embedding.weight
    assert torch.equal(table[:known], before.tahoe.embeddings.drug_encoder.embedding.weight)
    assert np.array_equal(table[known:].detach(), fingerprints()[-len(NEW) :])
    assert [run.tokenizer.drug_to_id[drug] for drug in NEW] == list(range(known, known + len(NEW)))
    run.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert type(run.tokenizer).from_pretrained(tmp_path / "tokenizer").drug_to_id == run.tokenizer.drug_to_id
    torch.manual_seed(0)
    ids = torch.tensor([[1, DRUG, 5, 9, 12]])
    cell = {"input_ids": ids, "expression_values": torch.rand(1, 5) * 20}
    with torch.no_grad():
        same = [m(**cell, drug_ids=torch.tensor([4])).pooler_output for m in (before.eval(), model.eval())]
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drug_table": None, "drug_fingerprints": None}, r"4 drugs are not in the drug table .*drug-fingerprints"),
        ({"drug_table": "few.json"}, "has no fingerprint of drug47, drug56, drug57: add"),
        ({"control": "water"}, "control=water stands for no cell in drugs=drug; there are DMSO_TF"),
        ({"context": "tissue"}, "context=tissue is not a column of obs"),
        ({"drugs": "compound"}, "drugs=compound is not a column of obs"),
        ({"min_condition_cells": 1000}, "0 conditions have 1000 cells and as many controls"),
        ({"model": "no drugs"}, "has no drug encoder"),
    ],
)
def test_bad_input(changes: dict[str, Any], said: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "few.json").write_text('{"<pad>": 0, "drug67": 1}')
    if "model" in changes:
        changes = {"model": str(write_base(tmp_path / "base"))}
    if str(changes.get("drug_table", "")).startswith("few"):
        changes = {"drug_table": str(tmp_path / "few.json")}
    with pytest.raises(ValueError, match=said):
        make_run(place, tmp_path, **changes)


def test_fingerprints_of_another_length(place: Path) -> None:
    model = TahoeX1ForPreTraining.from_pretrained(place / "base")
    with pytest.raises(ValueError, match="have 32 bits, the base reads 16"):
        add_drugs(model, np.zeros((1, 32), dtype=np.float32))


def test_settings_that_do_not_go_together(place: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"control": None}, "control: task=drug_response needs it"),
        ({"context": None}, "context: task=drug_response needs it"),
        ({"label": "line"}, "leave it out"),
        ({"group": "line"}, "leave it out"),
        ({"held_out": []}, "held_out"),
        ({"drug_table": None}, "go together"),
        (
            {"task": "masked_expression"},
            "control=DMSO_TF is for task=drug_response, not for masked_expression: leave it out",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            make_config(place, tmp_path, **changes)


# Whole runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_planted_effect_is_learnt_for_drugs_that_the_base_never_saw(place: Path, tmp_path: Path) -> None:
    """In the simulated screen a new drug is known only by its bits, each of which it shares with other drugs."""
    before = digest(place / "base" / "model.safetensors")
    run = make_run(place, tmp_path / "run", epochs=30, eval_steps=40, lora_rank=8)
    screen = run.screen
    new, watched = np.isin(screen.drugs, NEW), np.isin(screen.drugs, DRUGS[3:24:7])
    split = Split(np.flatnonzero(~new & ~watched), np.flatnonzero(watched), np.flatnonzero(new))
    outcome = run_fold(run, Fold("drug-0", split), run.folder, keep=True)
    changes, facts = outcome.arrays["changes"], outcome.facts
    assert digest(place / "base" / "model.safetensors") == before
    truth = screen.changes[split.test]
    known = np.concatenate([split.train, split.validation])
    baselines = change_baselines(screen.changes, screen.drugs, screen.contexts, known, split.test)
    _, each = score({"model": changes, **baselines}, truth, screen.drugs[split.test])
    pearson = {name: values["pearson"].mean() for name, values in each.items()}
    error = {name: values["mse"].mean() for name, values in each.items()}
    assert pearson["model"] > 0.3
    assert pearson[NULL] == 0
    assert error["model"] < error[NULL]
    assert pearson["model"] > pearson[CONTEXT_MEAN]  # which does not know the drug
    assert facts["validation_loss"] < 1  # predicting no change has 1
    # One line of code loads the model, with the new drugs.
    model, tokenizer = load_adapter(tmp_path / "run")
    assert set(NEW) <= set(tokenizer.drug_to_id)
    assert largest_difference(run.changes(model, split.test), changes) < 1e-5
    assert (tmp_path / "run" / ADDED).is_file()
    cells = anndata.read_h5ad(run.config.data)
    controls = cells[(cells.obs["drug"] == CONTROL) & (cells.obs["line"] == "A")]
    found = predict_drug_response(tmp_path / "run", controls, [NEW[1], CONTROL])
    row = np.flatnonzero((screen.drugs[split.test] == NEW[1]) & (screen.contexts[split.test] == "A"))
    assert largest_difference(found.to_numpy()[:1], changes[row]) < 1e-4
    assert np.abs(found.loc[CONTROL]).max() == 0
    mouse, translated = as_mouse(controls, tmp_path)
    pd.testing.assert_frame_equal(
        predict_drug_response(tmp_path / "run", mouse, list(found.index), **translated), found
    )
    assert list(found.columns) == genes_of(place, screen)
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in weights if "lora" not in name} == {"gene_query", "cell_proj"}
    # A base that has the drugs is left as it is; one that has other drugs in their rows is refused.
    base = run.base()
    add_saved_drugs(tmp_path / "run", base)
    assert base.config.num_drugs == run.base().config.num_drugs
    other = TahoeX1ForPreTraining.from_pretrained(place / "base")
    add_drugs(other, np.ones((len(NEW), 16), dtype=np.float32))
    with pytest.raises(ValueError, match="has other drugs"):
        add_saved_drugs(tmp_path / "run", other)


@pytest.mark.parametrize("method", ["lora", "full", "head_only"])
def test_a_whole_run(method: str, place: Path, tmp_path: Path) -> None:
    both = method == "lora"
    held_out = ["drug", "context"] if both else ["drug"]
    config = make_config(place, tmp_path / "run", method=method, held_out=held_out, report=True, epochs=1)
    assert finetune(config) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    text = (tmp_path / "run" / "report.md").read_text()
    table = pd.read_csv(tmp_path / "run" / "predictions.csv", keep_default_na=False)
    changes = pd.read_parquet(tmp_path / "run" / "predicted_changes.parquet")
    assert set(report["held_out"]) == set(table["held_out"]) == set(held_out)
    ours = f"Tahoe-x1, {method}"
    run = make_run(place, tmp_path / "again", method=method)
    for kind in held_out:
        found = report["held_out"][kind]
        assert set(found["metrics"]) == {ours, NULL, CONTEXT_MEAN, DRUG_MEAN}
        assert set(found["ours_minus"]) == {NULL, CONTEXT_MEAN, DRUG_MEAN}
        here, predicted = table[table["held_out"] == kind], changes[changes["held_out"] == kind]
        split = run.splits(kind)[0]
        assert here["drug"].tolist() == run.screen.drugs[split.test].tolist()
        again = pearson_rows(predicted[genes_of(place, run.screen)].to_numpy(), run.screen.changes[split.test])
        assert np.allclose(here[f"pearson of {ours}"], again, atol=1e-5)
        mean = np.mean(by_unit(again, run.units(kind)[split.test]))
        assert found["metrics"][ours]["pearson"]["mean"] == pytest.approx(mean, abs=1e-5)
        assert f"Held-out {kind}s" in text
    assert "no correlation is defined" in text
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Results on conditions that were not trained on" in card
    assert "predict_drug_response(" in card
    assert read_record(tmp_path / "run")["control"] == CONTROL
    model, tokenizer = load_adapter(tmp_path / "run")
    assert inner_model(model).config.num_drugs == len(tokenizer.drug_to_id)
    if both:  # the model that is kept has learnt from all conditions
        with np.load(tmp_path / "run" / "result.npz") as arrays:
            assert len(arrays["test"]) == 0
    else:
        with np.load(tmp_path / "run" / "result.npz") as arrays:
            assert largest_difference(run.changes(model, arrays["test"]), arrays["changes"]) < 1e-5
    stamp = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert finetune(config) == 0  # all is done: nothing is trained again
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_two_processes_learn_the_same(place: Path, tmp_path: Path) -> None:
    one, two = (make_config(place, tmp_path / name, held_out=["drug"]) for name in ("one", "two"))
    done = in_processes(two, 2, "--verbose")
    assert done.returncode == 0, done.stderr[-2000:]
    assert finetune(one) == 0
    with np.load(tmp_path / "one" / "result.npz") as a, np.load(tmp_path / "two" / "result.npz") as b:
        assert largest_difference(a["changes"], b["changes"]) < 1e-4
    assert done.stderr.count("Fold 1 of 1") == 2  # both processes are there, and say so with --verbose


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(place: Path, tmp_path: Path) -> None:
    configs = [make_config(place, tmp_path / name, held_out=["drug"], epochs=4) for name in ("killed", "whole")]
    check_that_a_killed_run_resumes(*configs, step=6)


def test_the_recipe_is_valid() -> None:
    assert read_finetune_config(RECIPES / "drug_response.yaml").task == "drug_response"
