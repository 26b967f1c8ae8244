# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of pretraining: typed, strict (an unknown key is an error), read from YAML, changed by `key=value`.

`recipes/` has a commented recipe for every size; `tahoex1 recipes` prints them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tahoex1_hf.common.recipes import read_recipe
from tahoex1_hf.data.config import Strict, validated, with_overrides
from tahoex1_hf.training.evaluation import CellTypeConfig, GeneEssentialityConfig

logger = logging.getLogger(__name__)

# Keys of earlier versions, with their former defaults.
_RETIRED = {"peak_tflops": None, "spike_factor": 3.0}


class PretrainConfig(Strict):
    """The settings of a run: everything that decides its weights, and the records that it keeps."""

    dataset: str | list[str]
    """Folder or URL of a prepared dataset (`tahoex1 prepare`), or several."""
    output_dir: str
    """Folder for checkpoints, logs and the final model. The same command on the same folder resumes the run."""
    dataset_weights: list[float] | None = None
    """Share of each dataset in every batch, in any unit; by default every cell is seen once per epoch."""
    epoch_cells: int | None = Field(None, gt=0)
    """Number of cells in an epoch with `dataset_weights`; by default as many as the datasets have together."""
    window: int = Field(32768, gt=0)
    """Number of cells that are shuffled together, after the shards have been."""

    model: dict[str, Any] = {}
    """Options of `TahoeX1Config` for a new model; with `init_from`, those that differ must not change its weights."""
    init_from: str | None = None
    """Initial weights and their tokenizer: folder or Hub id of a converted or an original checkpoint."""
    resume_from: str | None = None
    """Checkpoint of another run to resume from, with its weights, optimizer, schedule and position in the data."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer; by default that of `init_from`, else one with the dataset's vocabulary."""
    drug_table: str | None = None
    """JSON file with the id of each drug, for a new model with a drug token."""
    drug_fingerprints: str | None = None
    """`.npy` file with the drugs' fingerprints, `(drugs, bits)`, from which a new drug table starts."""

    unknown_drugs: Literal["pad", "error"] = "pad"
    """Rule for drugs that the drug table lacks, such as the solvent of Tahoe-100M: their cells count as cells without
    a drug, as in the original, with one warning that lists them; or they are refused."""

    value_encoding: Literal["bins", "log1p", "raw"] | None = None
    """Values that counts become, of a new tokenizer: quantile bins (by default, as in the original), logarithms of
    counts per 10,000, or counts. A tokenizer that is given must have the same."""
    context_length: int = Field(1024, gt=1)
    """Largest number of tokens of a cell."""
    mlm_probability: float | list[float] = 0.5
    """Share of a cell's genes to predict; of several, one is chosen at random for every cell."""
    packed: bool = True
    """Whether the cells of a microbatch follow one another in one row, without padding."""
    unexpressed_padding: bool = False
    """Whether cells are filled up to the context length with genes that they do not express; needs `packed: false`."""
    absent_targets: float = Field(0.0, ge=0, lt=1)
    """Share of a cell's genes in a step that it does not express: targets with the value 0, beside those of its own
    genes that `mlm_probability` hides. A cell sees only genes that it expresses, as when it is embedded."""
    cell_targets: Literal["hidden", "all"] = "hidden"
    """Genes that are predicted from the cell embedding: those that are hidden, as in the original, or all genes of the
    vocabulary, expressed or not. `all` needs an unsharded model."""
    pad_to_multiple_of: int | None = Field(None, gt=0)
    """Number whose next multiple padded lengths are rounded up to, for `compile`; needs `packed: false`."""

    global_batch_size: int = Field(gt=0)
    """Number of cells in a step, over all processes."""
    microbatch_size: int | Literal["auto"] = "auto"
    """Number of cells that a process computes at once; `auto` finds the largest that fits into memory, and keeps it
    for this run. It changes results by rounding errors only."""
    max_steps: int | None = Field(None, gt=0)
    """Number of steps. Set this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Number of times that each cell is seen. Set this or `max_steps`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of new weights, the order of the cells, their sampled genes and targets, and dropout."""

    learning_rate: float = Field(gt=0)
    """Largest learning rate."""
    schedule: Literal["cosine", "constant", "stable"] = "cosine"
    """Course of the learning rate after the warm-up. `stable` stays at the largest, and falls to the lowest in the
    last `decay_fraction` of the steps: a checkpoint before its fall can be gone on from with more (`resume_from`)."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    min_learning_rate_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of the cosine, or of the fall, as a share of `learning_rate`."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of the steps in which the learning rate falls, with `schedule: stable`."""
    decoupled_weight_decay: float = Field(0.0, ge=0)
    """Share by which all parameters shrink in a step, times learning rate / `learning_rate`, as in the original."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    epsilon: float = Field(1e-8, gt=0)
    """Number that AdamW adds to its denominator."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which larger gradients are scaled down."""

    precision: Literal["launcher", "no", "bf16", "fp16"] = "launcher"
    """Mixed precision; `launcher` takes the setting of `accelerate launch` (also fp8)."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = "sdpa"
    """Implementation of attention. `auto` is `sdpa`, which on packed rows takes torch's own flash attention on GPUs
    and a call for each length on CPUs; or `flex_attention` where `compile` would need a mask of all pairs of tokens.
    What it became is in `config.resolved.yaml`, and the same command resumes with it."""
    activation_checkpointing: bool = False
    """Whether each layer is computed again in the backward pass, which takes less memory and a third more time."""
    compile: bool | Literal["layers", "auto"] = False
    """Whether the model is compiled with `torch.compile`: `true` for the whole, `layers` for each layer, which is done
    in seconds instead of minutes. `auto` is `layers` on GPUs where torch's own flash attention serves, on packed rows
    and unsharded models, and otherwise `false`; like that of `attention`, the choice is recorded and kept."""

    logging_steps: int = Field(10, gt=0)
    """Number of steps between two lines of the log, whose losses are means over these steps."""
    eval_steps: int | None = Field(None, gt=0)
    """Number of steps between two evaluations on the validation split; by default only the last step has one."""
    eval_cells: int = Field(4096, ge=0)
    """Number of cells to evaluate on, the first of the validation split; 0 for no evaluation."""
    save_steps: int = Field(500, gt=0)
    """Number of steps between two checkpoints."""
    save_total_limit: int = Field(3, gt=0)
    """Number of checkpoints that are kept."""
    background_saves: bool = False
    """Whether the shards of a checkpoint (FSDP2) are written while the training goes on: it waits only until they are
    copied into the main memory, which must have room for them. A checkpoint counts from when all of it is written."""
    cell_types: list[CellTypeConfig] = []
    """Cell-type classifications that are run after evaluations, with the model as it is then."""
    gene_essentiality: list[GeneEssentialityConfig] = []
    """Predictions of essential genes that are run after evaluations, with the model as it is then."""
    report_to: list[Literal["wandb", "trackio", "tensorboard"]] = []
    """Trackers that get the log too, beside `output_dir`."""
    run_name: str | None = None
    """Name of the run for the trackers."""
    baselines: bool = False
    """Whether the losses of two constants are reported too: the mean bin, and each gene's mean bin."""

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
    def _read_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads no as false

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"max_steps={self.max_steps}, epochs={self.epochs}: set one of them.")
        if self.epoch_cells is not None and self.dataset_weights is None:
            raise ValueError("epoch_cells needs dataset_weights: without it, an epoch is every cell once.")
        if self.init_from is not None and self.resume_from is not None:
            raise ValueError("init_from and resume_from exclude each other: a checkpoint of a run has its weights.")
        if self.microbatch_size != "auto" and self.microbatch_size < 1:
            raise ValueError(f"microbatch_size={self.microbatch_size}: pass a number of cells, or auto.")
        if self.packed and (self.unexpressed_padding or self.pad_to_multiple_of):
            raise ValueError("packed leaves no padding: unexpressed_padding and pad_to_multiple_of need packed=false.")
        if self.absent_targets and self.unexpressed_padding:
            raise ValueError(
                "absent_targets and unexpressed_padding both add genes that a cell does not express: set one."
            )
        if (self.drug_fingerprints is None) != (self.drug_table is None):
            raise ValueError("drug_table and drug_fingerprints belong together: set both or neither.")
        return self

    @property
    def datasets(self) -> list[str]:
        """Locations of the datasets, as a list even for a single one."""
        return [self.dataset] if isinstance(self.dataset, str) else self.dataset


def read_pretrain_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a recipe.

    Args:
        path: YAML file, or the name of a recipe of the package.
        overrides: `key=value`, with dots for keys within keys (`model.hidden_size=64`); values are YAML.

    Raises:
        ValueError: If an override is not `key=value`, or a key is unknown, missing or wrong; all such keys are named.
    """
    values = with_overrides(read_recipe(path, "pretrain"), overrides)
    # A recipe's epochs give way to a given number of steps.
    if "max_steps" in [override.partition("=")[0] for override in overrides]:
        values.pop("epochs", None)
    return validated(PretrainConfig, values, str(path))
