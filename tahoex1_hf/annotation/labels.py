# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Labels of reference and query, the table that joins their names, and batches that both have."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tahoex1_hf.common.reading import reading
from tahoex1_hf.common.texts import MISSING

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

UNKNOWN_NAME = "unknown"
# Columns that say where cells come from; those that reference and query both have are compared without being asked.
ORIGINS = ("batch", "study", "dataset", "dataset_id", "donor", "donor_id", "individual", "patient", "sample_id")


def read_label_map(table: Mapping[str, str] | str | Path | None) -> dict[str, str]:
    """Return label -> joined name.

    Args:
        table: Path of a table with the columns `label` and `joined`, separated by commas or tabs; or such a mapping;
            or None for an empty one. Cells of a label whose joined name is empty are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For other columns, or a label that is there twice.
    """
    import pandas as pd

    if table is None:
        return {}
    if not isinstance(table, str | Path):
        return {str(label): str(joined) for label, joined in table.items()}
    if not Path(table).is_file():
        raise FileNotFoundError(f"label_map={table} does not exist.")
    with reading(table):
        found = pd.read_csv(table, sep=None, engine="python", dtype=str, keep_default_na=False, skipinitialspace=True)
    if not {"label", "joined"} <= set(found):
        raise ValueError(
            f"label_map={table} has the columns {', '.join(map(str, found))}: it needs label and joined, with commas "
            "or tabs between."
        )
    twice = found["label"][found["label"].duplicated()]
    if len(twice):
        raise ValueError(f"label_map={table} has the label {twice.iloc[0]!r} twice: keep one.")
    return dict(zip(found["label"], found["joined"], strict=True))


def joined_names(column: "pd.Series", label_map: Mapping[str, str]) -> np.ndarray:
    """Return the labels of cells as text, by their joined names, shape `(cells,)`; empty where there is none."""
    text = column.astype(object)
    missing = text.isna().to_numpy() | np.isin(text.astype(str).to_numpy(), MISSING)
    names = np.where(missing, "", text.astype(str).to_numpy(dtype=object))
    return np.array([label_map.get(name, name) for name in names], dtype=object)


def check_label_map(label_map: Mapping[str, str], *columns: "pd.Series | None", others: Collection[str] = ()) -> None:
    """Raise ValueError for a label of the table that is in no column, nor among the others: a slip of the pen."""
    known = {str(value) for column in columns if column is not None for value in column.dropna().unique()}
    known |= set(others)
    lost = sorted(set(label_map) - known)
    if lost:
        raise ValueError(
            f"label_map: no cell of reference or query has the label {', '.join(map(repr, lost[:3]))}; there are "
            f"{', '.join(sorted(known)[:20])}."
        )


def check_classes(names: np.ndarray, label: str, where: str, min_cells: int, drop_rare: bool) -> list[str]:
    """Return the classes of a reference, sorted.

    Args:
        names: Labels, `(cells,)`; empty where there is none.
        label: Column that they are from.
        where: Name of the reference, for messages.
        min_cells: Fewest cells of a class.
        drop_rare: Whether classes with fewer are left out; otherwise they are an error.

    Raises:
        ValueError: For a class with too few cells, and for fewer than two classes.
    """
    kinds, numbers = np.unique(names[names != ""].astype(str), return_counts=True)
    rare = [f"{kind} ({number})" for kind, number in zip(kinds, numbers, strict=True) if number < min_cells]
    if rare and not drop_rare:
        raise ValueError(
            f"label={label} of {where}: {len(rare)} classes have fewer than {min_cells} cells: "
            f"{', '.join(rare[:5])}. Neighbours can hardly find them, nor can it be measured how well: join them to "
            "others with label_map (--label-map), leave them out with drop_rare (--drop-rare), or lower min_cells "
            "(--min-cells)."
        )
    if rare:
        logger.warning("%s: %d rare classes are left out: %s.", where, len(rare), ", ".join(rare))
    found = [str(kind) for kind, number in zip(kinds, numbers, strict=True) if number >= min_cells]
    if len(found) < 2:
        raise ValueError(
            f"label={label} of {where} has {len(found)} classes ({', '.join(found)}): there is nothing to tell apart."
        )
    if UNKNOWN_NAME in found:
        raise ValueError(
            f"label={label} of {where} has a class {UNKNOWN_NAME!r}, the name that cells far from the reference get: "
            "rename it, or leave it out with an empty joined name in label_map (--label-map)."
        )
    return found


def shared_origins(reference: "pd.DataFrame", query: "pd.DataFrame", batch: str | None) -> list[str]:
    """Return a sentence for each column by which the query has batches, studies or donors of the reference.

    Args:
        reference: Columns of obs of the reference.
        query: Columns of obs of the query.
        batch: Column that was named; the others are those of `ORIGINS`.
    """
    found = []
    for name in dict.fromkeys([*([batch] if batch else []), *ORIGINS]):
        if name not in reference or name not in query:
            continue
        ours, theirs = query[name].astype(object), reference[name].astype(object)
        common = sorted(set(ours.dropna().astype(str)) & set(theirs.dropna().astype(str)) - set(MISSING))
        if common:
            cells = int(ours.astype(str).isin(common).sum())
            listed = ", ".join(common[:5]) + (", ..." if len(common) > 5 else "")
            found.append(
                f"{cells} of {len(query)} cells of the query have a {name} that the reference has too ({listed}). If "
                "these are the same, the query is not independent of the reference: cells of one batch are alike for "
                "reasons other than their type, and every score on it flatters all methods."
            )
    return found
