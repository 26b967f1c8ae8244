# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of a run on labelled cells: the model beside classical baselines, its predictions, and pictures.

A cell's prediction comes from the model that was not trained on the cell.
"""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.common.plots import draw_confusion, draw_predicted, draw_umaps
from tahoex1_hf.finetuning.metrics import HEADLINE, NAMES, paired_difference
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.runs.report import REPORT, Report, format_value

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.csv"
CONFUSION, PREDICTED, UMAP = "confusion.png", "predicted.png", "umap_before_after.png"
_FROZEN = ("linear_probe", "head_only")
_MOST_DRAWN = 5000  # most cells in a UMAP


@dataclass(frozen=True, eq=False)
class CellResults:
    """Results of a run on labelled cells.

    Attributes:
        label: Column of obs with the labels.
        method: Method of fine-tuning.
        classes: Names of the classes; None for numbers.
        labels: Class numbers, or floats, shape `(cells,)`.
        names: Names of the cells, shape `(cells,)`.
        splits: Splits whose test cells were predicted.
        predictions: For each split, probabilities `(test cells, classes)` or numbers `(test cells,)`.
        before: For each split, embeddings by the base, shape `(test cells, width)`.
        after: For each split, embeddings by the trained model, of the same shape.
        cost: For each split, `trainable_parameters`, `seconds`, `peak_memory_gb` and the like.
        seed: Seed of the UMAPs.
    """

    label: str
    method: str
    classes: Sequence[str] | None
    labels: np.ndarray
    names: Sequence[str] | np.ndarray
    splits: Sequence[Split]
    predictions: Sequence[np.ndarray]
    before: Sequence[np.ndarray]
    after: Sequence[np.ndarray]
    cost: Sequence[Mapping[str, Any]]
    seed: int

    @property
    def task(self) -> str:
        """Name of the task."""
        return "regression" if self.classes is None else "classification"

    def check(self) -> None:
        """Raise ValueError where there are no test cells, or the predictions do not belong to them."""
        for number, (split, each) in enumerate(zip(self.splits, self.predictions, strict=True)):
            if len(each) != len(split.test):
                raise ValueError(
                    f"predictions[{number}] are of {len(each)} cells, and its test has {len(split.test)}."
                )
            if not len(split.test):
                raise ValueError(f"split {number} has no test cells: there is nothing to report.")


def write_cell_report(folder: Path, results: CellResults, scores: Report, ours: str) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `scores.csv`, `predictions.csv`, and the pictures.

    These are `scores.png`, `confusion.png` (for numbers, `predicted.png`), and `umap_before_after.png`: the first
    split's test cells as the base and the trained model embed them.

    Args:
        folder: Folder to write into.
        results: Predictions of the model.
        scores: Scores of the model and of the baselines.
        ours: Name of the model in `scores`.

    Returns:
        Content of `report.json`.

    Raises:
        ValueError: If no split has test cells, or predictions are not of the test cells.
    """
    results.check()
    metrics = {"model" if name == ours else name: each for name, each in scores.summaries().items()}
    report = {
        "task": results.task,
        "label": results.label,
        "method": results.method,
        "cells": len(results.labels),
        "splits": [{part: len(rows) for part, rows in split.parts().items()} for split in results.splits],
        "classes": None if results.classes is None else _class_counts(results.labels, results.classes),
        "metrics": metrics,
        "comparison": compare(metrics, results.task),
        "cost": [dict(each) for each in results.cost],
    }
    table = scores.markdown(NAMES, {ours: f"**this model ({results.method})**"})
    text = format_report(report, table)
    headline = HEADLINE[results.task][0]
    scores.write(folder, report, text, headline, NAMES[headline])
    write_predictions(folder / PREDICTIONS, results)
    _draw(folder, results)
    logger.info("%s\n\nWritten to %s.", text.rstrip(), folder)
    return read_report(folder)


def _class_counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


# The verdict ------------------------------------------------------------------------------------------


