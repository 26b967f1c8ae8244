# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of a screen: how reliable its signatures are in each space, which drugs are alike, and a map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.benchmarking.resampling import Measurement, bootstrapped, compare
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.runs.report import Report, Score, markdown_table
from tahoex1_hf.signatures.figures import draw_map
from tahoex1_hf.signatures.screen import Screen

if TYPE_CHECKING:
    import pandas as pd

HEADLINE = "reliability"
TITLES = {
    "reliability": "reliability by split halves",
    "effect": "effect",
    "reproducible": "share with reliability of 0.7 or more and q at most 0.05",
    "significant": "share with an effect, q at most 0.05",
    "line_agreement": "cosine between lines",
    "mechanism_auroc": "AUROC of the same mechanism",
}
REPRODUCIBLE, SIGNIFICANT = 0.7, 0.05
_SHOWN = 15


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in a space.

    Attributes:
        space: `embeddings` or `expression`.
        screen: Drugs and controls.
        table: A row for each drug, dose and line.
        pairs: The most similar drugs of each drug.
        drugs: Names of the drugs, with their doses.
        mechanisms: Mechanism of each, empty where it is not known.
        shifts: Mean shift of each over its lines, `(drugs, width)`.
        mechanism: Area under the ROC curve of pairs of the same mechanism, its p value and their number; None where no
            mechanism is known.
        line_agreement: For each drug in several lines, the mean cosine between them.
    """

    space: str
    screen: Screen
    table: "pd.DataFrame"
    pairs: "pd.DataFrame"
    drugs: list[str]
    mechanisms: list[str]
    shifts: np.ndarray
    mechanism: tuple[float, float, int] | None
    line_agreement: list[float]


def make_report(found: Sequence[Found], dataset: str, seed: int) -> Report:
    """Return the scores of all spaces."""
    report = Report("signatures", dataset)
    for each in found:
        table = each.table
        values = {
            "reliability": table["reliability"].to_numpy(),
            "effect": table["effect"].to_numpy(),
            "reproducible": (table["reliability"].ge(REPRODUCIBLE) & table["q_value"].le(SIGNIFICANT)).to_numpy(float),
            "significant": (table["q_value"] <= SIGNIFICANT).to_numpy(float),
        }
        for name, numbers in {**values, "line_agreement": np.array(each.line_agreement)}.items():
            if len(numbers):
                mean = _mean_of(name, numbers)
                place = (report.task, dataset, "screen", None, each.space, name)
                report.scores.append(Score(*place, mean.value, *mean.bounds(), len(numbers)))
        if each.mechanism is not None:
            area, _, pairs = each.mechanism
            place = (report.task, dataset, "screen", None, each.space, "mechanism_auroc")
            report.scores.append(Score(*place, area, n=pairs))
    return report


def _mean_of(metric: str, values: np.ndarray) -> Measurement:
    rows = np.arange(len(values))
    replicates = bootstrapped(lambda _, these: float(these.mean()), values, values, rows, len(values))
    return Measurement("", "", "screen", metric, replicates[None], [len(values)], [0.0])


def _verdict(found: Sequence[Found]) -> str:
    """Return a sentence that compares the reliability of two spaces on the same signatures."""
    ours, theirs = (_mean_of(HEADLINE, each.table[HEADLINE].to_numpy()) for each in found)
    result = compare(ours, theirs)
    return (
        f"Reliability by {found[0].space} is **{result['verdict']}** against {found[1].space}, on the same cells and "
        f"halves: {result['difference']:+.3f} [{result['lower']:+.3f}, {result['upper']:+.3f}]."
    )


def write_report(folder: Path, report: Report, found: Sequence[Found], facts: dict[str, Any]) -> str:
    """Write report, tables and figures into a folder, and return the report as text."""
    import pandas as pd

    first = found[0]
    notes = [
        f"{len(first.table)} signatures of {len(first.drugs)} drugs (and doses) in "
        f"{len({line for line, _ in first.screen.strata})} lines, against the controls of {len(first.screen.strata)} "
        "lines on plates. Two signatures that are compared never share a control.",
        *first.screen.notes,
    ]
    verdicts = [_verdict(found)] if len(found) > 1 else []
    for each in found:
        if each.mechanism is not None:
            area, p, pairs = each.mechanism
            verdicts.append(
                f"{each.space}: {pairs} pairs of drugs with the same mechanism are told from other pairs with an "
                f"AUROC of {area:.3f}, p {p:.3g} by shuffled mechanisms."
            )
    parts = [
        f"# Signatures of {report.dataset}",
        *notes,
        "\n".join(f"- {each}" for each in verdicts),
        report.markdown(TITLES, corner="space"),
        "Intervals of 95 % by resampled signatures, which share controls: they are too narrow. Effect: length of the "
        "shift in spreads of the controls, without what noise adds.",
    ]
    for each in found:
        parts += [
            f"## Strongest by {each.space}",
            _strongest(each.table),
            f"## Most alike by {each.space}",
            _alike(each),
        ]
        draw_map(folder / f"map-{each.space}.png", each.drugs, each.mechanisms, each.shifts, each.table, facts["seed"])
    text = "\n\n".join(part for part in parts if part)
    report.write(folder, {**facts, "notes": notes, "verdicts": verdicts}, text + "\n", HEADLINE)
    for name, tables in (("signatures.csv", [f.table for f in found]), ("pairs.csv", [f.pairs for f in found])):
        with WholeFile(folder / name) as partial:
            pd.concat(tables).to_csv(partial, index=False)
    return text


def _strongest(table: "pd.DataFrame") -> str:
    best = table.sort_values("effect", ascending=False).head(_SHOWN)
    header = ["drug", "dose", "line", "cells", "effect", "reliability", "cells needed", "q"]
    rows = [
        [
            each.drug,
            each.dose or "-",
            each.line,
            str(each.cells),
            f"{each.effect:.3f} [{each.effect_lower:.3f}, {each.effect_upper:.3f}]",
            f"{each.reliability:.2f}",
            "-" if np.isinf(each.cells_needed) or each.q_value > SIGNIFICANT else f"{each.cells_needed:.0f}",
            f"{each.q_value:.3g}",
        ]
        for each in best.itertuples()
    ]
    return markdown_table(header, rows)


def _alike(found: Found) -> str:
    best = found.pairs.sort_values(["p_value", "similarity"], ascending=[True, False]).head(_SHOWN)
    header = ["drug", "similar", "similarity", "q", "lines that agree", "mechanisms"]
    rows = [
        [
            each.drug,
            each.similar,
            f"{each.similarity:.2f}",
            f"{each.q_value:.3g}",
            f"{each.lines_that_agree} of {each.lines}",
            f"{each.mechanism or '-'}; {each.similar_mechanism or '-'}",
        ]
        for each in best.itertuples()
    ]
    return markdown_table(header, rows)
