# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of a drug response: the model beside the null and the means, on held-out drugs and contexts."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.finetuning.adapters import add_results
from tahoex1_hf.finetuning.config import DrugResponseConfig
from tahoex1_hf.finetuning.drugs.metrics import NULL, by_unit, score
from tahoex1_hf.finetuning.drugs.screen import Screen
from tahoex1_hf.finetuning.metrics import paired_difference
from tahoex1_hf.finetuning.task import Outcome, model_title
from tahoex1_hf.finetuning.verdicts import beats
from tahoex1_hf.runs.report import Report
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

_TITLES = {"drug": "Held-out drugs", "context": "Held-out contexts"}
METRICS = {"pearson": "Pearson of the change", "mse": "mean squared error"}
_FALLBACK = {
    "drug": "No training condition has a held-out drug, so that the mean of the drug is the mean of all of them.",
    "context": "No training condition is in a held-out context, so that the mean of the context is the mean of all.",
}


def write_drug_report(
    folder: Path,
    config: DrugResponseConfig,
    screen: Screen,
    tokenizer: TahoeX1Tokenizer,
    outcomes: Sequence[Outcome],
    predictions: Mapping[str, Sequence[np.ndarray]],
    scores: Report,
) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `scores.csv`, `scores.png`, `predictions.csv`, `predicted_changes.parquet`.

    Args:
        folder: Folder to write into.
        config: Configuration of the run.
        screen: Conditions of the screen.
        tokenizer: Tokenizer, for the names of the genes.
        outcomes: Outcomes of all folds.
        predictions: For each method and fold, changes `(test conditions, genes)`.
        scores: Scores of the model and of the baselines.

    Returns:
        Content of `report.json` without the table of scores.
    """
    import pandas as pd

    ours, report = model_title(config), _facts(config, screen)
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    genes = [names[int(token)] for token in screen.genes]
    tables, changes = [], []
    for kind in config.held_out:
        chosen = [place for place, outcome in enumerate(outcomes) if outcome.fold.part == f"held-out {kind}"]
        test = np.concatenate([outcomes[place].fold.split.test for place in chosen])
        together = {name: np.concatenate([each[place] for place in chosen]) for name, each in predictions.items()}
        found, columns = _scored(screen, screen.units(kind)[test], test, together, ours)
        report["held_out"][kind] = {**found, "cost": [outcomes[place].facts for place in chosen]}
        about: dict[str, Any] = {"held_out": kind, "context": screen.contexts[test]}
        about |= {"batch": screen.batches[test], "drug": screen.drugs[test]}
        tables.append(pd.DataFrame({**about, "cells": screen.num_cells[test], **columns}))
        changes.append(pd.concat([pd.DataFrame(about), pd.DataFrame(together[ours], columns=genes)], axis=1))
    pd.concat(tables).to_csv(folder / "predictions.csv", index=False, float_format="%.6g")
    pd.concat(changes, ignore_index=True).to_parquet(folder / "predicted_changes.parquet", index=False)
    text = _text(report, scores, ours)
    scores.write(folder, report, text, "pearson", METRICS["pearson"])
    means, verdicts = {}, []
    for kind, found in report["held_out"].items():
        means[f"{METRICS['pearson']}, held-out {kind}s"] = found["metrics"][ours]["pearson"]["mean"]
        verdicts.append(f"{_TITLES[kind]}:\n\n{beats(found['ours_minus'], ours, METRICS['pearson'])}")
    add_results(folder, means, "\n\n".join(verdicts))
    logger.info("%s", text)
    return report


def _facts(config: DrugResponseConfig, screen: Screen) -> dict[str, Any]:
    return {
        "task": config.task,
        "method": config.method,
        "conditions": len(screen),
        "drugs": len(set(screen.drugs)),
        "contexts": len(set(screen.contexts)),
        "genes": len(screen.genes),
        "left_out": screen.left_out,
        "folds": config.folds,
        "headline": "pearson",
        "held_out": {},
    }


def _scored(
    screen: Screen, units: np.ndarray, test: np.ndarray, predictions: dict[str, np.ndarray], ours: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the metrics of the held-out drugs or contexts, and every condition's metrics by column name."""
    summary, each = score(predictions, screen.changes[test], units)
    pearson = {name: by_unit(values["pearson"], units) for name, values in each.items()}
    found = {
        "conditions": len(test),
        "units": len(set(units)),
        "metrics": summary,
        "ours_minus": {
            name: paired_difference(pearson[ours], values) for name, values in pearson.items() if name != ours
        },
    }
    return found, {f"{metric} of {name}": v for name, metrics in each.items() for metric, v in metrics.items()}


def _text(report: dict[str, Any], scores: Report, ours: str) -> str:
    left_out = ", ".join(f"{number} {reason}" for reason, number in report["left_out"].items() if number)
    parts = [
        "# Drug response",
        f"{report['conditions']} conditions: {report['drugs']} drugs in {report['contexts']} contexts; the change of "
        f"{report['genes']} genes against the control. Left out: {left_out or 'nothing'}.",
    ]
    for kind, found in report["held_out"].items():
        parts += [
            f"## {_TITLES[kind]}",
            f"{found['conditions']} conditions of {found['units']} {kind}s that were not trained on. "
            + _FALLBACK[kind],
            scores.markdown(METRICS, split=f"held-out {kind}"),
            f"Mean [95 % interval over the held-out {kind}s]. For {NULL} no correlation is defined; it is given as 0.",
            beats(found["ours_minus"], ours, METRICS["pearson"]),
        ]
    return "\n\n".join(parts) + "\n"
