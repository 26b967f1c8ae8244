# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the signatures that those of new cells are like, and the mechanisms of action that these have in common."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.files import WholeFolder, write_json
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.embedding.stored import check_alike
from tahoex1_hf.runs.report import markdown_table
from tahoex1_hf.signatures.building import check_numbers
from tahoex1_hf.signatures.comparing import Compared, Library, compare
from tahoex1_hf.signatures.mechanisms import COLUMN, enriched, read_mechanisms
from tahoex1_hf.signatures.screen import EMBEDDINGS, Screen, Space, make_screen, open_space
from tahoex1_hf.signatures.shifts import BOTH, Shifts, q_values
from tahoex1_hf.signatures.store import Stored, digests, read_signatures
from tahoex1_hf.signatures.unfinished import Unfinished

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

NEIGHBOURS, MECHANISMS, TEXT, FACTS = "neighbours.csv", "mechanisms.csv", "report.md", "report.json"
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a query.

    Attributes:
        neighbours: A row for each drug of the new cells and each drug of the signatures.
        mechanisms: A row for each drug of the new cells and each mechanism; empty without a table of them.
        text: The report as text.
    """

    neighbours: "pd.DataFrame"
    mechanisms: "pd.DataFrame"
    text: str


@dataclass(frozen=True, eq=False)
class _Drug:
    """A drug of the new cells beside the signatures.

    Attributes:
        name: Drug and dose.
        lines: Number of its lines.
        compared: What it is like.
    """

    name: str
    lines: int
    compared: Compared


def query_signatures(
    cells: str | Path,
    signatures: str | Path,
    output: str | Path,
    *,
    drug: str | None = None,
    dose: str | None = None,
    line: str | None = None,
    plate: str | None = None,
    control: str | None = None,
    space: str | None = None,
    key: str | None = None,
    mechanisms: str | Path | None = None,
    mechanism_column: str = COLUMN,
    min_cells: int = 20,
    drop_few: bool = False,
    permutations: int = 1999,
    seed: int = 0,
    restart: bool = False,
    progress: bool = True,
) -> Answer:
    """Find the signatures that new cells are like.

    The similarity of two drugs is the cosine of their shifts, averaged over the lines of the new cells; each is
    compared with the signatures of its own line where there are some. p is the share of permutations of which of the
    new cells are the drug's, with a similarity as large. The same call resumes a run that was stopped.

    Args:
        cells: Cells of a drug, or of several, with controls of their own: embeddings or, for expression, raw counts.
        signatures: Folder that `make_signatures` has written.
        output: Folder for tables and report; an earlier one is replaced.
        drug: Column of obs with the drugs; by default that of the signatures, as the following ones.
        dose: Column with the doses.
        line: Column with the cell lines.
        plate: Column with the plates.
        control: Name of the controls among the drugs.
        space: "embeddings" or "expression"; by default what is there, embeddings first.
        key: Slot of `obsm`, or name of the column of embeddings.
        mechanisms: Table with the columns `drug` and `mechanism_column`.
        mechanism_column: Column with the mechanisms of action.
        min_cells: Fewest cells of a drug on a plate, and of the controls of a line on a plate.
        drop_few: Whether lines on plates with fewer controls are left out.
        permutations: Number of permutations.
        seed: Seed of the permutations.
        restart: Whether to discard the files of an unfinished run with other settings.
        progress: Whether to show a progress bar.

    Returns:
        Tables and report.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the cells cannot be compared with the signatures; the message says what to do.
    """
    output = Path(output)
    check_numbers(min_cells, permutations)
    if not output.parent.is_dir():
        raise ValueError(f"The output's folder {output.parent} does not exist.")
    if output.exists() and not (output / NEIGHBOURS).exists():
        raise ValueError(f"output={output} exists and holds no result of a query: name a new folder.")
    stored = read_signatures(signatures, space)
    given = {"drug": drug, "dose": dose, "line": line, "plate": plate, "control": control}
    columns = replace(stored.columns, **{name: value for name, value in given.items() if value is not None})
    kinds = {} if mechanisms is None else read_mechanisms(mechanisms, mechanism_column)
    settings = {"columns": asdict(columns), "space": stored.space, "key": key or stored.key, "seed": seed}
    settings |= {"min_cells": min_cells, "drop_few": drop_few, "permutations": permutations}
    files = [Path(cells), Path(signatures) / f"{stored.space}.parquet"]
    with Unfinished(output, files, settings, restart) as kept:
        like = None if stored.space == EMBEDDINGS else stored.record
        opened, obs = open_space(cells, stored.space, key or stored.key, columns, kept.folder, like)
        if stored.space == EMBEDDINGS:
            check_alike(str(cells), opened.record, opened.values.shape[1], stored.record, stored.width)
        screen = make_screen(str(cells), obs, columns, min_cells, drop_few, seed)
        answer = _carry_out(opened, screen, stored, kinds, permutations, seed, kept, progress)
        facts = {"cells": Path(cells).name, "space": stored.space, "permutations": permutations, "seed": seed}
        _write(output, answer, facts)
    return answer


def _carry_out(
    space: Space,
    screen: Screen,
    stored: Stored,
    kinds: Mapping[str, str],
    permutations: int,
    seed: int,
    kept: Unfinished,
    progress: bool,
) -> Answer:
    import pandas as pd

    shifts, library = Shifts(space.values, screen, seed), stored.library
    drug_of = dict(zip(library.drugs.tolist(), stored.drugs, strict=True))
    kind_of = [kinds.get(drug_of[name], "") for name in library.names]
    names = [each.name for each in screen.conditions]
    notes = list(screen.notes)
    if shared := len(stored.controls & set(digests(screen.names))):
        notes.append(
            f"**Warning**: {shared} controls are those of the signatures, by their names. Shifts from the same "
            "controls agree by the noise of these alone: the similarities are too high."
        )
        logger.warning("%s", notes[-1].removeprefix("**Warning**: "))
    compared: list[_Drug] = []
    with progress_bar(progress, total=len(set(names)), unit="drug", desc="Comparing") as bar:
        for place, name in enumerate(dict.fromkeys(names)):
            numbers = [number for number, each in enumerate(names) if each == name]
            found = kept.kept(stored.space, place, _of_drug, shifts, numbers, library, permutations)
            compared.append(_Drug(name, len(numbers), Compared(**found)))
            bar.update()
    near = pd.concat([_neighbours(each, library.names, kind_of) for each in compared], ignore_index=True)
    near["q_value"] = q_values(near["p_value"].to_numpy())
    rows = [
        {"drug": each.name, "mechanism": kind, "drugs": number, "auroc": area, "p_value": p}
        for each in compared
        for kind, number, area, p in enriched(each.compared.similarity, kind_of)
    ]
    table = pd.DataFrame(rows, columns=["drug", "mechanism", "drugs", "auroc", "p_value"])
    table["q_value"] = q_values(table["p_value"].to_numpy(dtype=np.float64))
    return Answer(near, table, _text(compared, near, table, notes, stored))


def _of_drug(shifts: Shifts, numbers: Sequence[int], library: Library, permutations: int) -> dict[str, np.ndarray]:
    mine = [shifts.screen.conditions[number] for number in numbers]
    return vars(compare(shifts, mine, numbers, BOTH, library, permutations))


def _neighbours(drug: _Drug, names: list[str], kinds: list[str]) -> "pd.DataFrame":
    import pandas as pd

    found = drug.compared
    order = np.argsort(-found.similarity, kind="stable")
    return pd.DataFrame(
        {
            "drug": drug.name,
            "rank": np.arange(1, len(order) + 1),
            "similar": [names[number] for number in order],
            "mechanism": [kinds[number] for number in order],
            "similarity": found.similarity[order],
            "p_value": found.p[order],
            "lines": drug.lines,
            "lines_that_agree": found.agree[order],
        }
    )


def _text(compared: list[_Drug], near: "pd.DataFrame", table: "pd.DataFrame", notes: list[str], stored: Stored) -> str:
    library = stored.library
    parts = [
        "# Signatures that new cells are like",
        f"{len(compared)} drugs beside {len(library.names)} of the signatures, by {stored.space}. q: false discovery "
        "rate over all pairs, by permutations of which cells are the drug's.",
        *notes,
    ]
    for each in compared:
        effect = float(each.compared.p_effect)
        parts.append(f"## {each.name}\n\nAn effect at all: p {effect:.3g}, in {each.lines} lines.")
        rows = [
            [row.similar, row.mechanism or "-", f"{row.similarity:.2f}", f"{row.q_value:.3g}",
             f"{row.lines_that_agree} of {row.lines}"]
            for row in near[near["drug"] == each.name].head(_SHOWN).itertuples()
        ]  # fmt: skip
        parts.append(markdown_table(["similar", "mechanism", "similarity", "q", "lines that agree"], rows))
        own = table[table["drug"] == each.name].sort_values("p_value").head(_SHOWN // 2)
        if len(own):
            rows = [
                [row.mechanism, str(row.drugs), f"{row.auroc:.2f}", f"{row.q_value:.3g}"] for row in own.itertuples()
            ]
            parts.append(markdown_table(["mechanism", "drugs", "AUROC", "q"], rows))
    return "\n\n".join(parts)


def _write(output: Path, answer: Answer, facts: dict[str, Any]) -> None:
    folder = WholeFolder(output, replace=True)
    try:
        answer.neighbours.to_csv(folder.partial / NEIGHBOURS, index=False)
        answer.mechanisms.to_csv(folder.partial / MECHANISMS, index=False)
        (folder.partial / TEXT).write_text(answer.text + "\n", encoding="utf-8")
        write_json(folder.partial / FACTS, facts)
        folder.finish()
    finally:
        folder.discard()
