# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of an annotation: every method's scores, what may be expected of each class, and figures."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.annotation.labels import UNKNOWN_NAME
from tahoex1_hf.annotation.methods import EMBEDDING, LOGISTIC, PCA
from tahoex1_hf.annotation.transfer import LabelledReference, ScoredQuery, TransferOptions, Transferred
from tahoex1_hf.annotation.validation import Expected
from tahoex1_hf.benchmarking.resampling import compare
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.plots import draw_confusion, draw_joint_umap
from tahoex1_hf.runs.report import Report, Score, format_value, interval, markdown_table

HEADLINE = "accuracy"
TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "assigned": "share not unknown",
    "accuracy_assigned": "accuracy of these",
    "overconfidence": "mean probability - accuracy",
    "left_out_auroc": "AUROC of a class left out",
    "novel_unknown": "share of novel cells unknown",
    "novel_auroc": "AUROC of novel cells",
}
CONFUSION, EXPECTED, UMAP = "confusion", "expected.csv", "umap.png"
_MOST_DRAWN = 5000  # cells of either side in the UMAP


def make_report(found: Transferred, dataset: str) -> Report:
    """Return the table of all methods' scores."""
    report = Report("annotate", dataset)
    for name, measurements in found.scores.items():
        for each in measurements:
            place = (report.task, dataset, each.split, None, name, each.metric)
            seconds = sum(each.seconds) / len(each.seconds) if each.seconds else None
            report.scores.append(Score(*place, each.value, *each.bounds(), sum(each.numbers), seconds))
        if areas := found.left_out[name]:
            mean = interval(areas)
            place = (report.task, dataset, found.split, None, name, "left_out_auroc")
            # Few classes make wide intervals, which end where areas do.
            low, high = (None if end is None else min(1.0, max(0.0, end)) for end in (mean["low"], mean["high"]))
            report.scores.append(Score(*place, mean["mean"], low, high, len(areas)))
    return report


def verdict(found: Transferred, split: str, baseline: str) -> str:
    """Return a sentence that compares the embeddings with another method on the same cells."""
    ours, theirs = (
        next(m for m in found.scores[name] if (m.split, m.metric) == (split, HEADLINE))
        for name in (EMBEDDING, baseline)
    )
    result = compare(ours, theirs)
    return (
        f"{split}: accuracy {ours.value:.3f} by embeddings, **{result['verdict']}** against {baseline}, "
        f"{theirs.value:.3f}: {result['difference']:+.3f} [{result['lower']:+.3f}, {result['upper']:+.3f}]."
    )


def verdicts(found: Transferred) -> list[str]:
    """Return the verdicts on each split that was scored, one for each method that reads counts."""
    there = [m.split for m in found.scores[EMBEDDING] if m.metric == HEADLINE]
    baselines = [name for name in (PCA, LOGISTIC) if name in found.scores]
    return [verdict(found, split, baseline) for split in there for baseline in baselines]


