"""Test the options of Trainer that are the same for every run."""

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from tahoex1_hf.runs import arguments
from tahoex1_hf.runs.arguments import run_arguments


def made(folder: Path, **changes: Any) -> TrainingArguments:
    options = {"precision": "no", "activation_checkpointing": False, **changes}
    return run_arguments(output_dir=str(folder), report_to="none", **options)


@pytest.mark.parametrize("wanted", [False, True])
def test_checkpointed_activations_are_requested_without_a_warning(wanted: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = made(tmp_path, activation_checkpointing=wanted)
    assert bool(args.gradient_checkpointing) == wanted  # every transformers 5 can read this name


def test_transformers_knows_the_name_of_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers before 5.23 had no `activation_checkpointing`."""
    fields = [field for field in dataclasses.fields(TrainingArguments) if not field.name.startswith("activation_")]

    def earlier(**options: Any) -> Any:
        assert set(options) <= {field.name for field in fields}
        return SimpleNamespace(**options)

    monkeypatch.setattr(arguments, "TrainingArguments", earlier)
    monkeypatch.setattr(arguments.dataclasses, "fields", lambda _: fields)
    args = made(tmp_path, activation_checkpointing=True)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_no_mixed_precision_overrides_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for precision, used in (("no", "no"), ("launcher", "bf16"), ("bf16", "bf16")):
        assert made(tmp_path, precision=precision).mixed_precision == used
