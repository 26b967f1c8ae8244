# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Configurations of fine-tuning, one class for each task, read from YAML and changed by `key=value`.

A recipe's `task` decides which class it is read as. Keys that no task has, and keys of another task, are errors.
`recipes/` has a commented recipe for every task; `tahoex1 recipes` prints them.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from tahoex1_hf.common.recipes import read_recipe
from tahoex1_hf.data.config import Strict, with_overrides

TaskName = Literal["masked_expression", "classification", "regression", "gene_classification", "drug_response"]
Method = Literal["lora", "dora", "rslora", "qlora", "full", "linear_probe", "head_only"]


class FinetuneConfig(Strict):
    """The settings that every task has. `parse_finetune_config` makes the class that belongs to a task."""

    task: TaskName
    """Kind of fine-tuning: masked expression (no labels), classes or numbers in a column of obs, classes of genes, or
    the response to drugs."""
    model: str
    """The base model: folder or Hub id of a checkpoint, also in the original's layout. It is not changed."""
    size: str | None = None
    """Size of the base, where `model` holds several: 70m, 1b, 3b."""
    data: str
    """`.h5ad` file (or `.zarr` store) with raw counts."""
    output_dir: str
    """Folder for checkpoints, the report and the adapter. The same command on the same folder resumes the run."""

    layer: str | None = None
    """Layer with the counts; by default `X`, or where that holds none `counts`, `raw_counts` or `raw`."""
    gene_id_column: str | None = None
    """Column of `var` with Ensembl ids; by default they are looked for."""
    gene_symbols: str | None = None
    """Table with gene symbol and Ensembl id, for files that name genes by symbol; by default the package's."""
    species: Literal["human", "mouse"] = "human"
    """Species of the cells; genes of a mouse need `orthologs`."""
    orthologs: str | None = None
    """Table with mouse genes and their human orthologues."""
    drugs: str | None = None
    """For models with a drug encoder: column of obs with the drugs, or one drug for all cells."""
    context_length: int | None = Field(None, gt=2)
    """Most tokens of a cell; by default the tokenizer's."""

    method: Method = "lora"
    """Trained weights: low-rank adapters (lora, dora, rslora; qlora on a base in 4 bits), all weights (full), or the
    head alone, by gradients (head_only) or fitted on the frozen embeddings (linear_probe)."""
    lora_rank: int = Field(8, gt=0)
    """Rank of the adapters' matrices."""
    lora_alpha: float = Field(16, gt=0)
    """Scale of the adapters: their product is multiplied by this over the rank (over its root, with rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    expression_encoder_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the expression values' embeddings while training. By default the base's; none where the head starts
    from a probe, which was fitted to embeddings without it."""
    target_modules: list[str] | None = None
    """Names of the linear layers that get adapters; by default the attention and feed-forward projections."""

    folds: int = Field(1, gt=0)
    """Number of models, each tested on another part of the data; with 2 or more, a last one learns from all."""
    test_fraction: float = Field(0.2, gt=0, le=0.5)
    """Share of the cells (genes, conditions) to test on, with one fold."""
    validation_fraction: float = Field(0.1, gt=0, le=0.5)
    """Share of the other cells that early stopping evaluates on."""

    epochs: float = Field(20, gt=0)
    """Largest number of times that each training cell is seen."""
    batch_size: int = Field(32, gt=0)
    """Cells of a step, over all processes."""
    microbatch_size: int | None = Field(None, gt=0)
    """Most cells that a process takes at once, where memory is short; the step stays the same."""
    learning_rate: float = Field(1e-3, gt=0)
    """Highest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine and linear end at zero."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradients; larger ones are scaled down."""
    early_stopping_patience: int | None = Field(5, gt=0)
    """Number of evaluations without a better validation loss after which training ends; null for never."""
    eval_steps: int | None = Field(None, gt=0)
    """Steps between two evaluations, each with a checkpoint; by default one epoch."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the splits, the order of the cells, new weights, masked genes and dropout."""

    precision: Literal["launcher", "no", "bf16", "fp16"] = "launcher"
    """Mixed precision; `launcher` takes the setting of `accelerate launch`."""
    attention: Literal["sdpa", "flash_attention_2", "flex_attention", "eager"] = "sdpa"
    """Attention backend."""
    gradient_checkpointing: bool = False
    """Whether to compute each layer again in the backward pass: less memory, a third more time."""
    report: bool = True
    """Whether to write a report at the end: metrics beside those of classical baselines, predictions and pictures."""

    @field_validator("precision", mode="before")
    @classmethod
    def _read_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads no as false

    @model_validator(mode="before")
    @classmethod
    def _without_unset(cls, values: Any) -> Any:
        """Leave out nulls of required keys, which are then missing, and other tasks' keys at their defaults."""
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if not cls._is_unset(str(key), value)}

    @classmethod
    def _is_unset(cls, key: str, value: Any) -> bool:
        if key in cls.model_fields:
            return value is None and cls.model_fields[key].is_required()
        # `config.resolved.yaml` of version 0.1 held the keys of all tasks.
        defaults = [CONFIGS[task].model_fields[key].default for task in tasks_with(key)]
        return bool(defaults) and (value is None or value in defaults)

    @property
    def starts_from_probe(self) -> bool:
        """Whether training starts with a head that was fitted to the base's embeddings."""
        return False