def confusion(classes: Sequence[str], truth: Sequence[str], called: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the names of rows and columns, and the numbers of cells by label and by what they are called.

    Args:
        classes: Names of the classes of the reference.
        truth: Labels of the query's cells, which may be others.
        called: Class numbers that they got, -1 for unknown.
    """
    novel = sorted(set(truth) - set(classes))
    names = [*classes, *novel, UNKNOWN_NAME]
    number_of = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (np.array([number_of[name] for name in truth]), np.where(called < 0, len(names) - 1, called)), 1)
    there = (counts.sum(0) + counts.sum(1)) > 0
    return [name for name, kept in zip(names, there, strict=True) if kept], counts[np.ix_(there, there)]


def _expected_rows(classes: Sequence[str], expected: Sequence[Expected], called: np.ndarray) -> list[list[str]]:
    rows = []
    for number, (name, each) in enumerate(zip(classes, expected, strict=True)):
        shares = ["-" if value is None else format_value(*value) for value in (each.precision, each.recall)]
        area = "-" if each.auroc is None else f"{each.auroc:.3f}"
        rows.append([name, str(each.cells), *shares, area, str(int((called == number).sum()))])
    return [*rows, [UNKNOWN_NAME, "-", "-", "-", "-", str(int((called < 0).sum()))]]


def write_report(
    folder: Path,
    report: Report,
    found: Transferred,
    reference: LabelledReference,
    query: np.ndarray,
    scored: tuple[ScoredQuery, Sequence[str]] | None,
    options: TransferOptions,
    notes: Sequence[str],
    facts: dict[str, Any],
) -> str:
    """Write the report, the tables and the figures.

    Args:
        folder: Folder to write into.
        report: Scores of all methods.
        found: What came of the transfer.
        reference: Cells that were learnt from.
        query: Embeddings of the query, `(cells, width)`.
        scored: Cells of the query with a label, and their labels; None where there are none.
        options: How labels were transferred.
        notes: Sentences about the data.
        facts: Content of `report.json`.

    Returns:
        The report as text.
    """
    classes, header = reference.classes, ["class", "cells scored", "precision", "recall"]
    header += ["AUROC if left out", "query cells called so"]
    rows = _expected_rows(classes, found.expected, found.called)
    splits = list(dict.fromkeys(score.split for score in report.scores))
    parts = [
        f"# Annotation of {report.dataset}",
        *notes,
        "\n".join(f"- {each}" for each in verdicts(found)),
        *(report.markdown(TITLES, split=split, digits=3, corner=split) for split in splits),
        "Accuracy and macro-F1 count the label of every cell, also where the cell is called unknown. Intervals are of "
        "95 %, by 500 resamples of cells; they know nothing of other donors and studies. AUROC of a class left out: "
        "how well the distance tells cells of a class that the reference lacks from the others, the mean over "
        "the classes.",
        f"## What to expect of each class ({found.split})",
        markdown_table(header, rows),
        f"A cell is unknown when its mean distance to {options.neighbours} neighbours is above {found.threshold:.4f}, "
        f"as that of {options.unknown_share:.1%} of the reference's own cells is when they are left out.",
    ]
    text = "\n\n".join(part for part in parts if part)
    report.write(folder, {**facts, "verdicts": verdicts(found), "notes": list(notes)}, text + "\n", HEADLINE)
    _write_table(folder / EXPECTED, [header, *rows])
    if scored is not None:
        cells, truth = scored
        names, counts = confusion(classes, truth, found.called[cells.rows])
        _write_table(folder / f"{CONFUSION}.csv", [["label", *names], *_named(names, counts)])
        draw_confusion(counts, names, f"{report.dataset}, by embeddings", folder / f"{CONFUSION}.png")
    _draw_both(folder / UMAP, found, reference, query, options.seed)
    return text


def _named(names: Sequence[str], counts: np.ndarray) -> list[list[str]]:
    return [[name, *map(str, row)] for name, row in zip(names, counts.tolist(), strict=True)]


def _write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with WholeFile(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")


def _draw_both(path: Path, found: Transferred, reference: LabelledReference, query: np.ndarray, seed: int) -> None:
    """Draw reference and query in one UMAP of their embeddings: by origin, and by label."""
    random = np.random.default_rng(seed)
    number = len(reference.labels), len(query)
    first, second = (np.sort(random.permutation(each)[:_MOST_DRAWN]) for each in number)
    names = np.array([*reference.classes, UNKNOWN_NAME], dtype=object)  # the class -1 is the last name
    origins = np.repeat(np.array(["reference", "query"], dtype=object), [len(first), len(second)])
    labels = np.concatenate([names[reference.labels[first]], names[found.called[second]]])
    embeddings = np.concatenate([reference.features.embeddings[first], query[second]])
    panels = [("origin", origins), ("label, given or transferred", labels)]
    draw_joint_umap(embeddings, panels, path, seed, UNKNOWN_NAME)
