# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of a run on labelled cells: the model beside classical baselines, its predictions, and pictures.

What a model predicts for a cell is what the model predicted that had not been trained on it.
"""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.files import write_json
from tahoex1_hf.common.plots import draw_confusion, draw_predicted, draw_umaps
from tahoex1_hf.finetuning.baselines import classification_baselines, regression_baselines
from tahoex1_hf.finetuning.metrics import (
    HEADLINE,
    NAMES,
    classification_metrics,
    paired_difference,
    regression_metrics,
    summarize,
)
from tahoex1_hf.finetuning.splits import Split

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

REPORT, TABLE, PREDICTIONS = "report.json", "report.md", "predictions.csv"
CONFUSION, PREDICTED, UMAP = "confusion.png", "predicted.png", "umap_before_after.png"
_FROZEN = ("linear_probe", "head_only")
_MOST_DRAWN = 5000  # cells of the UMAPs


def write_report(
    folder: str | Path,
    *,
    label: str,
    method: str,
    classes: Sequence[str] | None,
    labels: np.ndarray,
    names: Sequence[str] | np.ndarray,
    counts: "csr_matrix",
    splits: Sequence[Split],
    predictions: Sequence[np.ndarray],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    cost: Sequence[Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `predictions.csv`, and the pictures.

    These are `confusion.png` (of numbers, `predicted.png`), and `umap_before_after.png`: the first split's test cells
    as the base and the trained model embed them.

    Args:
        folder: to write into.
        label: column of obs that was learnt.
        method: how, for the table.
        classes: names of the classes; None for numbers.
        labels: `(cells,)` class numbers, or floats.
        names: `(cells,)` of the cells.
        counts: `(cells, genes)` raw counts, for the baselines.
        splits: whose test cells were predicted.
        predictions: of each split, `(test cells, classes)` probabilities or `(test cells,)` numbers.
        before: of each split, `(test cells, width)` embeddings by the base.
        after: the same, by the trained model.
        cost: of each split, `trainable_parameters`, `seconds`, `peak_memory_gb` and the like.
        seed: of baselines and UMAP.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: where no split has test cells, or predictions are not of the test cells.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task = "regression" if classes is None else "classification"
    _check(splits, predictions)
    baselines = (
        regression_baselines(counts, labels, splits, seed)
        if classes is None
        else classification_baselines(counts, labels, splits, seed, len(classes))
    )
    scores = {
        name: summarize([measure(labels[s.test], p, task) for s, p in zip(splits, each, strict=True)])
        for name, each in ({"model": list(predictions)} | baselines).items()
    }
    report = {
        "task": task,
        "label": label,
        "method": method,
        "cells": len(labels),
        "splits": [{part: len(rows) for part, rows in split.parts().items()} for split in splits],
        "classes": None if classes is None else _class_counts(labels, classes),
        "metrics": scores,
        "comparison": compare(scores, task),
        "cost": [dict(each) for each in cost],
    }
    write_json(folder / REPORT, report)
    table = format_report(report)
    (folder / TABLE).write_text(table, encoding="utf-8")
    write_predictions(folder / PREDICTIONS, classes, labels, names, splits, predictions)
    _draw(folder, report, classes, labels, splits, predictions, before, after, seed)
    logger.info("%s\n\nWritten to %s.", table.rstrip(), folder)
    return report


def _check(splits: Sequence[Split], predictions: Sequence[np.ndarray]) -> None:
    for number, (split, each) in enumerate(zip(splits, predictions, strict=True)):
        if len(each) != len(split.test):
            raise ValueError(f"predictions[{number}] are of {len(each)} cells, and its test has {len(split.test)}.")
        if not len(split.test):
            raise ValueError(f"split {number} has no test cells: there is nothing to report.")


def measure(truth: np.ndarray, predictions: np.ndarray, task: str) -> dict[str, float]:
    """Metrics of one split: of `(cells, classes)` probabilities, or `(cells,)` numbers."""
    if task == "regression":
        return regression_metrics(truth, predictions)
    return classification_metrics(truth, predictions.argmax(1), predictions)


def _class_counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


# The verdict ------------------------------------------------------------------------------------------


def compare(scores: Mapping[str, Mapping[str, Any]], task: str) -> dict[str, Any]:
    """Set the model beside the best of the baselines.

    Args:
        scores: from `summarize`, of `"model"` and every baseline.
        task: classification or regression, which decides the metric.

    Returns:
        `metric`; `best_baseline`; `difference`, the interval of model - baseline, split by split; `beats`: whether the
        model is ahead, by more than chance where there are several splits; `text`, which says so.
    """
    metric, higher = HEADLINE[task]
    sign = 1 if higher else -1
    others = {name: each[metric] for name, each in scores.items() if name != "model"}
    best = max(others, key=lambda name: sign * others[name]["mean"])
    ours, theirs = scores["model"][metric], others[best]
    difference = paired_difference(ours["values"], theirs["values"])
    ahead = sign * difference["mean"] > 0
    inner = difference["low"] if higher else difference["high"]  # the end of the interval that is nearer to no gain
    sure = ahead and (inner is None or sign * inner > 0)
    beside = f"{NAMES[metric]} {_number(ours)} beside {_number(theirs)} of {best}, the best baseline"
    if not ahead:
        text = f"The model does not beat the baselines: {beside}."
    elif not sure:
        text = (
            f"The model is ahead of the baselines by no more than chance may do, so it does not beat them: {beside}."
        )
    elif inner is None:
        text = f"The model beats the baselines on one test set: {beside}. How sure that is, several folds would tell."
    else:
        text = f"The model beats the baselines: {beside}."
    return {"metric": metric, "best_baseline": best, "difference": difference, "beats": bool(sure), "text": text}


def _number(summary: Mapping[str, Any] | None) -> str:
    """Mean and interval as text."""
    if summary is None:
        return "-"
    text = f"{summary['mean']:.3f}" if abs(summary["mean"]) < 100 else f"{summary['mean']:.5g}"
    if summary["low"] is None:
        return text
    form = ".3f" if abs(summary["mean"]) < 100 else ".5g"
    return f"{text} [{summary['low']:{form}}, {summary['high']:{form}}]"


def format_report(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    splits, scores = report["splits"], report["metrics"]
    columns = [name for name in NAMES if any(name in each for each in scores.values())]
    lines = [f"# {report['label']}: {report['task']}, {report['method']}", "", report["comparison"]["text"], ""]
    lines.append(f"| | {' | '.join(NAMES[name] for name in columns)} |")
    lines.append("|---" * (1 + len(columns)) + "|")
    for name, each in scores.items():
        title = f"**this model ({report['method']})**" if name == "model" else name
        lines.append(f"| {title} | {' | '.join(_number(each.get(column)) for column in columns)} |")
    several = len(splits) > 1
    tested = sum(split["test"] for split in splits)
    lines += ["", f"{report['cells']} cells, {tested} tested in {len(splits)} split{'s' if several else ''}."]
    if several:
        lines.append(
            "In brackets the 95 % interval of the mean over the splits (Student's t; splits share training cells, so "
            "that it is somewhat too narrow)."
        )
    else:
        lines.append("One split has no interval: set folds to 5 for one.")
    lines.append(
        "The baselines (log-normalised counts, 50 principal components) are fitted on the same training cells."
    )
    if report["cost"]:
        lines += ["", *_costs(report["cost"])]
    pictures = [PREDICTIONS, PREDICTED if report["classes"] is None else CONFUSION, UMAP]
    lines += ["", "Beside this file: " + ", ".join(f"`{name}`" for name in pictures) + "."]
    return "\n".join(lines) + "\n"


def _costs(cost: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = {
        "trainable_parameters": ("Trainable parameters", lambda values: f"{max(values):,}"),
        "seconds": ("Seconds per split", lambda values: f"{np.mean(values):.1f}"),
        "peak_memory_gb": ("Peak memory, GB", lambda values: f"{max(values):.2f}"),
        "steps": ("Steps per split", lambda values: f"{np.mean(values):.0f}"),
    }
    return [
        f"- {title}: {write([each[name] for each in cost])}"
        for name, (title, write) in texts.items()
        if all(each.get(name) is not None for each in cost)
    ]


# Predictions and pictures -----------------------------------------------------------------------------


def write_predictions(
    path: Path,
    classes: Sequence[str] | None,
    labels: np.ndarray,
    names: Sequence[str] | np.ndarray,
    splits: Sequence[Split],
    predictions: Sequence[np.ndarray],
) -> None:
    """Write a line per tested cell: `cell`, `fold` (from 0), `truth`, `prediction`, and `p_<class>` of every class."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "fold", "truth", "prediction", *(f"p_{name}" for name in classes or ())])
        for fold, (split, each) in enumerate(zip(splits, predictions, strict=True)):
            for row, predicted in zip(split.test, each, strict=True):
                if classes is None:
                    writer.writerow([names[row], fold, f"{labels[row]:.9g}", f"{predicted:.9g}"])
                    continue
                chosen = (classes[labels[row]], classes[int(predicted.argmax())])
                writer.writerow([names[row], fold, *chosen, *(f"{chance:.6g}" for chance in predicted)])


