# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Collect the facts that a run knows about its model, for a model card.

Facts that no run can know (who the donors are, what the model is good for) are not made up: the card says that they
are not known.
"""

from pathlib import Path
from typing import Any

import yaml

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.training.config import PretrainConfig

FACTS = "card.yaml"
_CITATION = """\
@article{tahoe_x1,
  title   = {Tahoe-x1: Scaling Perturbation-Trained Single-Cell Foundation Models to 3 Billion Parameters},
  author  = {{Tahoe Therapeutics}},
  journal = {bioRxiv},
  year    = {2025},
  doi     = {10.1101/2025.10.23.683759}
}
"""
_MASKS = {
    "full": "every token sees every token",
    "observed_or_self": "genes to predict see the observed genes and themselves, never each other",
}
_METRICS = {
    "eval_masked_mse": ("this model, from the gene's token", "mean squared error"),
    "eval_mvc_mse": ("this model, from the cell embedding", "mean squared error"),
    "eval_spearman": ("this model, within each cell, against raw counts", "Spearman correlation"),
    "mean_bin": ("a constant: the mean {value}", "mean squared error"),
    "mean_bin_of_each_gene": ("a constant per gene: its mean {value}", "mean squared error"),
}

# Facts that are the same for every run.
_ALIKE: dict[str, Any] = {
    "released": False,
    "data_note": "The `manifest.json` of the data (`tahoex1 prepare`) holds the known facts about them; donors, "
    "tissues and assays are not described here.",
    "measured": [],
    "parity": "With checkpoints of the original, the package computes what the original computes (`tests/golden`).",
    "intended_use": ["Research on cells like those of its training data."],
    "out_of_scope": ["Judging Tahoe-x1: the released models saw 266 million cells."],
    "limits": ["Its quality on other tissues, assays and donors than those of its training data is not known."],
    "citation": _CITATION,
    "license": "apache-2.0",
    "tags": ["biology", "single-cell", "transcriptomics", "scRNA-seq", "tahoe-x1"],
}


def card_facts(
    config: PretrainConfig,
    model: TahoeX1Config,
    *,
    value_encoding: str,
    parameters: int,
    steps: int,
    steps_per_epoch: int,
    cells: tuple[int, int],
    results: dict[str, float],
) -> dict[str, Any]:
    """Return the facts of a finished run.

    Args:
        config: Configuration of the run.
        model: Configuration of the model.
        value_encoding: What counts become: `bins`, `log1p` or `raw`.
        parameters: Number of the model's parameters.
        steps: Number of steps that were made.
        steps_per_epoch: Number of steps in an epoch of the data.
        cells: Number of cells in the training split and in the validation split.
        results: Last metrics, and losses of constants.
    """
    name = Path(config.output_dir).name
    start = f" It continues from the weights of {Path(config.init_from).name}." if config.init_from else ""
    results = {key: value for key, value in results.items() if key in _METRICS}
    word = "bin" if value_encoding == "bins" else "value"
    return {
        **_ALIKE,
        "title": f"Tahoe-x1, trained from scratch: {name}" if not start else f"Tahoe-x1, continued: {name}",
        "size": name,
        "summary": "A masked-expression model of the architecture of Tahoe-x1, trained with `tahoex1 pretrain` of "
        f"tahoex1_hf.{start} **It is not the released Tahoe-x1.**",
        "parameters": parameters,
        "shape": _shape(model),
        "context": config.context_length,
        "num_bins": model.num_bins,
        "value_encoding": value_encoding,
        "attention_mask": _MASKS[model.attention_mask_style],
        "drug_token": "Yes: cells can be given the drug that they were treated with."
        if model.num_drugs
        else "This model has none: `drugs=` is an error.",
        "data": [_dataset(config, place, cells) for place in range(len(config.datasets))],
        "recipe": [_stage(config, steps, steps_per_epoch)],
        "recipe_note": _note(config, steps),
        "results": [
            {
                "task": task.format(value=word),
                "metric": metric,
                "value": f"{results[key]:.4f}",
                "source": "run_status.json",
            }
            for key, (task, metric) in _METRICS.items()
            if key in results
        ],
        "results_note": _results_note(config, model, cells[1]) if results else "No held-out cells were evaluated.",
    }


def _shape(model: TahoeX1Config) -> dict[str, Any]:
    names = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
        *("expression_decoder_act", "attention_mask_style", "num_drugs", "drug_token_id"),
    )
    return {name: getattr(model, name) for name in names}


def _dataset(config: PretrainConfig, place: int, cells: tuple[int, int]) -> dict[str, str]:
    location = config.datasets[place]
    number = f"{cells[0]:,} to train on, {cells[1]:,} held out"
    if len(config.datasets) > 1:
        weight = f", share {config.dataset_weights[place]:g}" if config.dataset_weights else ""
        number = f"{number} in all datasets{weight}"
    kind = location if "://" in location else "a dataset prepared with `tahoex1 prepare`"
    return {"name": Path(location).name, "cells": number, "description": kind}


def _stage(config: PretrainConfig, steps: int, steps_per_epoch: int) -> dict[str, Any]:
    warm_up = f", after {config.warmup_fraction:.0%} of warm-up" if config.warmup_fraction else ""
    floor = f" to {config.min_learning_rate_fraction:.0%}" if config.schedule == "cosine" else ""
    return {
        "name": "training",
        "cells_per_step": config.global_batch_size,
        "learning_rate": config.learning_rate,
        "schedule": f"{config.schedule}{floor}{warm_up}",
        "decoupled_weight_decay": config.decoupled_weight_decay,
        "epochs": max(1, round(steps / steps_per_epoch)),
        "context": config.context_length,
    }


def _note(config: PretrainConfig, steps: int) -> str:
    shares = config.mlm_probability if isinstance(config.mlm_probability, list) else [config.mlm_probability]
    hidden = " or ".join(f"{share:.0%}" for share in shares)
    return (
        f"{steps:,} steps; AdamW with betas {config.betas[0]} and {config.betas[1]}, epsilon {config.epsilon:g}, "
        f"gradient norm clipped to {config.max_grad_norm:g}; {hidden} of each cell's genes hidden{_further(config)}; "
        f"seed {config.seed}."
        " All settings are in `config.resolved.yaml` of the run."
    )


def _further(config: PretrainConfig) -> str:
    """Say what is predicted beside hidden genes."""
    share = f"{config.absent_targets:.0%}"
    absent = f"; {share} of the genes in a step are ones that the cell does not express, all of them targets"
    every = "; the cell embedding predicts all genes"
    return (absent if config.absent_targets else "") + (every if config.cell_targets == "all" else "")


def _results_note(config: PretrainConfig, model: TahoeX1Config, held_out: int) -> str:
    scaled = "; targets scaled to [-1, 1]" if model.scale_targets else ""
    number = min(config.eval_cells, held_out)
    return f"On {number:,} held-out cells, with the share of hidden genes of the training{scaled}:"


def write_facts(facts: dict[str, Any], output_dir: Path) -> None:
    """Write the facts of a run beside its model."""
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=120)
    note = "# Facts for the card of this run: complete them, then run python model_cards/render.py\n"
    (output_dir / FACTS).write_text(note + text, encoding="utf-8")
