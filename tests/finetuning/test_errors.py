"""Errors about bad input name the fault and the way out, before any training."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from finetuning_runs import RECIPES, labelled_cells, make_config, settings, write_base
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix
from transformers import TrainerState

from tahoex1_hf.finetuning.bases import load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import FinetuningData, read_cells
from tahoex1_hf.finetuning.config import parse_finetune_config, read_finetune_config
from tahoex1_hf.finetuning.running import finetune
from tahoex1_hf.finetuning.trainer import FinetuneTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bad") / "base")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that writes cells and starts a run on them."""

    def start(adata: anndata.AnnData, **changes: Any) -> int:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        return finetune(make_config(base, tmp_path / "cells.h5ad", tmp_path / "run", **changes))

    return start


@pytest.fixture
def read(base: Path, tmp_path: Path) -> Callable[..., FinetuningData]:
    """Return a function that writes cells and reads them as a run does."""

    def reading(adata: anndata.AnnData, **changes: Any) -> FinetuningData:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        config = make_config(base, tmp_path / "cells.h5ad", tmp_path / "run", **changes)
        return read_cells(config, load_tokenizer(config), tmp_path)

    return reading


def with_column(values: Any, name: str = "kind") -> anndata.AnnData:
    adata = labelled_cells(30)
    adata.obs[name] = values
    return adata


def test_missing_label_column(run: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"label=cell_type is not a column of obs of .*; there are donor, dose, kind, pair"
    ):
        run(labelled_cells(30), label="cell_type")


def test_a_missing_peft_is_told_before_any_work(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match="peft"):
        run(labelled_cells(30))
    assert not (tmp_path / "run").exists()


def test_constant_labels(run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"label=kind has the one value 'B'.*two classes"):
        run(with_column(["B"] * 30))
    with pytest.raises(ValueError, match="label=kind is 2 in all cells"):
        run(with_column([2.0] * 30), task="regression")


def test_measurements_are_not_classes(run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"30 distinct values and decimals, not classes: set task=regression"):
        run(labelled_cells(30), label="dose")
    adata = labelled_cells(120)
    adata.obs["n"] = np.arange(120) % 60
    with pytest.raises(ValueError, match="60 distinct values, not classes"):
        run(adata, label="n")


def test_numbered_classes_are_classes(read: Callable[..., FinetuningData]) -> None:
    cells = read(with_column([10.0, 2.0, np.nan] * 10))  # whole, and floats because one is missing
    assert cells.classes == ["2", "10"]
    assert cells.labels is not None
    assert cells.labels.tolist() == [1, 0] * 10


def test_class_with_one_cell(run: Callable[..., Any], read: Callable[..., FinetuningData], caplog: Any) -> None:
    kinds = ["A"] * 15 + ["B"] * 13 + ["only", "lonely"]
    with pytest.raises(
        ValueError, match=r"2 classes have fewer than 2 cells: lonely \(1\), only \(1\).*rare_classes=drop"
    ):
        run(with_column(kinds))
    with caplog.at_level(logging.WARNING, "tahoex1_hf"):
        cells = read(with_column(kinds), rare_classes="drop")
    assert "2 cells of 2 rare classes are left out: lonely (1), only (1)" in caplog.text
    assert cells.classes == ["A", "B"]
    assert len(cells) == 28


def test_cells_without_a_label_are_left_out_and_counted(read: Callable[..., FinetuningData], caplog: Any) -> None:
    kinds = pd.Categorical(["A", "B", None] * 10)
    with caplog.at_level(logging.WARNING, "tahoex1_hf"):
        cells = read(with_column(kinds))
    assert "10 of 30 cells have no kind and are left out" in caplog.text
    assert np.array_equal(cells.numbers, [i for i in range(30) if i % 3 != 2])
    doses = read(with_column([1.0, 2.5, np.nan] * 10), task="regression")
    assert doses.labels is not None
    assert doses.labels.tolist() == [1.0, 2.5] * 10
    with pytest.raises(ValueError, match="label=kind is empty"):
        read(with_column([""] * 30))


def test_text_is_not_a_number(run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"label=kind: 30 values are not finite numbers, 'B cell' for one"):
        run(labelled_cells(30), task="regression")
    with pytest.raises(ValueError, match="1 values are not finite numbers, inf for one"):
        run(with_column([np.inf, *range(29)]), task="regression")


def test_unusable_groups(run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="group=batch is not a column of obs"):
        run(labelled_cells(30), group="batch")
    with pytest.raises(ValueError, match=r"2 groups \(a, b\) are too few: 3 are needed"):
        run(with_column(["a", "b"] * 15, "batch"), group="batch")
    with pytest.raises(ValueError, match="group=batch: 10 cells have none"):
        run(with_column(pd.Categorical(["a", "b", None] * 10), "batch"), group="batch")


def test_a_given_split_that_leaks(run: Callable[..., Any]) -> None:
    adata = with_column((["train"] * 4 + ["test"]) * 6, "part")
    with pytest.raises(ValueError, match=r"leakage: . groups are in train and in test .*leave group out"):
        run(adata, split="part", group="donor")


