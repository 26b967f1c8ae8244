# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The drug table of a model: numbers of the drugs, and Morgan fingerprints of their molecules."""

import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tahoex1_hf.data.vocabulary import read_table, write_files

logger = logging.getLogger(__name__)

NO_DRUG = "<pad>"
TABLE_FILE, FINGERPRINT_FILE = "drug_to_id_pad.json", "drug_fps_pad.npy"  # the original's names
DRUG, SMILES = "drug", ("canonical_smiles", "smiles")  # columns of a table, in order of preference
RADIUS = 2  # radius in bonds of the original's Morgan fingerprints


@dataclass(frozen=True)
class DrugTable:
    """The drug table that was written.

    Attributes:
        drug_to_id: Drug -> row of the fingerprints; `<pad>`, for no drug, is row 0.
        without_smiles: Drugs that were left out because they have no SMILES.
    """

    drug_to_id: dict[str, int]
    without_smiles: list[str]


def drug_fingerprints(
    table: Path,
    output: Path,
    *,
    drug_column: str = DRUG,
    smiles_column: str = SMILES[0],
    radius: int = RADIUS,
    num_bits: int = 2048,
    overwrite: bool = False,
) -> DrugTable:
    """Write `drug_to_id_pad.json` and `drug_fps_pad.npy` (float32 zeros and ones, row 0 zeros) into a folder.

    Args:
        table: `.csv`, `.tsv` (also `.gz`) or `.parquet` with drugs and SMILES. The drugs keep its order; those without
            a SMILES are left out.
        output: Folder to write to; made where it does not exist.
        drug_column: Column with the names of the drugs.
        smiles_column: Column with the SMILES.
        radius: Radius of the Morgan fingerprints, in bonds.
        num_bits: Length of the fingerprints.
        overwrite: Whether to replace files that hold something else.

    Raises:
        FileExistsError: If a file holds something else and `overwrite` is not set; nothing is written then.
        FileNotFoundError: If there is no `table`.
        ImportError: If rdkit is not installed.
        ValueError: For a SMILES that cannot be read, and for a drug that occurs twice with different SMILES.
    """
    if radius < 0 or num_bits < 1:
        raise ValueError(f"radius={radius}, num_bits={num_bits}: pass a radius from 0, and at least one bit.")
    smiles, without = _read_smiles(Path(table), drug_column, [smiles_column])
    fingerprints = np.concatenate([np.zeros((1, num_bits), np.float32), _morgan(smiles, radius, num_bits, str(table))])
    drug_to_id = {name: number for number, name in enumerate([NO_DRUG, *smiles])}
    folder, array = Path(output), io.BytesIO()
    np.save(array, fingerprints)
    contents = {folder / FINGERPRINT_FILE: array.getvalue(), folder / TABLE_FILE: json.dumps(drug_to_id).encode()}
    write_files(contents, overwrite)
    return DrugTable(drug_to_id, without)


def read_fingerprints(table: str | Path | Mapping[str, str], num_bits: int) -> dict[str, np.ndarray]:
    """Return the fingerprints of a table's drugs, made as those of the original.

    Args:
        table: Path of a table with the columns `drug` and `canonical_smiles` (or `smiles`), as for
            `drug_fingerprints`; or a mapping drug -> SMILES.
        num_bits: Length of the fingerprints.

    Returns:
        Drug, without blanks around its name -> fingerprint `(num_bits,)`, float32 zeros and ones.

    Raises:
        FileNotFoundError, ImportError, ValueError: As for `drug_fingerprints`.
    """
    if isinstance(table, Mapping):
        source, smiles = "drug_table", _check_smiles("drug_table", table.items())[0]
    else:
        source, smiles = str(table), _read_smiles(Path(table), DRUG, SMILES)[0]
    return {name.strip(): row for name, row in zip(smiles, _morgan(smiles, RADIUS, num_bits, source), strict=True)}


class _Smiles(NamedTuple):
    """A SMILES, and the number of its row."""

    text: str
    row: int


def _read_smiles(path: Path, drug_column: str, smiles_columns: Sequence[str]) -> tuple[dict[str, _Smiles], list[str]]:
    """Return drug -> SMILES in the order of the table, and the drugs without a SMILES."""
    table = read_table(path)
    columns = list(map(str, table.columns))
    smiles_column = next((name for name in smiles_columns if name in columns), None)
    if drug_column not in columns or smiles_column is None:
        missing = drug_column if drug_column not in columns else smiles_columns[0]
        also = "".join(f" (or {name!r})" for name in smiles_columns[1:] if missing == smiles_columns[0])
        raise ValueError(f"{path} has no column {missing!r}{also}, only {columns}: name the column.")
    return _check_smiles(f"{path}", zip(table[drug_column], table[smiles_column], strict=True))


def _check_smiles(source: str, rows: Iterable[tuple[Any, Any]]) -> tuple[dict[str, _Smiles], list[str]]:
    """Return what `_read_smiles` does, given pairs of drug and SMILES; warn of drugs without a SMILES."""
    smiles: dict[str, _Smiles] = {}
    first: dict[str, str] = {}  # name without the blanks around it -> SMILES
    without: dict[str, None] = {}
    for number, (name, value) in enumerate(rows):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{source}: row {number} names no drug: {name!r}.")
        if name.strip() == NO_DRUG:
            raise ValueError(f"{source}: row {number} names a drug {NO_DRUG!r}, which stands for no drug: rename it.")
        text = value.strip() if isinstance(value, str) else ""
        if not text:
            without[name] = None
            continue
        if (other := first.setdefault(name.strip(), text)) != text:
            raise ValueError(
                f"{source}: {name.strip()!r} occurs twice, with the SMILES {other!r} and, in row {number}, {text!r}: "
                "keep one."
            )
        smiles.setdefault(name, _Smiles(text, number))
    if not smiles:
        raise ValueError(f"{source}: no drug has a SMILES.")
    lacking = [name for name in without if name.strip() not in first]
    if lacking:
        logger.warning("%s: %d drugs have no SMILES and are left out: %s", source, len(lacking), ", ".join(lacking))
    return smiles, lacking


def _morgan(smiles: Mapping[str, _Smiles], radius: int, num_bits: int, source: str) -> np.ndarray:
    """Return float32 fingerprints, `(drugs, num_bits)`; the original uses them as an embedding unchanged."""
    try:
        from rdkit.Chem import MolFromSmiles
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
    except ImportError as error:
        raise ImportError("Fingerprints need rdkit: pip install 'tahoex1_hf[drugs]'.") from error
    generator = GetMorganGenerator(radius=radius, fpSize=num_bits)
    fingerprints = np.zeros((len(smiles), num_bits), dtype=np.float32)
    wrong = []
    with _quiet_rdkit():
        for place, (name, (text, row)) in enumerate(smiles.items()):
            molecule = MolFromSmiles(text)
            if molecule is None or not molecule.GetNumAtoms():
                wrong.append(f"row {row}, {name!r}: {text!r}")
            else:
                fingerprints[place] = generator.GetFingerprintAsNumPy(molecule)
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} SMILES cannot be read (rows are counted from 0, below the heading): "
            f"{'; '.join(wrong)}. Mend them, or empty the cells to leave the drugs out."
        )
    return fingerprints


@contextmanager
def _quiet_rdkit() -> Iterator[None]:
    """Keep rdkit from writing to the terminal, since our own error reports the same."""
    from rdkit.rdBase import BlockLogs

    with BlockLogs():
        yield
