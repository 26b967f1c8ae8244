# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Make the signatures of a screen: each drug's shift from its own controls, how sure it is, and which are alike."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.files import WholeFolder
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.inference.provenance import check_key
from tahoex1_hf.runs.report import Report
from tahoex1_hf.signatures.comparing import Library, compare
from tahoex1_hf.signatures.mechanisms import COLUMN, mechanisms_of, read_mechanisms, same_mechanism
from tahoex1_hf.signatures.report import Found, make_report, write_report
from tahoex1_hf.signatures.screen import (
    EMBEDDINGS,
    EXPRESSION,
    Columns,
    Condition,
    Screen,
    Space,
    make_screen,
    open_space,
)
from tahoex1_hf.signatures.shifts import FIRST, SECOND, Shifts, Strength, cosine, q_values
from tahoex1_hf.signatures.store import write_signatures
from tahoex1_hf.signatures.unfinished import Unfinished

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

BOTH_SPACES = "both"


@dataclass(frozen=True, eq=False)
class Signatures:
    """What came of a screen.

    Attributes:
        table: A row for each space, drug, dose and line.
        pairs: The ten most similar drugs of each drug, by space.
        report: Scores of the spaces.
        text: The report as text.
    """

    table: "pd.DataFrame"
    pairs: "pd.DataFrame"
    report: Report
    text: str


def spaces_of(space: str) -> list[str]:
    """Return the names of the spaces that are asked for."""
    known = {EMBEDDINGS: [EMBEDDINGS], EXPRESSION: [EXPRESSION], BOTH_SPACES: [EMBEDDINGS, EXPRESSION]}
    if space not in known:
        raise ValueError(f"space={space} (--space): pass one of {', '.join(known)}.")
    return known[space]


def check_numbers(min_cells: int, permutations: int) -> None:
    """Raise ValueError for numbers that make no sense."""
    if min_cells < 4:
        raise ValueError(f"min_cells={min_cells} (--min-cells): halves need two cells each, so pass at least 4.")
    if permutations < 19:
        raise ValueError(
            f"permutations={permutations} (--permutations): p could not fall to 0.05, so pass at least 19."
        )


