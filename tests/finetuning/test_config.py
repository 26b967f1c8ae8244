"""Configurations have the keys of their task; runs that an earlier version began are resumed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from finetuning_runs import digest, labelled_cells, result, write_base

from tahoex1_hf.finetuning import (
    ClassificationConfig,
    DrugResponseConfig,
    GeneClassificationConfig,
    MaskedExpressionConfig,
    RegressionConfig,
    finetune,
    parse_finetune_config,
    read_finetune_config,
)
from tahoex1_hf.finetuning.config import CONFIGS, tasks_with
from tahoex1_hf.finetuning.run_folder import changed_settings, open_run

# Written by revision 5656018, which had one configuration for all tasks.
EARLIER = Path(__file__).parent / "data" / "resolved_0.1.yaml"
COMMON = {"model": "base", "data": "cells.h5ad", "output_dir": "run"}
NEEDED: dict[str, dict[str, Any]] = {
    "classification": {"label": "kind"},
    "regression": {"label": "dose"},
    "masked_expression": {},
    "gene_classification": {"label": "essential", "genes": "genes.csv"},
    "drug_response": {"drugs": "drug", "control": "DMSO_TF", "context": "line"},
}


def test_the_task_decides_the_class() -> None:
    classes = {task: type(parse_finetune_config({"task": task, **COMMON, **NEEDED[task]})) for task in CONFIGS}
    assert classes == {
        "classification": ClassificationConfig,
        "regression": RegressionConfig,
        "masked_expression": MaskedExpressionConfig,
        "gene_classification": GeneClassificationConfig,
        "drug_response": DrugResponseConfig,
    }


@pytest.mark.parametrize("task", CONFIGS)
def test_keys_of_other_tasks_are_errors_that_name_them(task: str) -> None:
    values = {"task": task, **COMMON, **NEEDED[task]}
    every = {key for config in CONFIGS.values() for key in config.model_fields}
    others = sorted(every - set(CONFIGS[task].model_fields))
    assert others
    parse_finetune_config(values | dict.fromkeys(others))  # null counts as not given
    for key in others:
        with pytest.raises(ValueError, match=f"{key}=something is for task={tasks_with(key)[0]}.*, not for {task}"):
            parse_finetune_config({**values, key: "something"})


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="the configuration") as caught:
        parse_finetune_config({"task": "regression", **COMMON, "lora_rnk": 2, "genes": "x.csv", "epochs": -1})
    said = str(caught.value)
    assert "label: task=regression needs it. Column with the labels" in said
    assert "lora_rnk: unknown key; is lora_rank or lora_dropout meant?" in said
    assert "genes=x.csv is for task=gene_classification, not for regression: leave it out" in said
    assert "epochs: Input should be greater than 0" in said


@pytest.mark.parametrize("task", ["clustering", None, ["classification"]])
def test_unknown_tasks(task: Any) -> None:
    with pytest.raises(ValueError, match=r"task: .*it must be one of 'masked_expression', 'classification'"):
        parse_finetune_config({"task": task, **COMMON})


def test_the_resolved_configuration_of_an_earlier_version_is_read() -> None:
    config = read_finetune_config(EARLIER)
    assert isinstance(config, ClassificationConfig)
    before = yaml.safe_load(EARLIER.read_text())
    assert {"genes", "held_out", "mlm_probability"} <= set(before)  # it holds the keys of all tasks
    now = config.model_dump(mode="json")
    later = {"unknown_drugs": "error", "species": "human", "orthologs": None}  # keys at their defaults
    assert {name: now.pop(name) for name in later} == later
    assert {name: before[name] for name in now} == now
    assert changed_settings(config, before) == []
    changed = read_finetune_config(EARLIER, ["seed=1", "class_weights=none", "report=false"])
    assert changed_settings(changed, before) == ["class_weights", "seed"]
    other = read_finetune_config(EARLIER, ["task=masked_expression", "label=null"])
    assert changed_settings(other, before) == ["task"]


def test_a_run_that_an_earlier_version_began_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    labelled_cells(60).write_h5ad("cells.h5ad")
    changes = ["method=linear_probe", "folds=2", "report=false", "precision=no"]
    config = read_finetune_config(EARLIER, changes)
    assert finetune(config) == 0
    (tmp_path / "run" / "result.json").unlink()  # as if the run had been stopped after the folds
    before = yaml.safe_load(EARLIER.read_text()) | {"method": "linear_probe", "folds": 2}
    (tmp_path / "run" / "config.resolved.yaml").write_text(yaml.safe_dump(before))
    done = digest(tmp_path / "run" / "folds" / "0" / "result.npz")
    assert finetune(config) == 0
    assert digest(tmp_path / "run" / "folds" / "0" / "result.npz") == done
    assert result(tmp_path / "run")[0]["training_cells"] > 0
    (tmp_path / "run" / "config.resolved.yaml").write_text(yaml.safe_dump(before | {"seed": 7}))
    with pytest.raises(ValueError, match="holds a run with another seed"):
        open_run(config, first=True)