class _Splits(FinetuneConfig):
    unknown_drugs: Literal["error", "pad"] = "error"
    """Rule for drugs that the base's drug table lacks: they are refused, or (pad) their cells count as cells without a
    drug, as in the original, with a warning."""
    split: str | None = None
    """Column with train, validation and test, for splits made elsewhere; by default the splits are random."""
    group: str | None = None
    """Column (donor, batch, cell line; for genes, a family) whose rows stay together: none is in two splits."""

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if self.split is not None and self.folds > 1:
            raise ValueError(f"split={self.split} names the cells to test on: folds={self.folds} does not go with it.")
        return self


class _Labelled(_Splits):
    label: str
    """Column with the labels; rows without a label are left out, and counted in the log."""
    head_start: Literal["probe", "random"] = "probe"
    """Weights that the head starts with: fitted to the frozen embeddings, so that the first steps do not spoil these
    (Kumar et al. 2022, arXiv:2202.10054), or random; with head_only they are always random."""

    @property
    def starts_from_probe(self) -> bool:
        """Whether training starts with a head that was fitted to the base's embeddings."""
        return self.method != "head_only" and self.head_start == "probe"


class ClassesConfig(_Labelled):
    """The settings of tasks that learn classes, of cells or of genes."""

    min_class_cells: int = Field(2, ge=2)
    """Fewest cells (genes) of a class; one with fewer is rare."""
    rare_classes: Literal["error", "drop"] = "error"
    """Whether rare classes are an error, or their cells (genes) are left out."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """`balanced`: every class counts the same in the loss, however many cells it has."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _read_none(cls, value: Any) -> Any:
        return "none" if value is None or value is False else value


class ClassificationConfig(ClassesConfig):
    """Classification of cells: `label` is a column of obs with classes."""

    task: Literal["classification"]


class RegressionConfig(_Labelled):
    """Regression on cells: `label` is a column of obs with numbers."""

    task: Literal["regression"]


class MaskedExpressionConfig(_Splits):
    """Continued masked-expression training on cells without labels."""

    task: Literal["masked_expression"]
    mlm_probability: float | list[float] = 0.5
    """Share of a cell's genes to predict; of several, one is chosen at random for every cell."""

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method in ("linear_probe", "head_only"):
            raise ValueError(
                f"method={self.method} trains a head, and masked_expression has none: choose method=lora or full."
            )
        return self


class GeneClassificationConfig(ClassesConfig):
    """Classification of genes: `label`, `group` and `split` are columns of the table `genes`."""

    task: Literal["gene_classification"]
    genes: str
    """Table (.csv, .tsv, .parquet) with a row per gene."""
    genes_id_column: str = "ensembl_gene_id"
    """Column of the table with Ensembl ids."""


