# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of pretraining: typed, strict (an unknown key is an error), read from YAML, changed by `key=value`.

`recipes/` has a commented recipe for every size; `tahoex1 recipes` prints them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from tahoex1_hf.common.recipes import read_recipe
from tahoex1_hf.data.config import Strict, validated, with_overrides
from tahoex1_hf.training.evaluation import CellTypeConfig, GeneEssentialityConfig

logger = logging.getLogger(__name__)

# Keys of earlier versions, with the values that they had where nothing was said.
_RETIRED = {"peak_tflops": None, "spike_factor": 3.0}


class PretrainConfig(Strict):
    """All that decides the weights that come out of a run, and what is recorded on the way."""

    dataset: str | list[str]
    """Folder or URL of a prepared dataset (`tahoex1 prepare`), or several."""
    output_dir: str
    """Where checkpoints, logs and in the end the model are written. The same command on the same folder goes on."""
    dataset_weights: list[float] | None = None
    """Share of each dataset in every batch, in any unit; without, every cell is seen once per epoch."""
    epoch_cells: int | None = Field(None, gt=0)
    """With `dataset_weights`: cells of an epoch; by default as many as the datasets have together."""
    window: int = Field(32768, gt=0)
    """Cells that are shuffled together after the shards are."""

    model: dict[str, Any] = {}
    """Options of `TahoeX1Config` for a new model; with `init_from`, only those that do not change its weights."""
    init_from: str | None = None
    """Weights to begin with (and tokenizer): folder or Hub id of a converted or an original checkpoint."""
    resume_from: str | None = None
    """Complete checkpoint of another run to go on from (weights, optimizer, schedule, position in the data)."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer; by default that of `init_from`, else one with the dataset's vocabulary."""
    drug_table: str | None = None
    """JSON file with drug -> id, for a new model with a drug token."""
    drug_fingerprints: str | None = None
    """`.npy` file with the drugs' fingerprints, `(drugs, bits)`, from which a new drug table starts."""

    context_length: int = Field(1024, gt=1)
    """Most tokens of a cell."""
    mlm_probability: float | list[float] = 0.5
    """Share of a cell's genes that are to be predicted; of several, one is drawn for every cell."""
    packed: bool = True
    """Put the cells of a micro-batch behind each other in one row, without padding."""
    unexpressed_padding: bool = False
    """Without `packed`: fill cells up to the context with genes that they do not express."""
    pad_to_multiple_of: int | None = Field(None, gt=0)
    """Without `packed`: round padded lengths up, for `compile`."""

    global_batch_size: int = Field(gt=0)
    """Cells of a step, of all processes together."""
    microbatch_size: int | Literal["auto"] = "auto"
    """Cells that one process takes at once; `auto` finds the most that fit into memory. The step stays the same."""
    max_steps: int | None = Field(None, gt=0)
    """Steps to make; or"""
    epochs: float | None = Field(None, gt=0)
    """how often to see each cell."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the weights, the order of the cells, their samples and targets, and dropout."""

    learning_rate: float = Field(gt=0)
    """Highest learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How it goes on after the warm-up."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which it rises from 0."""
    min_learning_rate_fraction: float = Field(0.1, ge=0, le=1)
    """Floor of the cosine, as a share of `learning_rate`."""
    decoupled_weight_decay: float = Field(0.0, ge=0)
    """As in the original: every step, all parameters shrink by this times (learning rate / highest learning rate)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    epsilon: float = Field(1e-8, gt=0)
    """Of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""

    precision: Literal["launcher", "no", "bf16", "fp16"] = "launcher"
    """Mixed precision; `launcher` takes what `accelerate launch` was told (also fp8)."""
    attention: Literal["sdpa", "flash_attention_2", "flex_attention", "eager"] = "sdpa"
    """Backend of attention."""
    activation_checkpointing: bool = False
    """Compute each layer anew in the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile the model."""

    logging_steps: int = Field(10, gt=0)
    """Steps between two lines of the log, whose losses are means over these steps."""
    eval_steps: int | None = Field(None, gt=0)
    """Steps between two evaluations on the validation split; without, only at the end."""
    eval_cells: int = Field(4096, ge=0)
    """Cells of the validation split to evaluate on, the first on disk; 0 for no evaluation."""
    save_steps: int = Field(500, gt=0)
    """Steps between two checkpoints."""
    save_total_limit: int = Field(3, gt=0)
    """Checkpoints that are kept."""
    cell_types: list[CellTypeConfig] = []
    """Cell-type classification with the model in training, after evaluations."""
    gene_essentiality: list[GeneEssentialityConfig] = []
    """Prediction of essential genes with the model in training, after evaluations."""
    report_to: list[Literal["wandb", "trackio", "tensorboard"]] = []
    """Trackers besides the log in `output_dir`."""
    run_name: str | None = None
    """Name of the run for the trackers."""
    baselines: bool = False
    """Print beside the loss what constants would lose: the mean bin, and each gene's mean bin."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, values: Any) -> Any:
        """Accept the keys of earlier versions, which stand in every config.resolved.yaml that they wrote."""
        if not isinstance(values, dict):
            return values
        for key, default in _RETIRED.items():
            if values.get(key, default) != default:
                logger.warning("%s=%s has no effect: this key is gone.", key, values[key])
        return {key: value for key, value in values.items() if key not in _RETIRED}

    @field_validator("precision", mode="before")
    @classmethod
    def _no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads no as false

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"max_steps={self.max_steps}, epochs={self.epochs}: set one of them.")
        if self.epoch_cells is not None and self.dataset_weights is None:
            raise ValueError("epoch_cells needs dataset_weights: without, an epoch is every cell once.")
        if self.init_from is not None and self.resume_from is not None:
            raise ValueError("init_from and resume_from exclude each other: a checkpoint of a run has its weights.")
        if self.microbatch_size != "auto" and self.microbatch_size < 1:
            raise ValueError(f"microbatch_size={self.microbatch_size}: pass a number of cells, or auto.")
        if self.packed and (self.unexpressed_padding or self.pad_to_multiple_of):
            raise ValueError("packed leaves no padding: unexpressed_padding, pad_to_multiple_of need packed=false.")
        if (self.drug_fingerprints is None) != (self.drug_table is None):
            raise ValueError("drug_table and drug_fingerprints go together.")
        return self

    @property
    def datasets(self) -> list[str]:
        """The datasets, also where there is one."""
        return [self.dataset] if isinstance(self.dataset, str) else self.dataset

    def write(self, path: Path) -> None:
        """Write all keys, also those left at their defaults."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def read_pretrain_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a recipe.

    Args:
        path: YAML file, or the name of a recipe of the package.
        overrides: `key=value`, with dots for keys within keys (`model.hidden_size=64`); values are YAML.

    Raises:
        ValueError: for an override that is no `key=value`, and naming every key that is unknown, missing or wrong.
    """
    values = with_overrides(read_recipe(path, "pretrain"), overrides)
    if "max_steps" in [
        o.partition("=")[0] for o in overrides
    ]:  # a recipe's epochs give way to a given number of steps
        values.pop("epochs", None)
    return validated(PretrainConfig, values, str(path))
