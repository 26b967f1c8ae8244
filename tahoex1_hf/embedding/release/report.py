# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report on released weights: tables, distributions, a figure, and what is to be known of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.embedding.release.causes import Cause
from tahoex1_hf.embedding.release.comparing import (
    BEST_KNOWN,
    FACTOR,
    LOW,
    SLACK,
    VERDICTS,
    Comparison,
    Summary,
    intervals,
    summarise,
)
from tahoex1_hf.embedding.release.plot import draw_comparison
from tahoex1_hf.runs.report import Report, Score, markdown_table

TASK = "verify-release"
COSINES, FIGURE = "cosines.csv", "cosines.png"

# Method -> what it compares, in the order of the tables.
METHODS = {
    "public": "the public embeddings with ours",
    "floor": "our own floor: two runs of ours, other samples, float32 and bfloat16",
    "sampling": "of that, the samples alone (float32)",
    "precision": "of that, the precision alone (the same sample)",
    "without_drug": "ours with and without the drug token",
    "public_without_drug": "the public embeddings with ours without the drug token",
    "best_known": "the best known reproduction (pull request 83 of the original)",
}
_METRICS = {"median": "median cosine", "mean": "mean cosine", "below": f"share below {LOW}"}
_SOME = 4  # least number of cells of a drug to judge it by
_MOST_DRUGS, _MOST_NAMED = 10, 3  # drugs whose cells are farthest, in the table and in the sentence


def make_report(comparison: Comparison, dataset: str) -> Report:
    """Return the scores: the samples are the folds, and intervals are over the cells, which are independent."""
    report = Report(TASK, dataset)

    def add(method: str, fold: int | None, values: Summary, number: int | None, ends: Sequence[Summary] = ()) -> None:
        for metric, value in asdict(values).items():
            lower, upper = (getattr(end, metric) for end in ends) if ends else (None, None)
            report.scores.append(Score(TASK, dataset, "test", fold, method, metric, value, lower, upper, number))

    for method in METHODS:
        values = getattr(comparison, method, None)
        if values is not None:
            rows = np.atleast_2d(values)
            for fold, row in enumerate(rows):
                add(method, fold, summarise(row), len(row))
            add(method, None, summarise(rows), rows.shape[1], intervals(rows))
    add("best_known", None, BEST_KNOWN, None)
    return report


def cell_table(comparison: Comparison, cells: pd.DataFrame) -> pd.DataFrame:
    """Return a row per cell: what is known of it, and its cosines, the means over the samples."""
    found = {name: getattr(comparison, name) for name in METHODS if getattr(comparison, name, None) is not None}
    return cells.assign(**{name: np.atleast_2d(values).mean(0) for name, values in found.items()})


def by_drug(table: pd.DataFrame) -> pd.DataFrame:
    """Return `drug`, `cells`, `public`, `floor` of each drug with some cells, the farthest from its floor first."""
    grouped = table.assign(drug=table["drug"].fillna("").str.strip()).groupby("drug")
    found = grouped.agg(cells=("public", "size"), public=("public", "median"), floor=("floor", "median"))
    enough = found[found["cells"] >= _SOME]
    order = (enough["public"] - enough["floor"]).sort_values(kind="stable").index
    return enough.loc[order].reset_index()


def write_report(
    folder: Path,
    comparison: Comparison,
    cells: pd.DataFrame,
    causes: Sequence[Cause] | None,
    facts: Mapping[str, Any],
    dataset: str,
) -> str:
    """Write `report.json`, `report.md`, `scores.csv`, `scores.png`, `cosines.csv` and `cosines.png`.

    Args:
        folder: Folder, which exists.
        comparison: Cosines of every cell.
        cells: `key`, `drug`, `genes` and `fits` of every cell.
        causes: Causes that were tried, the likeliest first; None where there was no need to.
        facts: How the comparison was made.
        dataset: Name of the public embeddings.

    Returns:
        The verdict, in a sentence.
    """
    report, table = make_report(comparison, dataset), cell_table(comparison, cells)
    drugs = by_drug(table)
    verdict = comparison.verdict
    sentence = _sentence(comparison, causes, odd_drugs(drugs))
    low, high = intervals(comparison.public)
    content = {
        "verdict": verdict,
        "sentence": sentence,
        "public_interval_over_cells": {"low": asdict(low), "high": asdict(high)},
        "best_known": asdict(BEST_KNOWN),
        "causes": None if causes is None else [_as_dict(cause) for cause in causes],
        "far_drugs": drugs.head(_MOST_DRUGS).to_dict("records"),
        **facts,
    }
    with WholeFile(folder / COSINES) as partial:
        table.to_csv(partial, index=False, float_format="%.7f")
    text = _text(report, table, drugs, sentence, causes, facts)
    report.write(folder, content, text, "median", _METRICS["median"])
    draw_comparison(comparison, causes, folder / FIGURE)
    return sentence


