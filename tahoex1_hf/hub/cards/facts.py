# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The facts that a model card is made from, read from a YAML file and checked.

The facts are typed and strict: an unknown or missing key, or a value of another type, is an error.
"""

import difflib
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from tahoex1_hf.configuration_tahoe_x1 import VALUE_ENCODINGS

# Facts of the released sizes, by the names in use for each size.
_FOLDER = Path(__file__).parent
RELEASED_FACTS = {
    "70m": _FOLDER / "70m.yaml",
    "1.3b": _FOLDER / "1_3b.yaml",
    "1_3b": _FOLDER / "1_3b.yaml",
    "1b": _FOLDER / "1_3b.yaml",
    "3b": _FOLDER / "3b.yaml",
}


@dataclass(frozen=True)
class Shape:
    """Arguments of `TahoeX1Config` that determine the number of parameters and the work per cell."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    expression_decoder_act: str
    attention_mask_style: str
    num_drugs: int = 0
    drug_token_id: int | None = None

    def embedding_flops(self, tokens: int) -> float:
        """Count the floating-point operations that embed one cell, two per multiplication.

        The number equals `tahoex1_hf.training.flops.embedding_flops` for attention heads that are not grouped and a
        feed-forward block four times as wide as the model.

        Args:
            tokens: Number of tokens of the cell.
        """
        d, layers = self.hidden_size, self.num_hidden_layers
        return 2.0 * (tokens * (layers * 12 * d * d + d * d) + tokens**2 * layers * 2 * d)


@dataclass(frozen=True)
class DataSet:
    """A dataset that the model was trained on; `hub_id` is its name on the Hub, where it has one."""

    name: str
    cells: str
    description: str
    hub_id: str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of the training; the weight decay is Composer's decoupled one, p *= 1 - (lr / lr0) wd."""

    name: str
    cells_per_step: int
    learning_rate: float
    schedule: str
    decoupled_weight_decay: float
    epochs: int
    context: int

    @property
    def torch_weight_decay(self) -> float:
        """The decay in the terms of torch's AdamW."""
        return self.decoupled_weight_decay / self.learning_rate


@dataclass(frozen=True)
class Measurement:
    """A measured time or size, and the machine on which it was measured."""

    what: str
    value: str
    where: str


@dataclass(frozen=True)
class Result:
    """A result and its source. With `task_type`, `dataset_id` and `url` it goes into the Hub's model-index too."""

    task: str
    metric: str
    value: str | float
    source: str
    url: str | None = None
    task_type: str | None = None
    dataset_id: str | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class Facts:
    """All facts of a model's card; the fields are the keys of a facts file."""

    title: str
    size: str
    released: bool
    summary: str
    parameters: int
    shape: Shape
    context: int
    num_bins: int
    attention_mask: str
    drug_token: str
    data: list[DataSet]
    data_note: str
    recipe: list[Stage]
    recipe_note: str
    measured: list[Measurement]
    parity: str
    results: list[Result]
    results_note: str
    intended_use: list[str]
    out_of_scope: list[str]
    limits: list[str]
    citation: str
    license: str
    tags: list[str]
    model_path: str | None = None
    value_encoding: str = "bins"


def load_facts(path: str | Path) -> Facts:
    """Read a facts file.

    Raises:
        ValueError: If a key is unknown, missing or of the wrong type; the message names file and key.
    """
    path = Path(path)
    mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    facts: Facts = _typed(Facts, mapping, path.name)
    if facts.value_encoding not in VALUE_ENCODINGS:
        raise ValueError(f"{path.name}: value_encoding={facts.value_encoding!r}: pass one of {VALUE_ENCODINGS}.")
    for result in facts.results:
        if result.task_type and not (result.url and result.dataset_id and isinstance(result.value, float)):
            raise ValueError(
                f"{path.name}: the result {result.task!r} has a task_type, so it goes into the model-index: it needs "
                "url (its source), dataset_id and a number as value."
            )
    return facts


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Return a value as a type of the dataclasses above, or raise ValueError naming its place in the file."""
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: a list is wanted, got {type(value).__name__}.")
        return [_typed(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(value) in options:
        return value.strip() if isinstance(value, str) else value
    if type(value) is int and float in options:
        return float(value)
    names = " or ".join("nothing" if option is types.NoneType else option.__name__ for option in options)
    raise ValueError(f"{where}: {names} is wanted, got {value!r} ({type(value).__name__}).")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: keys are wanted, got {type(value).__name__}.")
    names = [field.name for field in fields(kind)]
    for key in value:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            raise ValueError(f"{where}: unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in value]
    if missing:
        raise ValueError(f"{where}: missing key {', '.join(map(repr, missing))}.")
    hints = get_type_hints(kind)
    return kind(**{key: _typed(hints[key], item, f"{where}: {key}") for key, item in value.items()})