def _draw(
    folder: Path,
    report: Mapping[str, Any],
    classes: Sequence[str] | None,
    labels: np.ndarray,
    splits: Sequence[Split],
    predictions: Sequence[np.ndarray],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    seed: int,
) -> None:
    truth = np.concatenate([labels[split.test] for split in splits])
    title = f"{report['label']}, {report['method']}: {len(truth)} cells that were not trained on"
    if classes is None:
        draw_predicted(truth, np.concatenate(predictions), report["label"], title, folder / PREDICTED)
    else:
        chosen = np.concatenate([each.argmax(1) for each in predictions])
        table = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(table, (truth, chosen), 1)
        draw_confusion(table, classes, title, folder / CONFUSION)
    tested = splits[0].test
    rows = np.arange(len(tested))
    if len(rows) > _MOST_DRAWN:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _MOST_DRAWN, replace=False))
    if len(rows) < 4:
        logger.warning("%d test cells are too few for a UMAP: %s is not drawn.", len(rows), UMAP)
        return
    named = labels[tested[rows]] if classes is None else np.array(classes, dtype=str)[labels[tested[rows]]]
    heading = "after (this method leaves the base as it is)" if report["method"] in _FROZEN else "after fine-tuning"
    panels = [("before: the base", before[0][rows]), (heading, after[0][rows])]
    above = f"{report['label']}: embeddings of {len(rows)} test cells{' (fold 0)' if len(splits) > 1 else ''}"
    draw_umaps(panels, named, folder / UMAP, seed, above)


def read_report(folder: str | Path) -> dict[str, Any]:
    """What `write_report` wrote and returned."""
    return dict(json.loads((Path(folder) / REPORT).read_text(encoding="utf-8")))