def compare(scores: Mapping[str, Mapping[str, Any]], task: str) -> dict[str, Any]:
    """Compare the model with the best of the baselines.

    Args:
        scores: Summaries of `"model"` and every baseline, see `Report.summaries`.
        task: Classification or regression, which decides the metric.

    Returns:
        `metric`; `best_baseline`; `difference`, the interval of model - baseline, split by split; `beats`, whether the
        model is ahead, by more than chance where there are several splits; `text`, the same in words.
    """
    metric, higher = HEADLINE[task]
    sign = 1 if higher else -1
    others = {name: each[metric] for name, each in scores.items() if name != "model"}
    best = max(others, key=lambda name: sign * others[name]["mean"])
    ours, theirs = scores["model"][metric], others[best]
    difference = paired_difference(ours["values"], theirs["values"])
    ahead = sign * difference["mean"] > 0
    inner = difference["low"] if higher else difference["high"]  # the end of the interval with the smaller gain
    sure = ahead and (inner is None or sign * inner > 0)
    beside = f"{NAMES[metric]} {_shown(ours)} beside {_shown(theirs)} of {best}, the best baseline"
    if not ahead:
        text = f"The model does not beat the baselines: {beside}."
    elif not sure:
        text = f"The model is ahead by no more than chance may explain, so it does not beat the baselines: {beside}."
    elif inner is None:
        text = f"The model beats the baselines on one test set: {beside}. Several folds would show how sure that is."
    else:
        text = f"The model beats the baselines: {beside}."
    return {"metric": metric, "best_baseline": best, "difference": difference, "beats": bool(sure), "text": text}


def _shown(summary: Mapping[str, Any]) -> str:
    return format_value(summary["mean"], summary["low"], summary["high"])


def format_report(report: Mapping[str, Any], table: str) -> str:
    """Return the report as Markdown.

    Args:
        report: Content of `report.json`.
        table: Table of the scores.
    """
    splits = report["splits"]
    several = len(splits) > 1
    tested = sum(split["test"] for split in splits)
    lines = [f"# {report['label']}: {report['task']}, {report['method']}", "", report["comparison"]["text"], "", table]
    lines += ["", f"{report['cells']} cells, {tested} tested in {len(splits)} split{'s' if several else ''}."]
    if several:
        lines.append(
            "In brackets: the 95 % interval of the mean over the splits (Student's t; it is somewhat too narrow, "
            "since splits share training cells)."
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


def write_predictions(path: Path, results: CellResults) -> None:
    """Write a line per tested cell: `cell`, `fold` (from 0), `truth`, `prediction`, and `p_<class>` of every class."""
    classes, labels, names = results.classes, results.labels, results.names
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "fold", "truth", "prediction", *(f"p_{name}" for name in classes or ())])
        for fold, (split, each) in enumerate(zip(results.splits, results.predictions, strict=True)):
            for row, predicted in zip(split.test, each, strict=True):
                if classes is None:
                    writer.writerow([names[row], fold, f"{labels[row]:.9g}", f"{predicted:.9g}"])
                    continue
                chosen = (classes[labels[row]], classes[int(predicted.argmax())])
                writer.writerow([names[row], fold, *chosen, *(f"{chance:.6g}" for chance in predicted)])


def _draw(folder: Path, results: CellResults) -> None:
    classes, labels, splits = results.classes, results.labels, results.splits
    truth = np.concatenate([labels[split.test] for split in splits])
    title = f"{results.label}, {results.method}: {len(truth)} cells that were not trained on"
    if classes is None:
        draw_predicted(truth, np.concatenate(results.predictions), results.label, title, folder / PREDICTED)
    else:
        chosen = np.concatenate([each.argmax(1) for each in results.predictions])
        table = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(table, (truth, chosen), 1)
        draw_confusion(table, classes, title, folder / CONFUSION)
    tested = splits[0].test
    rows = np.arange(len(tested))
    if len(rows) > _MOST_DRAWN:
        rows = np.sort(np.random.default_rng(results.seed).choice(rows, _MOST_DRAWN, replace=False))
    if len(rows) < 4:
        logger.warning("%d test cells are too few for a UMAP: %s is not drawn.", len(rows), UMAP)
        return
    named = labels[tested[rows]] if classes is None else np.array(classes, dtype=str)[labels[tested[rows]]]
    heading = "after (this method leaves the base as it is)" if results.method in _FROZEN else "after fine-tuning"
    panels = [("before: the base", results.before[0][rows]), (heading, results.after[0][rows])]
    above = f"{results.label}: embeddings of {len(rows)} test cells{' (fold 0)' if len(splits) > 1 else ''}"
    draw_umaps(panels, named, folder / UMAP, results.seed, above)


def read_report(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's `report.json`."""
    return dict(json.loads((Path(folder) / REPORT).read_text(encoding="utf-8")))
