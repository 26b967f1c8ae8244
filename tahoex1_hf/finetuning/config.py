# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of fine-tuning: typed, strict (an unknown key is an error), read from YAML, changed by `key=value`.

`recipes/` has a commented recipe for every task; `tahoex1 recipes` prints them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from tahoex1_hf.common.recipes import read_recipe
from tahoex1_hf.data.config import Strict, validated, with_overrides

Task = Literal["masked_expression", "classification", "regression", "gene_classification", "drug_response"]
Method = Literal["lora", "dora", "rslora", "qlora", "full", "linear_probe", "head_only"]
LABELLED = ("classification", "regression")


class FinetuneConfig(Strict):
    """All that decides the weights that come out of a run."""

    task: Task
    """What is learnt: masked expression (no labels), classes or numbers in a column of obs, classes of genes, or the
    response to drugs."""
    model: str
    """The base: folder or Hub id of a checkpoint, also in the original's layout. It is not changed."""
    size: str | None = None
    """Which size, where `model` holds several: 70m, 1b, 3b."""
    data: str
    """`.h5ad` file (or `.zarr` store) with raw counts."""
    label: str | None = None
    """Column of obs with the labels; cells without a label are left out, and counted in the log."""
    output_dir: str
    """Where checkpoints, the report and in the end the adapter are written. The same command goes on."""

    layer: str | None = None
    """Layer with the counts; by default `X`."""
    gene_id_column: str | None = None
    """Column of `var` with Ensembl ids; by default `var_names`."""
    gene_symbols: str | None = None
    """CSV with gene symbol and Ensembl id, for files that name genes by symbol."""
    drugs: str | None = None
    """For models with a drug encoder: column of obs with the drugs, or the drug of all cells."""
    context_length: int | None = Field(None, gt=2)
    """Most tokens of a cell; by default the tokenizer's."""

    method: Method = "lora"
    """What is trained: adapters of low rank (lora, dora, rslora; qlora on a base in 4 bits), all weights (full), or
    the head alone, by gradients (head_only) or fitted on the frozen embeddings (linear_probe)."""
    lora_rank: int = Field(8, gt=0)
    """Rank of the adapters' matrices."""
    lora_alpha: float = Field(16, gt=0)
    """Their product is scaled by this over the rank (over its root, with rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    expression_encoder_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the expression values' embeddings while training. By default the base's; none where the head starts
    from a probe, which was fitted to embeddings without it."""
    target_modules: list[str] | None = None
    """Names of the linear layers that get adapters; by default attention and feed-forward projections."""

    head_start: Literal["probe", "random"] = "probe"
    """Where the head of classifications and regression starts: fitted to the frozen embeddings, so that first steps do
    not spoil them (Kumar et al. 2022, arXiv:2202.10054), or at random; that of head_only starts at random."""

    split: str | None = None
    """Column of obs with train, validation and test, for splits made elsewhere; else cells are drawn."""
    group: str | None = None
    """Column of obs (donor, batch, cell line) whose cells stay together: none is in two splits."""
    folds: int = Field(1, gt=0)
    """With 2 or more: so many models, each tested on another part; a last one learns from all cells."""
    test_fraction: float = Field(0.2, gt=0, le=0.5)
    """Share of the cells to test on, with one fold."""
    validation_fraction: float = Field(0.1, gt=0, le=0.5)
    """Share of the other cells that early stopping looks at."""
    min_class_cells: int = Field(2, ge=2)
    """Fewest cells of a class: one with fewer is rare."""
    rare_classes: Literal["error", "drop"] = "error"
    """What to make of rare classes; `drop` leaves their cells out."""

    epochs: float = Field(20, gt=0)
    """How often each training cell is seen, at most."""
    batch_size: int = Field(32, gt=0)
    """Cells of a step, of all processes together."""
    microbatch_size: int | None = Field(None, gt=0)
    """Most cells that a process takes at once, where memory is short; the step stays the same."""
    learning_rate: float = Field(1e-3, gt=0)
    """Highest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it goes on after the warm-up; the first two end at zero."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which it rises from 0."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """Balanced: every class counts the same in the loss, however many cells it has."""
    mlm_probability: float | list[float] = 0.5
    """With masked_expression: share of a cell's genes to predict; of several, one is drawn for every cell."""
    early_stopping_patience: int | None = Field(5, gt=0)
    """End after so many evaluations without a better loss on the validation cells; null for never."""
    eval_steps: int | None = Field(None, gt=0)
    """Steps between two evaluations, each with a checkpoint; by default once an epoch."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of splits, the order of the cells, new weights, targets and dropout."""

    precision: Literal["launcher", "no", "bf16", "fp16"] = "launcher"
    """Mixed precision; `launcher` takes what `accelerate launch` was told."""
    attention: Literal["sdpa", "flash_attention_2", "flex_attention", "eager"] = "sdpa"
    """Backend of attention."""
    gradient_checkpointing: bool = False
    """Compute each layer anew in the backward pass: less memory, a third more time."""
    report: bool = True
    """Write metrics beside those of classical baselines, predictions and pictures at the end."""

    genes: str | None = None
    """With gene_classification: table (.csv, .tsv, .parquet) with a row per gene; `label`, `group` and `split` are
    columns of it."""
    genes_id_column: str = "ensembl_gene_id"
    """Its column with Ensembl ids."""

    control: str | None = None
    """With drug_response: what the column `drugs` says of untreated cells. `group` does not apply, see `held_out`."""
    context: str | None = None
    """Column of obs with what the response may depend on: the cell line."""
    batch: str | None = None
    """Column of obs with the batch or plate; treated cells are compared with the untreated ones of their batch."""
    held_out: list[Literal["drug", "context"]] = Field(["drug", "context"], min_length=1)
    """What is tested on: drugs that are not trained on, contexts that are not, or both, a model each."""
    drug_table: str | None = None
    """JSON file with drug -> row of `drug_fingerprints` (`tahoex1 drug-fingerprints`), for drugs that the base does
    not know."""
    drug_fingerprints: str | None = None
    """`.npy` file with the fingerprints, `(drugs, bits)`."""
    response_genes: int = Field(2000, gt=1)
    """Genes whose change is predicted: those that vary most over the cells."""
    min_condition_cells: int = Field(10, gt=0)
    """Fewest cells of a drug in a context, and of its controls: the mean of fewer is noise, and left out."""
    controls_per_condition: int = Field(8, gt=0)
    """Control cells that a condition is paired with in an epoch, drawn anew in each."""

    @field_validator("precision", mode="before")
    @classmethod
    def _no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads no as false

    @field_validator("class_weights", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return "none" if value is None or value is False else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.task in LABELLED and self.label is None:
            raise ValueError(f"task={self.task} needs label, the column of obs to learn.")
        if self.task == "masked_expression":
            if self.label is not None:
                raise ValueError(f"label={self.label}: masked_expression learns from the counts, leave the label out.")
            if self.method in ("linear_probe", "head_only"):
                raise ValueError(f"method={self.method} needs a head to train, which masked_expression has not: lora.")
        if self.method == "linear_probe" and self.task not in (*LABELLED, "gene_classification"):
            raise ValueError(f"method=linear_probe is for classifications and regression, not {self.task}: head_only.")
        self._check_genes_and_drugs()
        if self.split is not None and self.folds > 1:
            raise ValueError(f"split={self.split} says what is tested on: folds={self.folds} does not go with it.")
        return self

    def _check_genes_and_drugs(self) -> None:
        if self.task == "gene_classification" and (self.genes is None or self.label is None):
            raise ValueError("gene_classification needs genes, a table with a row per gene, and label, its column.")
        if self.genes is not None and self.task != "gene_classification":
            raise ValueError(f"genes={self.genes} is for task=gene_classification, not for {self.task}.")
        if self.task == "drug_response":
            for name in ("drugs", "control", "context"):
                if getattr(self, name) is None:
                    raise ValueError(
                        f"drug_response needs {name}: drugs and context are columns of obs, control a drug."
                    )
            for name in ("label", "group", "split"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)}: drug_response learns changes and holds out drugs "
                        "and contexts (held_out), leave it out."
                    )
        elif self.control is not None or self.context is not None:
            raise ValueError(f"control and context are for task=drug_response, not for {self.task}.")
        if (self.drug_table is None) != (self.drug_fingerprints is None):
            raise ValueError("drug_table and drug_fingerprints go together.")

    @property
    def starts_from_probe(self) -> bool:
        """Whether the head starts fitted to the base's embeddings."""
        can = self.task in (*LABELLED, "gene_classification") and self.method != "head_only"
        return can and self.head_start == "probe"

    def write(self, path: Path) -> None:
        """Write all keys, also those left at their defaults."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def read_finetune_config(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a recipe.

    Args:
        path: YAML file, or the name of a recipe of the package.
        overrides: `key=value`; values are YAML.

    Raises:
        ValueError: for an override that is no `key=value`, and naming every key that is unknown, missing or wrong.
    """
    values = with_overrides(read_recipe(path, "finetune"), overrides)
    return validated(FinetuneConfig, values, str(path))
