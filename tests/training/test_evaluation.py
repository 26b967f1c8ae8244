"""Evaluations during training are right on planted data, and do not disturb the training."""

import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from cells import GENES, make_cells, write_vocab
from helpers import tiny_config, tiny_model
from training_runs import environment
from transformers import TrainerControl, TrainerState, TrainingArguments

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells import encoding
from tahoex1_hf.training.evaluation import (
    CellTypeConfig,
    CellTypeEvaluation,
    GeneEssentialityConfig,
    GeneEssentialityEvaluation,
)

CHILD = Path(__file__).parents[1] / "support" / "sharded_evaluation_run.py"


@pytest.fixture(autouse=True)
def without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw two numbers of each embedding: compiling UMAP takes longer than all else here, and a report's test does."""
    monkeypatch.setattr("tahoex1_hf.common.plots.umap_places", lambda embeddings, seed: embeddings[:, :2])


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(write_vocab(tmp_path), context_length=32)


@pytest.fixture
def model(tokenizer: TahoeX1Tokenizer) -> Any:
    return tiny_model(tiny_config(vocab_size=max(tokenizer.get_vocab().values()) + 1)).train()


def evaluate(evaluation: Any, model: Any, tokenizer: TahoeX1Tokenizer, folder: Path) -> list[dict[str, float]]:
    logged: list[dict[str, float]] = []
    evaluation.log, evaluation.tokenizer = logged.append, tokenizer
    args = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    state = TrainerState(global_step=7)
    evaluation.on_evaluate(args, state, TrainerControl(), model=model)
    assert not logged
    evaluation.on_step_end(args, state, TrainerControl(should_log=True))
    return logged


def cells_file(folder: Path, planted: bool) -> Path:
    """Write two types of cells; if `planted`, the type decides which genes are expressed most."""
    cells = make_cells(60, largest=40)
    kinds = np.array(["a", "b"])[np.arange(60) % 2]
    if planted:
        counts = cells.X.toarray()
        half = counts.shape[1] // 2
        counts[kinds == "a", :half] = 0
        counts[kinds == "b", half:] = 0
        counts[:, [0, -1]] += 1
        cells.X = type(cells.X)(counts)
    cells.obs["kind"] = kinds
    cells.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


@pytest.mark.parametrize("planted", [True, False])
def test_cell_types(planted: bool, model: Any, tokenizer: TahoeX1Tokenizer, tmp_path: Path) -> None:
    config = CellTypeConfig(name="kinds", file=str(cells_file(tmp_path, planted)), label="kind")
    (found,) = evaluate(CellTypeEvaluation(config), model, tokenizer, tmp_path)
    if planted:
        assert found["eval_kinds_macro_f1"] > 0.95
        assert found["eval_kinds_knn_purity_over_chance"] > 1.3
    else:
        assert found["eval_kinds_macro_f1"] < 0.75
        assert found["eval_kinds_knn_purity_over_chance"] == pytest.approx(1, abs=0.2)
    assert (tmp_path / "evaluation" / "kinds-step-7.png").stat().st_size > 5000
    line = json.loads((tmp_path / "evaluation" / "results.jsonl").read_text())
    assert line["step"] == 7
    assert line["eval_kinds_macro_f1"] == found["eval_kinds_macro_f1"]


def test_essential_genes(model: Any, tokenizer: TahoeX1Tokenizer, tmp_path: Path) -> None:
    ids = [tokenizer.get_vocab()[gene] for gene in GENES]
    labels = np.arange(len(GENES)) % 2
    with torch.no_grad():  # planted: essential genes lie on one side
        model.tahoe.embeddings.gene_encoder.embedding.weight[ids, :8] += torch.tensor(labels * 6.0)[:, None]
    table = pd.DataFrame({"ensembl": [*GENES, "ENSG99999999999"], "essential": [*labels, 1]})
    table.to_csv(tmp_path / "genes.csv", index=False)
    settings: dict[str, Any] = {"name": "depmap", "file": str(tmp_path / "genes.csv"), "folds": 2}
    config = GeneEssentialityConfig(**settings, label="essential")
    (found,) = evaluate(GeneEssentialityEvaluation(config), model, tokenizer, tmp_path)
    assert found["eval_depmap_auroc"] > 0.9
    table[table.essential == 1].to_csv(tmp_path / "yes.csv")
    table[table.essential == 0].to_parquet(tmp_path / "no.parquet")
    two = {**settings, "file": str(tmp_path / "yes.csv"), "negatives_file": str(tmp_path / "no.parquet")}
    (again,) = evaluate(GeneEssentialityEvaluation(GeneEssentialityConfig(**two)), model, tokenizer, tmp_path)
    assert again["eval_depmap_auroc"] > 0.9


def test_the_training_is_not_disturbed(model: Any, tokenizer: TahoeX1Tokenizer, tmp_path: Path) -> None:
    config = CellTypeConfig(name="kinds", file=str(cells_file(tmp_path, True)), label="kind", max_cells=40)

    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    def seed() -> None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002

    seed()
    expected = draws()
    seed()
    evaluate(CellTypeEvaluation(config), model, tokenizer, tmp_path)
    assert draws() == expected
    assert model.training


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": "type"}, "label='type' is not in obs"),
        ({"folds": 50}, "0 classes have at least 50 cells"),
        ({"file": "nowhere.h5ad"}, "nowhere.h5ad"),
    ],
)
def test_a_failed_evaluation_does_not_end_the_training(
    changes: dict[str, Any], said: str, model: Any, tokenizer: TahoeX1Tokenizer, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = {"name": "kinds", "file": str(cells_file(tmp_path, True)), "label": "kind", **changes}
    with caplog.at_level(logging.WARNING):
        assert evaluate(CellTypeEvaluation(CellTypeConfig(**settings)), model, tokenizer, tmp_path) == []
    assert "the training continues" in caplog.text
    assert said in caplog.text


def test_every_second_evaluation(model: Any, tokenizer: TahoeX1Tokenizer, tmp_path: Path) -> None:
    config = CellTypeConfig(name="kinds", file=str(cells_file(tmp_path, True)), label="kind", every_evals=2)
    evaluation = CellTypeEvaluation(config)
    assert evaluate(evaluation, model, tokenizer, tmp_path) == []
    assert len(evaluate(evaluation, model, tokenizer, tmp_path)) == 1


def test_the_processes_of_a_sharded_model_share_the_cells(
    model: Any, tokenizer: TahoeX1Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, place = cells_file(tmp_path, True), tmp_path / "found.npz"
    done = forked.launch(2, [sys.executable, CHILD, file, place], environment("fsdp"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this process cannot read the file" in done.stderr  # and both went on
    seen = json.loads(place.with_suffix(".json").read_text())
    assert seen["shares"] == [[0, 14, 28, 42, 56], [7, 21, 35, 49]]
    assert seen["trains"]
    assert seen["timeout"] == 3600
    monkeypatch.setattr(encoding, "CHUNK_CELLS", 7)
    evaluation = CellTypeEvaluation(CellTypeConfig(name="kinds", file=str(file), label="kind"))
    evaluation.tokenizer = tokenizer
    expected = evaluation._gathered(model)
    assert expected is not None
    with np.load(place) as found:
        np.testing.assert_array_equal(found["embeddings"], expected[0])
        np.testing.assert_array_equal(found["labels"], expected[1])
