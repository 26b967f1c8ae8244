# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The drug table of a model: numbers of the drugs, and Morgan fingerprints of their molecules."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tahoex1_hf.data.vocabulary import read_table, write_files

logger = logging.getLogger(__name__)

NO_DRUG = "<pad>"
TABLE_FILE, FINGERPRINT_FILE = "drug_to_id_pad.json", "drug_fps_pad.npy"  # the names of the original


@dataclass(frozen=True)
class DrugTable:
    """The drug table that was written.

    Attributes:
        drug_to_id: drug -> row of the fingerprints; `<pad>`, for no drug, is row 0.
        without_smiles: drugs that were left out because they have no SMILES.
    """

    drug_to_id: dict[str, int]
    without_smiles: list[str]


def drug_fingerprints(
    table: Path,
    output: Path,
    *,
    drug_column: str = "drug",
    smiles_column: str = "canonical_smiles",
    radius: int = 2,
    num_bits: int = 2048,
    overwrite: bool = False,
) -> DrugTable:
    """Write `drug_to_id_pad.json` and `drug_fps_pad.npy` (float32 zeros and ones, row 0 zeros) into a folder.

    Args:
        table: `.csv`, `.tsv` (also `.gz`) or `.parquet` with drugs and SMILES. The drugs keep its order; those without
            a SMILES are left out.
        output: folder to write to; made where it does not exist.
        drug_column: column with the names of the drugs.
        smiles_column: column with the SMILES.
        radius: radius of the Morgan fingerprints, in bonds.
        num_bits: length of the fingerprints.
        overwrite: whether to replace files that hold something else.

    Raises:
        FileExistsError: where a file holds something else and `overwrite` is not set; nothing is written then.
        FileNotFoundError: where there is no `table`.
        ImportError: where rdkit is not installed.
        ValueError: for a SMILES that cannot be read, and for a drug that stands twice with different SMILES.
    """
    if radius < 0 or num_bits < 1:
        raise ValueError(f"radius={radius}, num_bits={num_bits}: pass a radius from 0, and at least one bit.")
    smiles, without = _read_smiles(Path(table), drug_column, smiles_column)
    if without:
        logger.warning("%d drugs have no SMILES and are left out: %s", len(without), ", ".join(without))
    fingerprints = _morgan(smiles, radius, num_bits)
    drug_to_id = {name: number for number, name in enumerate([NO_DRUG, *smiles])}
    folder, array = Path(output), io.BytesIO()
    np.save(array, fingerprints)
    contents = {folder / FINGERPRINT_FILE: array.getvalue(), folder / TABLE_FILE: json.dumps(drug_to_id).encode()}
    write_files(contents, overwrite)
    return DrugTable(drug_to_id, without)


def _read_smiles(path: Path, drug_column: str, smiles_column: str) -> tuple[dict[str, str], list[str]]:
    """Return drug -> SMILES in the order of the table, and the drugs without a SMILES."""
    table = read_table(path)
    for column in (drug_column, smiles_column):
        if column not in table.columns:
            raise ValueError(
                f"{path} has no column {column!r}, only {list(map(str, table.columns))}: name the column."
            )
    smiles: dict[str, str] = {}
    without: dict[str, None] = {}
    for number, (name, value) in enumerate(zip(table[drug_column], table[smiles_column], strict=True)):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: row {number} names no drug: {name!r}.")
        if name == NO_DRUG:
            raise ValueError(f"{path}: row {number} names a drug {NO_DRUG!r}, which stands for no drug: rename it.")
        text = value.strip() if isinstance(value, str) else ""
        if not text:
            without[name] = None
        elif smiles.setdefault(name, text) != text:
            raise ValueError(
                f"{path}: {name!r} stands twice, with the SMILES {smiles[name]!r} and {text!r}: keep one."
            )
    if not smiles:
        raise ValueError(f"{path}: no drug has a SMILES in column {smiles_column!r}.")
    return smiles, [name for name in without if name not in smiles]


def _morgan(smiles: dict[str, str], radius: int, num_bits: int) -> np.ndarray:
    """Return float32 fingerprints, `(drugs + 1, num_bits)`; the original uses them as an embedding unchanged."""
    try:
        from rdkit.Chem import MolFromSmiles
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
    except ImportError as error:
        raise ImportError("Fingerprints need rdkit: pip install 'tahoex1_hf[drugs]'.") from error
    generator = GetMorganGenerator(radius=radius, fpSize=num_bits)
    fingerprints = np.zeros((len(smiles) + 1, num_bits), dtype=np.float32)
    wrong = []
    with _quiet_rdkit():
        for row, (name, text) in enumerate(smiles.items(), start=1):
            molecule = MolFromSmiles(text)
            if molecule is None or not molecule.GetNumAtoms():
                wrong.append(f"{name!r}: {text!r}")
            else:
                fingerprints[row] = generator.GetFingerprintAsNumPy(molecule)
    if wrong:
        raise ValueError(
            f"{len(wrong)} SMILES cannot be read: {'; '.join(wrong)}. Mend them, or empty the cells to leave "
            "the drugs out."
        )
    return fingerprints


@contextmanager
def _quiet_rdkit() -> Iterator[None]:
    """Keep rdkit from writing to the terminal, since our error says it better."""
    from rdkit.rdBase import BlockLogs

    with BlockLogs():
        yield