class DrugResponseConfig(FinetuneConfig):
    """Response of cell populations to drugs, tested on drugs and contexts that were held out."""

    task: Literal["drug_response"]
    drugs: str
    """Column of obs with the drug of each cell."""
    control: str
    """Value of the column `drugs` in untreated cells."""
    context: str
    """Column of obs with the context that the response may depend on, such as the cell line."""
    batch: str | None = None
    """Column of obs with the batch or plate; treated cells are compared with the untreated ones of their batch."""
    held_out: list[Literal["drug", "context"]] = Field(["drug", "context"], min_length=1)
    """Kinds of things held out for testing: drugs, contexts, or both, with a model for each kind."""
    drug_table: str | None = None
    """JSON file with drug -> row of `drug_fingerprints` (`tahoex1 drug-fingerprints`), for drugs that the base does
    not know."""
    drug_fingerprints: str | None = None
    """`.npy` file with the fingerprints, `(drugs, bits)`."""
    response_genes: int = Field(2000, gt=1)
    """Number of genes whose change is predicted: those that vary most over the cells."""
    min_condition_cells: int = Field(10, gt=0)
    """Fewest cells of a drug in a context, and of its controls; conditions with fewer are left out, as their mean is
    noise."""
    controls_per_condition: int = Field(8, gt=0)
    """Number of control cells that a condition is paired with in an epoch; they are chosen anew in each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.method == "linear_probe":
            raise ValueError("method=linear_probe fits a head on labels, and drug_response has none: head_only.")
        if (self.drug_table is None) != (self.drug_fingerprints is None):
            raise ValueError(
                f"drug_table={self.drug_table} and drug_fingerprints={self.drug_fingerprints} go together: give both, "
                "or neither."
            )
        return self


CONFIGS: dict[str, type[FinetuneConfig]] = {
    "masked_expression": MaskedExpressionConfig,
    "classification": ClassificationConfig,
    "regression": RegressionConfig,
    "gene_classification": GeneClassificationConfig,
    "drug_response": DrugResponseConfig,
}


def tasks_with(key: str) -> list[str]:
    """Return the tasks that have a key."""
    return [task for task, config in CONFIGS.items() if key in config.model_fields]


def parse_finetune_config(values: Mapping[str, Any], origin: str = "the configuration") -> FinetuneConfig:
    """Make the configuration of a task from plain values.

    Args:
        values: Keys and values; `task` decides which keys are known. A key of another task is accepted where it is
            null or at its default, as in `config.resolved.yaml` of version 0.1.
        origin: Name of the file, for errors.

    Raises:
        ValueError: For every key that is unknown, belongs to another task, is missing or has a wrong value.
    """
    task = values.get("task")
    if not isinstance(task, str) or task not in CONFIGS:
        given = "missing" if task is None else repr(task)
        raise ValueError(f"{origin}:\n  task: {given}: it must be one of {', '.join(map(repr, CONFIGS))}.")
    try:
        return CONFIGS[task].model_validate(dict(values))
    except ValidationError as error:
        lines = [f"  {_problem(dict(problem), task)}" for problem in error.errors()]
        raise ValueError(f"{origin}:\n" + "\n".join(lines)) from None


def _problem(problem: dict[str, Any], task: str) -> str:
    """Describe one of pydantic's errors."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        text = " ".join((CONFIGS[task].model_fields[key].description or "").split())
        return f"{key}: task={task} needs it. {text}"
    if problem["type"] != "extra_forbidden":
        return f"{key or 'the configuration'}: {problem['msg'].removeprefix('Value error, ')}"
    if others := tasks_with(key):
        return f"{key}={problem['input']} is for task={' and '.join(others)}, not for {task}: leave it out."
    close = difflib.get_close_matches(key, CONFIGS[task].model_fields, n=2)
    return f"{key}: unknown key" + (f"; is {' or '.join(close)} meant?" if close else "")


def read_finetune_config(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a recipe.

    Args:
        path: YAML file, or the name of a recipe of the package.
        overrides: `key=value`; values are YAML.

    Raises:
        ValueError: For an override that is not `key=value`, and for every key that is unknown, belongs to another
            task, is missing or has a wrong value.
    """
    return parse_finetune_config(with_overrides(read_recipe(path, "finetune"), overrides), str(path))
