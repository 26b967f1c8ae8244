# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of a drug response: the model beside the null and the means, on held-out drugs and contexts."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.finetuning.adapters import add_results
from tahoex1_hf.finetuning.config import DrugResponseConfig
from tahoex1_hf.finetuning.drugs.metrics import NULL, by_unit, change_baselines, score
from tahoex1_hf.finetuning.drugs.screen import Screen
from tahoex1_hf.finetuning.metrics import paired_difference
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.finetuning.tables import beats, markdown, shown
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

_TITLES = {"drug": "Held-out drugs", "context": "Held-out contexts"}
_FALLBACK = {
    "drug": "No training condition has a held-out drug, so that the mean of the drug is the mean of all of them.",
    "context": "No training condition is in a held-out context, so that the mean of the context is the mean of all.",
}


def write_drug_report(
    folder: Path,
    config: DrugResponseConfig,
    screen: Screen,
    tokenizer: TahoeX1Tokenizer,
    splits: dict[str, list[Split]],
    outcomes: dict[str, list[tuple[np.ndarray, dict[str, Any]]]],
) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `predictions.csv` and `predicted_changes.parquet`.

    Args:
        folder: to write into.
        config: of the run.
        screen: the conditions.
        tokenizer: for the names of the genes.
        splits: of the conditions, by what is held out.
        outcomes: of each split, `(test conditions, genes)` changes, and what it cost.

    Returns:
        What `report.json` holds.
    """
    import pandas as pd

    ours = f"Tahoe-x1, {config.method}"
    report: dict[str, Any] = {
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
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    genes = [names[int(token)] for token in screen.genes]
    tables, changes = [], []
    for kind, of_kind in splits.items():
        test = np.concatenate([split.test for split in of_kind])
        predictions = {ours: np.concatenate([found for found, _ in outcomes[kind]])}
        predictions |= _baselines(screen, of_kind)
        found, scores = _scored(screen, kind, test, predictions, ours)
        report["held_out"][kind] = {**found, "cost": [facts for _, facts in outcomes[kind]]}
        about: dict[str, Any] = {"held_out": kind, "context": screen.contexts[test]}
        about |= {"batch": screen.batches[test], "drug": screen.drugs[test]}
        tables.append(pd.DataFrame({**about, "cells": screen.num_cells[test], **scores}))
        changes.append(pd.concat([pd.DataFrame(about), pd.DataFrame(predictions[ours], columns=genes)], axis=1))
    pd.concat(tables).to_csv(folder / "predictions.csv", index=False, float_format="%.6g")
    pd.concat(changes, ignore_index=True).to_parquet(folder / "predicted_changes.parquet", index=False)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = _text(report, ours)
    (folder / "report.md").write_text(text, encoding="utf-8")
    _to_card(folder, report, ours)
    logger.info("%s", text)
    return report


def _baselines(screen: Screen, splits: list[Split]) -> dict[str, np.ndarray]:
    """By baseline, the changes of the test conditions of all splits."""
    found: dict[str, list[np.ndarray]] = {}
    for split in splits:
        known = np.concatenate([split.train, split.validation])
        values = change_baselines(screen.changes, screen.drugs, screen.contexts, known, split.test)
        for name, changes in values.items():
            found.setdefault(name, []).append(changes)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _scored(
    screen: Screen, kind: str, test: np.ndarray, predictions: dict[str, np.ndarray], ours: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics of what was held out, and those of every condition by the name of a column."""
    units = (screen.drugs if kind == "drug" else screen.contexts)[test]
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


def _to_card(folder: Path, report: dict[str, Any], ours: str) -> None:
    means, verdicts = {}, []
    for kind, found in report["held_out"].items():
        means[f"Pearson of the change, held-out {kind}s"] = found["metrics"][ours]["pearson"]["mean"]
        said = beats(found["ours_minus"], ours, "Pearson of the change", higher=True)
        verdicts.append(f"{_TITLES[kind]}:\n\n{said}")
    add_results(folder, means, "\n\n".join(verdicts))


def _text(report: dict[str, Any], ours: str) -> str:
    left_out = ", ".join(f"{number} {reason}" for reason, number in report["left_out"].items() if number)
    parts = [
        "# Drug response",
        f"{report['conditions']} conditions: {report['drugs']} drugs in {report['contexts']} contexts; the change of "
        f"{report['genes']} genes against the control. Left out: {left_out or 'nothing'}.",
    ]
    for kind, found in report["held_out"].items():
        rows = [[name, shown(m["pearson"]), shown(m["mse"])] for name, m in found["metrics"].items()]
        parts += [
            f"## {_TITLES[kind]}",
            f"{found['conditions']} conditions of {found['units']} {kind}s that were not trained on. "
            + _FALLBACK[kind],
            markdown(["", "Pearson of the change", "mean squared error"], rows),
            f"Mean [95 % interval over the held-out {kind}s]. For {NULL} no correlation is defined: 0 is put there.",
            beats(found["ours_minus"], ours, "Pearson of the change", higher=True),
        ]
    return "\n\n".join(parts) + "\n"
