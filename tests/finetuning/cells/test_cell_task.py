"""Test fine-tuning runs: tasks, methods, resuming, processes, early stopping, folds."""

import json
import re
from pathlib import Path
from typing import Any

import anndata
import forked
import numpy as np
import pytest
import torch
from finetuning_runs import (
    KINDS,
    RECIPES,
    ROOT,
    SCRIPT,
    command,
    digest,
    labelled_cells,
    make_config,
    result,
    settings,
    start,
    write_base,
)
from helpers import largest_departure_of_weights, largest_difference
from safetensors.torch import load_file

from tahoex1_hf import TahoeX1ForPreTraining, embed_anndata
from tahoex1_hf.finetuning.bases import load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import read_cells
from tahoex1_hf.finetuning.cells.masked_expression import model_errors
from tahoex1_hf.finetuning.cells.predicting import predict_files
from tahoex1_hf.finetuning.config import FinetuneConfig, read_finetune_config
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective
from tahoex1_hf.finetuning.running import finetune
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.finetuning.trainer import FinetuneTrainer
from tahoex1_hf.hub.adapters import load_adapter, read_record

METHODS = ["lora", "dora", "rslora", "full", "head_only", "linear_probe"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    labelled_cells(120).write_h5ad(path)
    return path


def accuracy(folder: Path) -> float:
    arrays = result(folder)[1]
    return float((arrays["outputs"].argmax(1) == arrays["test"] % 3).mean())  # the kinds take turns


# Tasks and methods --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn_and_leave_the_base_alone(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    before = digest(base / "model.safetensors")
    epochs, rate = (10, 0.1) if method == "head_only" else (6, 0.01)
    config = make_config(base, data, tmp_path / "run", method=method, epochs=epochs, learning_rate=rate)
    assert finetune(config) == 0
    assert digest(base / "model.safetensors") == before
    facts, arrays = result(tmp_path / "run")
    assert accuracy(tmp_path / "run") > (0.7 if method == "head_only" else 0.8)  # a third is of each kind
    model, tokenizer = load_adapter(tmp_path / "run")
    assert [model.config.id2label[i] for i in range(3)] == KINDS
    assert tokenizer.context_length == 48
    adapter = (tmp_path / "run" / "adapter_config.json").is_file()
    assert adapter == (method != "full")
    cells = read_cells(config, load_tokenizer(config), tmp_path)
    batch = cells.batch(arrays["test"])
    batch.pop("labels")
    with torch.no_grad():
        outputs = model(**batch).logits
    assert largest_difference(outputs, arrays["outputs"]) < 1e-4  # the tested model is the one that was saved
    head = 32 * 3 + 3
    if method in ("head_only", "linear_probe"):
        assert facts["trainable_parameters"] == head
    elif method != "full":
        per_layer = 4 * (4 * (32 + 32)) + 2 * (4 * (32 + 128))  # rank times inputs and outputs
        dora = 2 * (4 * 32 + 128 + 32) if method == "dora" else 0
        assert facts["trainable_parameters"] == head + 2 * per_layer + dora


def test_regression_predicts_in_the_units_of_the_column(base: Path, data: Path, tmp_path: Path) -> None:
    doses = labelled_cells(120).obs["dose"].to_numpy()
    for method in ("lora", "linear_probe"):
        folder = tmp_path / method
        finetune(make_config(base, data, folder, task="regression", label="dose", method=method, epochs=12))
        arrays = result(folder)[1]
        predicted, truth = arrays["outputs"][:, 0], doses[arrays["test"]]
        assert np.abs(predicted - truth).mean() < 0.5 * np.abs(truth - truth.mean()).mean()
        model, _ = load_adapter(folder)
        assert model.config.problem_type == "regression"


def objective_of(config: FinetuneConfig, folder: Path, train: np.ndarray) -> Objective:
    return Objective(config, read_cells(config, load_tokenizer(config), folder), train)


def test_masked_expression_fits_the_cells_better_than_the_base(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path / "run", task="masked_expression", label=None, epochs=6, report=True)
    assert finetune(config) == 0
    facts, arrays = result(tmp_path / "run")
    test = facts["test"]
    assert test["model"] < 0.8 * test["base"]
    batch = objective_of(config, tmp_path, arrays["train"]).batch(arrays["test"], HELD_OUT)
    everything = read_cells(config, load_tokenizer(config), tmp_path).encoded(arrays["train"])
    bins = everything.expression_values[everything.expression_values > 0].mean()
    expected = ((batch["labels"] - bins)[batch["target_mask"]] ** 2).mean()
    assert test["mean"] == pytest.approx(float(expected), rel=1e-3)
    plain = TahoeX1ForPreTraining.from_pretrained(base)  # not the one below the adapters
    read = read_cells(config, load_tokenizer(config), tmp_path)
    split = Split(arrays["train"], arrays["validation"], arrays["test"])
    assert test["base"] == pytest.approx(model_errors(config, read, split, plain)[0], rel=1e-6)
    model, _ = load_adapter(tmp_path / "run")
    assert isinstance(model.get_base_model(), TahoeX1ForPreTraining)
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| this model, mean of both decoders | {test['model']:.4f} |" in report
    assert "The model beats the base" in report
    does = "beats" if test["model_expression"] < test["gene_mean"] else "does not beat"
    assert f"The model {does} the constants" in report
    assert read_record(tmp_path / "run")["metrics"]["model"] == test["model"]
    assert "The model beats the base" in (tmp_path / "run" / "README.md").read_text()
    # The card promises two things: one can embed with the model, and train it further.
    merged, tokenizer = model.merge_and_unload(), load_tokenizer(config)
    cells = labelled_cells(12)
    embed_anndata(cells, merged, tokenizer, dtype="float32", progress=False)
    assert cells.obsm["X_tahoe_x1"].shape == (12, 32)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert finetune(make_config(tmp_path / "merged", data, tmp_path / "next", method="linear_probe")) == 0


def test_predict_gives_what_was_tested(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path / "run", method="linear_probe", context_length=12)  # genes are sampled
    finetune(config)
    arrays = result(tmp_path / "run")[1]
    predict_files(data, tmp_path / "out.h5ad", tmp_path / "run", dtype="float32", progress=False)
    predicted = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["tahoex1_kind_probabilities"]
    tested = torch.from_numpy(arrays["outputs"]).softmax(1)
    assert largest_difference(np.asarray(predicted)[arrays["test"]], tested) < 1e-5


def test_the_report_stands_beside_the_adapter(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # UMAP itself compiles for 8 s: tests/examples/test_demo.py draws one.
    monkeypatch.setattr("tahoex1_hf.common.plots.umap_places", lambda embeddings, seed: embeddings[:, :2])
    config = make_config(base, data, tmp_path / "run", method="linear_probe", folds=3, report=True)
    assert finetune(config) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    truth = np.arange(120) % 3
    hits = []
    for fold in range(3):
        arrays = result(tmp_path / "run" / "folds" / str(fold))[1]
        hits.append(float((arrays["outputs"].argmax(1) == truth[arrays["test"]]).mean()))
    assert report["metrics"]["model"]["accuracy"]["values"] == pytest.approx(hits)
    assert {"PCA + logistic regression", "majority class"} < set(report["metrics"])
    assert report["comparison"]["text"] in (tmp_path / "run" / "README.md").read_text()
    assert read_record(tmp_path / "run")["metrics"]["accuracy"] == pytest.approx(np.mean(hits))


# Training -----------------------------------------------------------------------------------------


def test_gradient_checkpointing_run_ends_at_the_same_weights(base: Path, data: Path, tmp_path: Path) -> None:
    for name, checkpointing in (("off", False), ("on", True)):
        finetune(make_config(base, data, tmp_path / name, gradient_checkpointing=checkpointing))
    off, on = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("off", "on"))
    assert largest_departure_of_weights(on, off) < 1e-3


@pytest.mark.parametrize(("task", "label"), [("classification", "kind"), ("masked_expression", None)])
def test_microbatches_change_no_step(task: str, label: str | None, base: Path, data: Path, tmp_path: Path) -> None:
    for size in (None, 5):
        changes = {"task": task, "label": label, "microbatch_size": size, "epochs": 1}
        finetune(make_config(base, data, tmp_path / str(size), **changes))
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("None", "5"))
    assert largest_departure_of_weights(parts, whole) < 3e-3
    facts = [result(tmp_path / name)[0] for name in ("None", "5")]
    assert facts[0]["steps"] == facts[1]["steps"]
    assert facts[0]["validation_loss"] == pytest.approx(facts[1]["validation_loss"], rel=1e-5)


