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
    """Return the scores: the samples are the folds; the best known reproduction has no cells of ours."""
    report = Report(TASK, dataset)
    for method in METHODS:
        values = getattr(comparison, method, None)
        if values is not None:
            rows = np.atleast_2d(values)
            report.add(method, [asdict(summarise(row)) for row in rows], numbers=[rows.shape[1]] * len(rows))
    for metric, value in asdict(BEST_KNOWN).items():
        report.scores.append(Score(TASK, dataset, "test", None, "best_known", metric, value))
    return report


def cell_table(comparison: Comparison, cells: pd.DataFrame) -> pd.DataFrame:
    """Return a row per cell: what is known of it, and its cosines, the means over the samples."""
    found = {name: getattr(comparison, name) for name in METHODS if getattr(comparison, name, None) is not None}
    return cells.assign(**{name: np.atleast_2d(values).mean(0) for name, values in found.items()})


def far_drugs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the drugs whose cells are farthest from their floor: `drug`, `cells`, `public`, `floor`."""
    grouped = table.assign(drug=table["drug"].fillna("").str.strip()).groupby("drug")
    found = grouped.agg(cells=("public", "size"), public=("public", "median"), floor=("floor", "median"))
    order = (found["public"] - found["floor"]).sort_values(kind="stable").index
    return found.loc[order].head(_MOST_DRUGS).reset_index()


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
        folder: folder, which exists.
        comparison: cosines of every cell.
        cells: `key`, `drug`, `genes` and `fits` of every cell.
        causes: causes that were tried, the likeliest first; None where there was no need to.
        facts: how the comparison was made.
        dataset: name of the public embeddings.

    Returns:
        The verdict, in a sentence.
    """
    report, table = make_report(comparison, dataset), cell_table(comparison, cells)
    verdict = comparison.verdict
    sentence = _sentence(comparison, causes, odd_drugs(table))
    low, high = intervals(comparison.public)
    content = {
        "verdict": verdict,
        "sentence": sentence,
        "public_interval_over_cells": {"low": asdict(low), "high": asdict(high)},
        "best_known": asdict(BEST_KNOWN),
        "causes": None if causes is None else [_as_dict(cause) for cause in causes],
        "far_drugs": far_drugs(table).to_dict("records"),
        **facts,
    }
    with WholeFile(folder / COSINES) as partial:
        table.to_csv(partial, index=False, float_format="%.7f")
    text = _text(report, table, sentence, causes, facts)
    report.write(folder, content, text, "median", _METRICS["median"])
    draw_comparison(comparison, causes, folder / FIGURE)
    return sentence


def _as_dict(cause: Cause) -> dict[str, Any]:
    return {"name": cause.name, "found": cause.found, "sentence": cause.sentence(), **asdict(cause)}


def odd_drugs(table: pd.DataFrame) -> pd.DataFrame:
    """Return those of the farthest drugs whose cells are clearly farther than their floor, with some cells each."""
    found = far_drugs(table)
    far = 1 - found["public"] > FACTOR * (1 - found["floor"]) + 10 * SLACK
    return found[far & (found["cells"] >= _SOME)]


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
    sentence: str,
    causes: Sequence[Cause] | None,
    facts: Mapping[str, Any],
) -> str:
    """Return the report as Markdown."""
    long = int((~table["fits"]).sum())
    parts = [
        f"# {report.dataset} and our embeddings of the same cells",
        sentence,
        f"{len(table)} cells, {long} of them longer than the context ({facts['context_length']} tokens). Model: "
        f"{facts['model']}, {facts['size'] or 'one size'}. Column: {facts['column']}. Intervals are over the "
        f"{facts['samples'] - 1} samples.",
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
        for row in far_drugs(table).itertuples()
    ]
    parts.append("Drugs whose cells are farthest from their floor:")
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