def make_signatures(
    cells: str | Path,
    output: str | Path,
    *,
    drug: str = "drug",
    dose: str | None = None,
    line: str | None = None,
    plate: str | None = None,
    control: str = "DMSO_TF",
    space: str = EMBEDDINGS,
    key: str = "X_tahoe_x1",
    mechanisms: str | Path | None = None,
    mechanism_column: str = COLUMN,
    min_cells: int = 20,
    drop_few: bool = False,
    permutations: int = 999,
    seed: int = 0,
    restart: bool = False,
    progress: bool = True,
) -> Signatures:
    """Make the signatures of a screen of drugs, and a report.

    A signature is the mean shift of a drug's cells from the controls of the same line and plate, the plates weighted
    by the drug's cells. Wherever two signatures are compared, one is measured against one half of the controls, and
    the other against the other half. What has been measured of each drug is kept in the folder `OUTPUT.parts` until
    the end; the same call resumes a run that was stopped in any way.

    Args:
        cells: `.parquet`, `.h5ad` or `.zarr` with embeddings that `embed_files` has written; for expression an `.h5ad`
            with raw counts.
        output: Folder for signatures, tables, report and figure; an earlier one is replaced.
        drug: Column of obs with the drugs.
        dose: Column with the doses, each of which gets signatures of its own.
        line: Column with the cell lines.
        plate: Column with the plates.
        control: Name of the controls among the drugs.
        space: "embeddings", "expression" (log-normalised counts of the 2,000 most variable genes), or "both".
        key: Slot of `obsm`, or name of the column of embeddings.
        mechanisms: Table with the columns `drug` and `mechanism_column`.
        mechanism_column: Column with the mechanisms of action.
        min_cells: Fewest cells of a drug on a plate, and of the controls of a line on a plate.
        drop_few: Whether lines on plates with fewer controls are left out; otherwise they are an error.
        permutations: Number of permutations of which cells are the drug's.
        seed: Seed of halves, resamples, permutations and map.
        restart: Whether to discard the files of an unfinished run with other settings.
        progress: Whether to show a progress bar.

    Returns:
        Tables and report.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If columns, controls or values cannot be used; the message says what to do.
    """
    names, output = spaces_of(space), Path(output)
    check_key(key)
    check_numbers(min_cells, permutations)
    if not output.parent.is_dir():
        raise ValueError(f"The output's folder {output.parent} does not exist.")
    if output.exists() and not any((output / f"{name}.parquet").exists() for name in (EMBEDDINGS, EXPRESSION)):
        raise ValueError(f"output={output} exists and holds no signatures: name a new folder.")
    columns = Columns(drug, dose, line, plate, control)
    kinds = {} if mechanisms is None else read_mechanisms(mechanisms, mechanism_column)
    settings = {"columns": asdict(columns), "spaces": names, "key": key, "seed": seed}
    settings |= {"min_cells": min_cells, "drop_few": drop_few, "permutations": permutations}
    found: list[Found] = []
    with ExitStack() as stack:
        kept = stack.enter_context(Unfinished(output, [Path(cells)], settings, restart))
        spaces = []
        for name in names:
            opened, obs = open_space(cells, name, key, columns, kept.folder)
            screen = make_screen(str(cells), obs, columns, min_cells, drop_few, seed)
            found.append(_measure(opened, screen, kinds, permutations, seed, kept, progress))
            spaces.append(opened)
        folder = WholeFolder(output, replace=True)
        stack.callback(folder.discard)
        for opened, each in zip(spaces, found, strict=True):
            screen, place = each.screen, folder.partial / f"{opened.name}.parquet"
            shifts = Shifts(opened.values, screen, seed).all_shifts(screen.conditions)
            write_signatures(place, screen.conditions, shifts, opened.name, key, opened.record, columns, screen.names)
        report = make_report(found, Path(cells).stem, seed)
        facts = {"cells": Path(cells).name, **columns.named(), "control": control, "permutations": permutations}
        text = write_report(folder.partial, report, found, {**facts, "min_cells": min_cells, "seed": seed})
        folder.finish()
    import pandas as pd

    return Signatures(
        pd.concat([each.table for each in found]), pd.concat([each.pairs for each in found]), report, text
    )


def _measure(
    space: Space,
    screen: Screen,
    kinds: Mapping[str, str],
    permutations: int,
    seed: int,
    kept: Unfinished,
    progress: bool,
) -> Found:
    import pandas as pd

    conditions = screen.conditions
    shifts = Shifts(space.values, screen, seed)
    drugs = [each.name for each in conditions]
    lines = np.array([each.line for each in conditions], dtype=object)
    library = Library(np.array(drugs, dtype=object), lines, shifts.all_shifts(conditions, SECOND))
    kind_of = dict(zip(drugs, mechanisms_of([each.drug for each in conditions], kinds), strict=True))
    rows: list[dict[str, Any]] = []
    size = len(library.names)
    similarity, p, agree = np.full((size, size), np.nan), np.full((size, size), np.nan), np.zeros((size, size), int)
    effect = np.full(size, np.nan)
    with progress_bar(progress, total=len(conditions), unit="signature", desc=space.name) as bar:
        for place, name in enumerate(library.names):
            numbers = [number for number, each in enumerate(drugs) if each == name]
            drug = kept.kept(space.name, place, _of_drug, shifts, numbers, library, permutations)
            similarity[place], p[place], agree[place] = drug["similarity"], drug["p"], drug["agree"]
            effect[place] = drug["p_effect"]
            for number, values in zip(numbers, drug["strengths"].tolist(), strict=True):
                strength = Strength(*values)
                rows.append(_row(space.name, conditions[number], screen, strength, kind_of[name], effect[place]))
                bar.update()
    np.fill_diagonal(similarity, np.nan)  # a drug beside itself
    np.fill_diagonal(p, np.nan)
    table = pd.DataFrame(rows)
    q_of = dict(zip(library.names, q_values(effect), strict=True))
    table["q_value"] = [
        q_of[f"{one} {other}".strip()] for one, other in zip(table["drug"], table["dose"], strict=True)
    ]
    names_kinds = [kind_of[name] for name in library.names]
    pairs = _pairs(space.name, library.names, similarity, p, agree, np.bincount(library.numbers), names_kinds)
    mechanism = same_mechanism(similarity, names_kinds, seed)
    places = _drug_shifts(library.numbers, shifts.all_shifts(conditions))
    return Found(
        space.name,
        screen,
        table,
        pairs,
        library.names,
        names_kinds,
        places,
        mechanism,
        _line_agreement(shifts, screen),
    )