def test_cells_that_stand_in_the_file_twice(run: Callable[..., Any]) -> None:
    adata = labelled_cells(40, noise=1.0)
    adata.X = csr_matrix(np.random.default_rng(0).integers(1, 9, adata.shape).astype(np.float32))
    twice = anndata.concat([adata, adata], index_unique="-")
    with pytest.raises(ValueError, match=r"leakage: \d+ test cells hold exactly the counts"):
        run(twice)
    twice.obs["donor"] = [f"d{i % 40}" for i in range(80)]
    with pytest.raises(ValueError, match="target_modules"):  # no leak: the copies stay together
        run(twice, group="donor", target_modules=["none"])


def test_unusable_files(run: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data=.*none\.h5ad does not exist"):
        finetune(make_config(base, tmp_path / "none.h5ad", tmp_path / "run"))
    adata = labelled_cells(30)
    adata.var_names = [f"gene{i}" for i in range(adata.n_vars)]
    with pytest.raises(ValueError, match="0 of 60 genes are in the vocabulary"):
        run(adata)
    negative = labelled_cells(30)
    negative.X.data[5] = -1
    with pytest.raises(ValueError, match="negative values"):
        run(negative)
    with pytest.raises(ValueError, match="it has no layers/raw"):
        run(labelled_cells(30), layer="raw")


def test_log_normalised_counts_give_a_warning(read: Callable[..., FinetuningData], caplog: Any) -> None:
    adata = labelled_cells(30)
    adata.X = adata.X.log1p()
    with caplog.at_level(logging.WARNING, "tahoex1_hf"):
        read(adata)
    assert "not integers and look log-normalised" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rnk": 4}, "lora_rnk: unknown key; is lora_rank or lora_dropout meant"),
        ({"lora_rank": 0}, "lora_rank: .*greater than 0"),
        ({"method": "prefix"}, "method: .*'lora'"),
        ({"task": "clustering"}, "task: "),
        ({"label": None}, "label: task=classification needs it"),
        (
            {"task": "masked_expression"},
            "label=kind is for task=classification.*not for masked_expression: leave it out",
        ),
        ({"task": "regression", "class_weights": "none"}, "class_weights=none is for task=classification and gene_cl"),
        ({"task": "masked_expression", "label": None, "method": "linear_probe"}, "masked_expression has none"),
        ({"split": "part", "folds": 5}, "folds=5 does not go with it"),
        ({"test_fraction": 0.9}, "test_fraction: "),
    ],
)
def test_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_finetune_config(settings(Path("m"), Path("d"), Path("o"), **changes), "test")


@pytest.mark.parametrize(("override", "message"), [("epochs", "is not key=value"), ("epoch=3", "epoch: unknown key")])
def test_overrides(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_finetune_config(RECIPES / "classification.yaml", [override])


def test_missing_target_modules(run: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"target_modules=\['query'\]: query is not a linear layer.*q_proj"):
        run(labelled_cells(30), target_modules=["query"])


def test_a_base_whose_cells_depend_on_padding(run: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "padded", cell_pooling="mean_with_padding")
    with pytest.raises(ValueError, match=r"mean_with_padding.*depend on the batch"):
        run(labelled_cells(30), model=str(other))


def test_a_base_that_is_not_whole(run: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "part")
    weights = load_file(base / "model.safetensors")
    del weights["tahoe.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the 46 tensors .* tahoe\.layers\.1\.mlp\.up_proj\.weight"):
        run(labelled_cells(30), model=str(tmp_path / "part"))


def test_classes_among_test_cells_alone_give_a_warning(run: Callable[..., Any], caplog: Any) -> None:
    adata = with_column(["A"] * 10 + ["B"] * 10 + ["C"] * 10)
    adata.obs["part"] = ["train"] * 20 + ["test"] * 10
    with caplog.at_level(logging.WARNING, "tahoex1_hf"):
        run(adata, split="part", method="linear_probe")
    assert "1 classes are tested but not trained on" in caplog.text


def test_qlora_needs_its_hardware(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"method=qlora needs a CUDA device.*use method=lora"):
        run(labelled_cells(30), method="qlora")


def test_a_folder_of_another_run(run: Callable[..., Any]) -> None:
    adata = labelled_cells(60)
    assert run(adata, method="linear_probe") == 0
    with pytest.raises(ValueError, match="holds a run with another seed: choose another folder"):
        run(adata, method="linear_probe", seed=1)
    changed = labelled_cells(60, seed=1)
    with pytest.raises(ValueError, match=r"data=.* has changed since the run"):
        run(changed, method="linear_probe")


def test_missing_best_weights_are_an_error(tmp_path: Path) -> None:
    lost = SimpleNamespace(state=TrainerState(best_model_checkpoint=str(tmp_path / "checkpoint-3")))
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3, is gone"):
        FinetuneTrainer._load_best_model(lost)  # type: ignore[arg-type]
