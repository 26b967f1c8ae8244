# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Signatures on disk: a Parquet table with a row for each, its shift as a list, and how they were made."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.reading import reading
from tahoex1_hf.signatures.comparing import Library
from tahoex1_hf.signatures.screen import EMBEDDINGS, EXPRESSION, Columns, Condition

_META = b"tahoex1_signatures"
SHIFT = "shift"


@dataclass(frozen=True, eq=False)
class Stored:
    """Signatures that were read.

    Attributes:
        library: Signatures.
        space: `embeddings` or `expression`.
        record: Record of how the values were made.
        width: Number of dimensions.
        key: Slot of `obsm`, or name of the column of embeddings.
        columns: Columns of obs of their screen.
        controls: Digests of the names of the controls.
        drugs: Drug of each signature, without its dose.
    """

    library: Library
    space: str
    record: dict[str, Any]
    width: int
    key: str
    columns: Columns
    controls: set[str]
    drugs: list[str]


def digests(names: Iterable[str]) -> list[str]:
    """Return short digests of names, by which cells are found again."""
    return sorted(hashlib.blake2b(name.encode(), digest_size=6).hexdigest() for name in names)


def write_signatures(
    path: Path,
    conditions: Sequence[Condition],
    shifts: np.ndarray,
    space: str,
    key: str,
    record: dict[str, Any],
    columns: Columns,
    controls: set[str],
) -> None:
    """Write signatures.

    Args:
        path: Path of the table.
        conditions: Drugs in lines.
        shifts: Their shifts, `(conditions, width)`.
        space: `embeddings` or `expression`.
        key: Slot of `obsm`, or name of the column of embeddings.
        record: Record of how the values were made.
        columns: Columns of obs of the screen.
        controls: Names of the controls.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(shifts, dtype=np.float32).ravel())
    table = pa.table(
        {
            "drug": [each.drug for each in conditions],
            "dose": [each.dose for each in conditions],
            "line": [each.line for each in conditions],
            "cells": [each.num_cells for each in conditions],
            SHIFT: pa.FixedSizeListArray.from_arrays(flat, shifts.shape[1]),
        }
    )
    facts = {"space": space, "key": key, "record": record, "columns": asdict(columns), "controls": digests(controls)}
    with WholeFile(path) as partial:
        pq.write_table(table.replace_schema_metadata({_META: json.dumps(facts)}), partial)


def read_signatures(folder: str | Path, space: str | None) -> Stored:
    """Read the signatures of a folder.

    Args:
        folder: Folder that `make_signatures` has written.
        space: `embeddings` or `expression`; by default that which is there, embeddings first.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds no such signatures.
    """
    import pyarrow.parquet as pq

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"signatures={folder} does not exist: make it by tahoex1 signatures.")
    names = [space] if space is not None else [EMBEDDINGS, EXPRESSION]
    path = next((folder / f"{name}.parquet" for name in names if (folder / f"{name}.parquet").is_file()), None)
    if path is None:
        raise ValueError(f"signatures={folder} holds no signatures of {' or '.join(names)} (no {names[0]}.parquet).")
    with reading(path):
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {})[_META])
        shifts = table[SHIFT].combine_chunks()
        values = shifts.flatten().to_numpy().reshape(len(table), -1)
    drugs = table["drug"].to_pylist()
    names = [f"{drug} {dose}".strip() for drug, dose in zip(drugs, table["dose"].to_pylist(), strict=True)]
    lines = np.array(table["line"].to_pylist(), dtype=object)
    library = Library(np.array(names, dtype=object), lines, values)
    columns = Columns(**facts["columns"])
    return Stored(
        library, facts["space"], facts["record"], values.shape[1], facts["key"], columns, set(facts["controls"]), drugs
    )
