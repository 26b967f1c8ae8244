# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of a gene classification: the model beside its baselines, and the predictions gene by gene."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from tahoex1_hf.common.plots import draw_confusion
from tahoex1_hf.finetuning.adapters import add_results
from tahoex1_hf.finetuning.cells.labelled import LabelledCells
from tahoex1_hf.finetuning.config import GeneClassificationConfig
from tahoex1_hf.finetuning.genes.baselines import expression_features, gene_baselines
from tahoex1_hf.finetuning.genes.table import GeneTable
from tahoex1_hf.finetuning.metrics import classification_metrics, paired_difference, summarize
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.finetuning.tables import beats, markdown, shown

logger = logging.getLogger(__name__)

NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
}


def sought_class(labels: np.ndarray) -> int:
    """Of two classes the rarer one, whose genes are sought; the area under the precision-recall curve is its."""
    return int(np.argmin(np.bincount(labels)))


def gene_metrics(truth: np.ndarray, probabilities: np.ndarray, sought: int | None) -> dict[str, float]:
    """Metrics of predicted classes of genes.

    Args:
        truth: `(genes,)` class numbers.
        probabilities: `(genes, classes)`.
        sought: the class that AUPRC is about; None for the mean over all classes that there are.

    Returns:
        Those of `classification_metrics`, and `auprc`, the average precision.
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
    cells: LabelledCells,
    genes: GeneTable,
    splits: list[Split],
    outcomes: list[tuple[np.ndarray, dict[str, Any]]],
    frozen: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `predictions.csv` and `confusion.png`.

    Args:
        folder: to write into.
        config: of the run.
        cells: of the run.
        genes: with their labels.
        splits: of the genes.
        outcomes: of each split, `(test genes, classes)` mean logits, and what it cost.
        frozen: name -> `(genes, width)` embeddings of the base, for the baselines.

    Returns:
        What `report.json` holds.
    """
    features = {**frozen, "mean expression and fraction of cells": expression_features(cells, genes.tokens)}
    ours = f"Tahoe-x1, {config.method}"
    predictions = {ours: [softmax(logits.astype(np.float64), axis=1) for logits, _ in outcomes]}
    predictions |= gene_baselines(features, genes.labels, len(genes.classes), splits, config.seed)
    report = _report(config, genes, splits, predictions, ours)
    report |= {"cells": len(cells), "cost": [facts for _, facts in outcomes]}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = _text(report, ours)
    (folder / "report.md").write_text(text, encoding="utf-8")
    means = {NAMES[name]: value["mean"] for name, value in report["metrics"][ours].items()}
    add_results(folder, means, beats(report["ours_minus"], ours, NAMES[report["headline"]], higher=True))
    _predictions(folder / "predictions.csv", genes, splits, predictions[ours])
    truth = genes.labels[np.concatenate([split.test for split in splits])]
    confused = np.zeros((len(genes.classes),) * 2, dtype=np.int64)
    np.add.at(confused, (truth, np.concatenate(predictions[ours]).argmax(axis=1)), 1)
    draw_confusion(confused, genes.classes, f"{config.label}: genes not trained on", folder / "confusion.png", "genes")
    logger.info("%s", text)
    return report


def _report(
    config: GeneClassificationConfig,
    genes: GeneTable,
    splits: list[Split],
    predictions: dict[str, list[np.ndarray]],
    ours: str,
) -> dict[str, Any]:
    """Metrics of all models, and how ours differs from each."""
    two = len(genes.classes) == 2
    sought = sought_class(genes.labels) if two else None
    headline = "auroc" if two else "macro_f1"
    of_folds = {
        name: [gene_metrics(genes.labels[s.test], p, sought) for s, p in zip(splits, chances, strict=True)]
        for name, chances in predictions.items()
    }
    return {
        "task": config.task,
        "label": config.label,
        "method": config.method,
        "classes": {c: int((genes.labels == n).sum()) for n, c in enumerate(genes.classes)},
        "auprc_of": genes.classes[sought] if sought is not None else "the mean over the classes",
        "genes": len(genes),
        "genes_left_out": genes.left_out,
        "folds": len(splits),
        "group": config.group,
        "headline": headline,
        "metrics": {name: summarize(values) for name, values in of_folds.items()},
        "ours_minus": {
            name: paired_difference([m[headline] for m in of_folds[ours]], [m[headline] for m in values])
            for name, values in of_folds.items()
            if name != ours and all(headline in m for m in [*values, *of_folds[ours]])
        },
    }


def _text(report: dict[str, Any], ours: str) -> str:
    left_out = ", ".join(f"{number} {reason}" for reason, number in report["genes_left_out"].items() if number)
    classes = ", ".join(f"{name} ({number})" for name, number in report["classes"].items())
    names = [name for name in NAMES if any(name in metrics for metrics in report["metrics"].values())]
    rows = [[name, *(shown(metrics.get(metric)) for metric in names)] for name, metrics in report["metrics"].items()]
    together = f", those of a {report['group']} together" if report["group"] else ""
    title = NAMES[report["headline"]]
    return (
        "\n\n".join(
            [
                f"# Gene classification: {report['label']}",
                f"{report['genes']} genes of {report['cells']} cells; classes: {classes}. "
                f"Left out: {left_out or 'none'}. Tested on genes that were not trained on, {report['folds']} "
                f"{'folds' if report['folds'] > 1 else 'fold'}{together}. AUPRC is of {report['auprc_of']}.",
                markdown(["", *(NAMES[name] for name in names)], rows),
                "Mean [95 % interval over the folds].",
                beats(report["ours_minus"], ours, title, higher=True),
            ]
        )
        + "\n"
    )


def _predictions(path: Path, genes: GeneTable, splits: list[Split], chances: list[np.ndarray]) -> None:
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