def _as_dict(cause: Cause) -> dict[str, Any]:
    return {"name": cause.name, "found": cause.found, "sentence": cause.sentence(), **asdict(cause)}


def odd_drugs(drugs: pd.DataFrame) -> pd.DataFrame:
    """Return those drugs, of what `by_drug` returns, whose cells are clearly farther than their floor."""
    return drugs[1 - drugs["public"] > FACTOR * (1 - drugs["floor"]) + 10 * SLACK]


def _sentence(comparison: Comparison, causes: Sequence[Cause] | None, odd: pd.DataFrame) -> str:
    public, floor = summarise(comparison.public), summarise(comparison.floor)
    numbers = (
        f"median {public.median:.4f} (floor {floor.median:.4f}), mean {public.mean:.4f} ({floor.mean:.4f}), "
        f"{public.below:.2%} below {LOW} ({floor.below:.2%})"
    )
    parts = [f"{VERDICTS[comparison.verdict].capitalize()}: {numbers}."]
    if causes:
        likely = causes[0].likely
        parts.append(f"Likeliest cause: {causes[0].sentence()}." if likely else "No cause that was tried explains it.")
    if len(odd) and not (causes and causes[0].found):
        some = odd.head(_MOST_NAMED).itertuples()
        listed = ", ".join(f"{row.drug!r} ({row.cells} cells, median {row.public:.4f})" for row in some)
        parts.append(f"Cells of some drugs are far from their floor: {listed}.")
    return " ".join(parts)


def _text(
    report: Report,
    table: pd.DataFrame,
    drugs: pd.DataFrame,
    sentence: str,
    causes: Sequence[Cause] | None,
    facts: Mapping[str, Any],
) -> str:
    """Return the report as Markdown."""
    long = int((~table["fits"]).sum())
    parts = [
        f"# Public embeddings ({report.dataset}) and ours, of the same cells",
        sentence,
        f"{len(table)} cells, {long} of them longer than the context ({facts['context_length']} tokens). Model: "
        f"{facts['model']}, {facts['size'] or 'one size'}. Column: {facts['column']}. In brackets, "
        "95 % intervals over the cells.",
        report.markdown(_METRICS, METHODS, digits=4, corner="cosines of"),
    ]
    split = [("cells that fit the context", table[table["fits"]]), ("longer cells", table[~table["fits"]])]
    rows = [
        [name, str(len(some)), *(f"{some[of].median():.4f}" for of in ("public", "floor"))]
        for name, some in split
        if len(some)
    ]
    parts.append(markdown_table(["", "cells", "public, median", "floor, median"], rows))
    found = [
        [row.drug or "(none)", str(row.cells), f"{row.public:.4f}", f"{row.floor:.4f}"]
        for row in drugs.head(_MOST_DRUGS).itertuples()
    ]
    if found:
        parts.append(f"Drugs whose cells are farthest from their floor, of those with {_SOME} cells and more:")
        parts.append(markdown_table(["drug", "cells", "public, median", "floor, median"], found))
    if causes is not None:
        parts += ["## Causes, the likeliest first", *_causes(causes)]
    return "\n\n".join(parts) + "\n"


def _causes(causes: Sequence[Cause]) -> list[str]:
    rows = [
        [
            cause.name,
            "-" if cause.doubt is None else f"{cause.doubt:.2f}",
            cause.trials[0].assumption if cause.trials else "-",
            f"{cause.trials[0].mean:.4f}" if cause.trials else "-",
            f"{round(cause.trials[0].closed, 2) + 0:.0%}" if cause.trials else "-",
        ]
        for cause in causes
    ]
    header = ["cause", "doubt", "best of the assumptions", "mean cosine", "closes of the gap"]
    explained = (
        "An assumption that closes most of the gap is the cause. A doubt near 1 means that what we take for true is "
        "of no use for the public embeddings, near 0 that it is right."
    )
    return [markdown_table(header, rows), explained]