def _of_drug(shifts: Shifts, numbers: Sequence[int], library: Library, permutations: int) -> dict[str, np.ndarray]:
    """Return how alike a drug is to the others, and how strong its signature is in each line."""
    conditions = [shifts.screen.conditions[number] for number in numbers]
    result = compare(shifts, conditions, numbers, FIRST, library, permutations)
    strengths = [shifts.strength(each, number) for each, number in zip(conditions, numbers, strict=True)]
    return {**vars(result), "strengths": np.array([astuple(each) for each in strengths])}


def _row(
    space: str, condition: Condition, screen: Screen, strength: Strength, kind: str, p_effect: float
) -> dict[str, Any]:
    return {
        "space": space,
        "drug": condition.drug,
        "dose": condition.dose,
        "line": condition.line,
        "mechanism": kind,
        "plates": len(condition.parts),
        "cells": condition.num_cells,
        "controls": sum(len(half) for part in condition.parts for half in screen.controls[part.stratum]),
        "effect": strength.effect,
        "effect_lower": strength.lower,
        "effect_upper": strength.upper,
        "reliability": strength.reliability,
        "cells_needed": strength.cells_needed,
        "p_value": p_effect,
    }


def _pairs(
    space: str,
    names: Sequence[str],
    similarity: np.ndarray,
    p: np.ndarray,
    agree: np.ndarray,
    lines: np.ndarray,
    kinds: Sequence[str],
) -> "pd.DataFrame":
    import pandas as pd

    q = q_values(p)
    rows = []
    for one, name in enumerate(names):
        order = np.argsort(-np.nan_to_num(similarity[one], nan=-np.inf), kind="stable")[:10]
        rows += [
            {
                "space": space,
                "drug": name,
                "rank": rank + 1,
                "similar": names[other],
                "similarity": similarity[one, other],
                "p_value": p[one, other],
                "q_value": q[one, other],
                "lines": int(lines[one]),
                "lines_that_agree": int(agree[one, other]),
                "mechanism": kinds[one],
                "similar_mechanism": kinds[other],
            }
            for rank, other in enumerate(order.tolist())
            if other != one
        ]
    return pd.DataFrame(rows)


def _drug_shifts(numbers: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return the mean shift of each drug over its lines, `(drugs, width)`."""
    return np.stack([shifts[numbers == number].mean(axis=0) for number in range(int(numbers.max()) + 1)])


def _line_agreement(shifts: Shifts, screen: Screen) -> list[float]:
    """Return for each drug in several lines the mean cosine of its shifts in pairs of them, which share no control."""
    found = []
    by_name: dict[str, list[Condition]] = {}
    for condition in screen.conditions:
        by_name.setdefault(condition.name, []).append(condition)
    for conditions in by_name.values():
        if len(conditions) > 1:
            own = shifts.all_shifts(conditions)  # lines have controls of their own
            found.append(float(cosine(own, own)[np.triu_indices(len(own), 1)].mean()))
    return found
