# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of a gene classification: the model beside its baselines, and the predictions gene by gene."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.common.plots import draw_confusion
from tahoex1_hf.finetuning.adapters import add_results
from tahoex1_hf.finetuning.config import GeneClassificationConfig
from tahoex1_hf.finetuning.genes.table import GeneTable
from tahoex1_hf.finetuning.metrics import classification_metrics, paired_difference
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.finetuning.task import Outcome, model_title
from tahoex1_hf.finetuning.verdicts import beats
from tahoex1_hf.runs.report import Report

logger = logging.getLogger(__name__)

NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
}


def sought_class(labels: np.ndarray) -> int:
    """Return the rarer of two classes: AUPRC measures how well its genes are found."""
    return int(np.argmin(np.bincount(labels)))


def gene_metrics(truth: np.ndarray, probabilities: np.ndarray, sought: int | None) -> dict[str, float]:
    """Compute metrics of predicted classes of genes.

    Args:
        truth: Class numbers, shape `(genes,)`.
        probabilities: Probabilities, shape `(genes, classes)`.
        sought: Class that AUPRC is computed for; None for the mean over all classes in `truth`.

    Returns:
        The metrics of `classification_metrics`, and `auprc`, the average precision.
    """
    from sklearn.metrics import average_precision_score

    found = classification_metrics(truth, probabilities.argmax(axis=1), probabilities)
    which = [sought] if sought is not None else list(np.unique(truth))
    areas = [average_precision_score(truth == k, probabilities[:, k]) for k in which if (truth == k).any()]
    if areas:
        found["auprc"] = float(np.mean(areas))
    return found


def write_gene_report(
    folder: Path,
    config: GeneClassificationConfig,
    genes: GeneTable,
    num_cells: int,
    outcomes: Sequence[Outcome],
    predictions: Sequence[np.ndarray],
    scores: Report,
) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `scores.csv`, `scores.png`, `predictions.csv` and `confusion.png`.

    Args:
        folder: Folder to write into.
        config: Configuration of the run.
        genes: Genes with their labels.
        num_cells: Number of cells that the genes were learnt from.
        outcomes: Outcomes of all folds.
        predictions: For each fold, the model's probabilities `(test genes, classes)`.
        scores: Scores of the model and of the baselines.

    Returns:
        Content of `report.json` without the table of scores.
    """
    ours = model_title(config)
    splits = [outcome.fold.split for outcome in outcomes]
    report = _facts(config, genes, outcomes, scores) | {
        "cells": num_cells,
        "cost": [outcome.facts for outcome in outcomes],
    }
    names = [name for name in NAMES if any(name in metrics for metrics in report["metrics"].values())]
    text = _text(report, scores.markdown({name: NAMES[name] for name in names}), ours)
    headline = report["headline"]
    scores.write(folder, report, text, headline, NAMES[headline])
    verdict = beats(report["ours_minus"], ours, NAMES[headline])
    add_results(folder, scores.card_rows(ours, NAMES), verdict)
    _write_predictions(folder / "predictions.csv", genes, splits, predictions)
    truth = genes.labels[np.concatenate([split.test for split in splits])]
    confused = np.zeros((len(genes.classes),) * 2, dtype=np.int64)
    np.add.at(confused, (truth, np.concatenate(predictions).argmax(axis=1)), 1)
    title = f"{config.label}: genes not trained on"
    draw_confusion(confused, genes.classes, title, folder / "confusion.png", "genes")
    logger.info("%s", text)
    return report


def _facts(
    config: GeneClassificationConfig, genes: GeneTable, outcomes: Sequence[Outcome], scores: Report
) -> dict[str, Any]:
    """Return the metrics of all methods, the differences of ours from each, and facts about the training data."""
    ours, two = model_title(config), len(genes.classes) == 2
    headline = "auroc" if two else "macro_f1"
    metrics = scores.summaries()
    values = {name: each[headline]["values"] for name, each in metrics.items() if headline in each}
    return {
        "task": config.task,
        "label": config.label,
        "method": config.method,
        "classes": {c: int((genes.labels == n).sum()) for n, c in enumerate(genes.classes)},
        "auprc_of": genes.classes[sought_class(genes.labels)] if two else "the mean over the classes",
        "genes": len(genes),
        "genes_left_out": genes.left_out,
        "folds": len(outcomes),
        "group": config.group,
        "headline": headline,
        "metrics": metrics,
        "ours_minus": {
            name: paired_difference(values[ours], each)
            for name, each in values.items()
            if name != ours and len(each) == len(values.get(ours, [])) == len(outcomes)
        },
    }


def _text(report: dict[str, Any], table: str, ours: str) -> str:
    left_out = ", ".join(f"{number} {reason}" for reason, number in report["genes_left_out"].items() if number)
    classes = ", ".join(f"{name} ({number})" for name, number in report["classes"].items())
    together = f", those of a {report['group']} together" if report["group"] else ""
    title = NAMES[report["headline"]]
    return (
        "\n\n".join(
            [
                f"# Gene classification: {report['label']}",
                f"{report['genes']} genes of {report['cells']} cells; classes: {classes}. "
                f"Left out: {left_out or 'none'}. Tested on genes that were not trained on, {report['folds']} "
                f"{'folds' if report['folds'] > 1 else 'fold'}{together}. AUPRC is of {report['auprc_of']}.",
                table,
                "Mean [95 % interval over the folds].",
                beats(report["ours_minus"], ours, title),
            ]
        )
        + "\n"
    )


def _write_predictions(path: Path, genes: GeneTable, splits: Sequence[Split], chances: Sequence[np.ndarray]) -> None:
    import pandas as pd

    frames = []
    for fold, (split, probabilities) in enumerate(zip(splits, chances, strict=True)):
        columns: dict[str, Any] = {
            "gene": genes.names[split.test],
            "fold": fold,
            "cells": genes.num_cells[split.test],
            "label": np.array(genes.classes)[genes.labels[split.test]],
            "predicted": np.array(genes.classes)[probabilities.argmax(axis=1)],
        }
        columns |= {f"probability_{name}": probabilities[:, n] for n, name in enumerate(genes.classes)}
        frames.append(pd.DataFrame(columns))
    pd.concat(frames).to_csv(path, index=False, float_format="%.6g")