def test_best_weights_are_kept_and_training_stops_early(base: Path, data: Path, tmp_path: Path) -> None:
    # At this learning rate the loss on the validation cells soon rises.
    folder = tmp_path / "run"
    config = make_config(base, data, folder, learning_rate=0.3, epochs=40, early_stopping_patience=2)
    finetune(config)
    facts, arrays = result(folder)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    assert facts["steps"] < 40 * 5
    assert losses[facts["best_step"]] == min(losses.values())
    assert [step for step in losses if step > facts["best_step"]][-1] == facts["steps"]
    assert len([step for step in losses if step > facts["best_step"]]) == 2
    assert not list(folder.glob("checkpoint-*"))
    objective, model = objective_of(config, tmp_path, arrays["train"]), load_adapter(folder)[0]
    with torch.no_grad():
        sums = objective.sums(model, objective.batch(arrays["validation"], HELD_OUT))
    assert objective.metrics(sums, 1)["loss"] == pytest.approx(min(losses.values()), rel=1e-4)


def test_the_same_run_gives_the_same_weights(base: Path, data: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        finetune(make_config(base, data, tmp_path / name))
    first, second = (digest(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first == second


def test_folds_test_on_every_cell_and_the_last_model_knows_all(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path / "run", folds=3, method="linear_probe", group="donor")
    assert finetune(config) == 0
    donors = labelled_cells(120).obs["donor"].to_numpy()
    tested = []
    for fold in range(3):
        _, arrays = result(tmp_path / "run" / "folds" / str(fold))
        tested.append(arrays["test"])
        assert len(arrays["outputs"]) == len(arrays["test"]) == len(arrays["before"]) == len(arrays["after"])
        assert not set(donors[arrays["test"]]) & set(donors[arrays["train"]])
    assert np.array_equal(np.sort(np.concatenate(tested)), np.arange(120))
    facts, arrays = result(tmp_path / "run")
    assert len(arrays["train"]) + len(arrays["validation"]) == 120
    assert read_record(tmp_path / "run")["training_cells"] == facts["training_cells"] == len(arrays["train"])
    before = digest(tmp_path / "run" / "adapter_model.safetensors")
    assert finetune(config) == 0  # the same command finds all done
    assert digest(tmp_path / "run" / "adapter_model.safetensors") == before


@pytest.mark.parametrize(
    ("task", "method"),
    [("regression", "dora"), ("masked_expression", "full"), ("classification", "head_only")],
)
def test_a_run_that_was_cut_short_resumes_exactly(
    task: str, method: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", expression_encoder_dropout=0.1)
    label = {"regression": "dose", "classification": "kind"}.get(task)
    changes = {"task": task, "method": method, "label": label, "epochs": 3, "head_start": "probe"}
    finetune(make_config(base, data, tmp_path / "whole", **changes))
    config = make_config(base, data, tmp_path / "cut", **changes)
    clip = FinetuneTrainer._clip_grad_norm

    def cut(self: FinetuneTrainer, model: Any) -> Any:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return clip(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "_clip_grad_norm", cut)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    torch.manual_seed(99)  # the state of the process that resumes must not matter
    assert finetune(config) == 0
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    whole, resumed = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_run_that_stopped_early_is_not_trained_further(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"learning_rate": 0.3, "epochs": 40, "early_stopping_patience": 1}
    finetune(make_config(base, data, tmp_path / "whole", **changes))
    config = make_config(base, data, tmp_path / "cut", **changes)
    with monkeypatch.context() as patch:
        patch.setattr("tahoex1_hf.finetuning.cells.task.save_adapter", lambda *_: 1 / 0)  # killed after the training
        with pytest.raises(ZeroDivisionError):
            finetune(config)
    finetune(config)
    steps = [result(tmp_path / name)[0]["steps"] for name in ("whole", "cut")]
    assert steps[0] == steps[1] < 200
    whole, cut = (digest(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(data: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", expression_encoder_dropout=0.1)
    given = settings(base, data, tmp_path / "killed", epochs=4)
    values = {name: json.dumps(value) for name, value in given.items()}
    # This run, too, needs its own process: the libraries loaded into this one may make it round differently.
    whole_run = start(command(SCRIPT, **values | {"output_dir": json.dumps(str(tmp_path / "whole"))}))
    assert whole_run.returncode == 0, whole_run.stderr[-2000:]
    for kill_in, kill_at in (("step", "7"), ("save", "15")):
        killer = command(ROOT / "tests" / "support" / "killed_finetuning.py", **values)
        assert start(killer, KILL_IN=kill_in, KILL_AT=kill_at).returncode == -9
    cut_short = tmp_path / "killed" / "checkpoint-15"
    assert cut_short.is_dir()
    assert not (cut_short / "complete.json").exists()
    done = start(command(SCRIPT, **values))
    assert done.returncode == 0, done.stderr[-2000:]
    name = "adapter_model.safetensors"
    whole, resumed = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert resumed.keys() == whole.keys()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "masked_expression"])
def test_two_processes_learn_the_same(task: str, base: Path, data: Path, tmp_path: Path) -> None:
    label = "kind" if task == "classification" else None
    changes = {"task": task, "label": label, "epochs": 1, "head_start": "probe"}
    for name in ("one", "two"):
        given = settings(base, data, tmp_path / name, **changes)
        values = {key: json.dumps(value) for key, value in given.items()} | {"label": json.dumps(label)}
        if name == "one":
            done = start(command(SCRIPT, **values))
        elif task == "classification":
            done = forked.launch_as_a_user(command(SCRIPT, processes=2, **values))
        else:
            done = forked.launch(2, command(SCRIPT, **values), forked.environment())
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert largest_departure_of_weights(two, one) < 1e-3
    facts = [result(tmp_path / name)[0] for name in ("one", "two")]
    assert [each["processes"] for each in facts] == [1, 2]
    losses = [each["validation_loss"] for each in facts]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # they follow from the weights: 1.2e-4 was seen


# Recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["masked_expression", "classification", "regression"])
def test_recipes(task: str) -> None:
    path = RECIPES / f"{task}.yaml"
    config = read_finetune_config(path, ["learning_rate=1e-4", "output_dir=elsewhere"])
    assert config.task == task
    assert config.learning_rate == 1e-4
    assert config.output_dir == "elsewhere"
    assert (ROOT / config.model).is_dir()
    assert (ROOT / str(config.gene_symbols)).is_file()
    lines = path.read_text().splitlines()
    keys = [line for line in lines if re.match(r"[a-z_]+:", line)]
    undocumented = [
        line for line in keys if "#" not in line and not line.startswith(("task", "output_dir", "seed", "weight"))
    ]
    assert not undocumented


def test_configuration_goes_through_yaml(tmp_path: Path) -> None:
    config = read_finetune_config(RECIPES / "classification.yaml")
    config.write(tmp_path / "config.yaml")
    assert read_finetune_config(tmp_path / "config.yaml") == config
