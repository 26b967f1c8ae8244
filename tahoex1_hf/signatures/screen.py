# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A screen of drugs: values of its cells, the drugs' cells, and the controls of the same line and plate."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.benchmarking.cells import read_cells, variable_genes
from tahoex1_hf.embedding.stored import StoredEmbeddings, open_embeddings

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

EMBEDDINGS, EXPRESSION = "embeddings", "expression"
_MOST = 5000  # cells of a drug on a plate, or of a plate's controls, that are read: a random sample
_CHUNK = 4096
_SHARED = 0.8  # least share of a signature's genes that other cells must have
ALL = "all"


@dataclass(frozen=True)
class Columns:
    """Columns of obs that say what was done to a cell.

    Attributes:
        drug: Column with the drugs.
        dose: Column with the doses; None where a drug has one.
        line: Column with the cell lines; None for one line.
        plate: Column with the plates; None for one plate, or where none are known.
        control: Name of the controls in the column of drugs.
    """

    drug: str
    dose: str | None = None
    line: str | None = None
    plate: str | None = None
    control: str = "DMSO_TF"

    def named(self) -> dict[str, str]:
        """Return the columns that are given, by the names of the arguments."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "control"}
        return {name: column for name, column in found.items() if column is not None}


@dataclass(frozen=True, eq=False)
class Space:
    """Values of cells in which shifts are measured.

    Attributes:
        name: `embeddings` or `expression`.
        values: `(cells, width)` float32, which may lie on disk.
        record: Record of how embeddings were made; of expression, the genes and the sum to which counts are scaled.
    """

    name: str
    values: np.ndarray
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Part:
    """The cells of a drug in one line, on one plate.

    Attributes:
        stratum: Number of line and plate.
        halves: Numbers of its cells, in two random halves.
    """

    stratum: int
    halves: tuple[np.ndarray, np.ndarray]

    @property
    def rows(self) -> np.ndarray:
        """Numbers of all its cells."""
        return np.concatenate(self.halves)


@dataclass(frozen=True, eq=False)
class Condition:
    """A drug, at a dose, in a line.

    Attributes:
        drug: Name of the drug.
        dose: Dose as text; empty where doses are not told apart.
        line: Name of the line.
        parts: Its cells on each plate.
    """

    drug: str
    dose: str
    line: str
    parts: list[Part]

    @property
    def name(self) -> str:
        """Drug and dose."""
        return f"{self.drug} {self.dose}".strip()

    @property
    def num_cells(self) -> int:
        """Number of its cells."""
        return sum(len(part.rows) for part in self.parts)

    def weights(self) -> np.ndarray:
        """Return the share of each plate, `(parts,)`."""
        sizes = np.array([len(part.rows) for part in self.parts], dtype=np.float64)
        return sizes / sizes.sum()


@dataclass(frozen=True, eq=False)
class Screen:
    """Drugs and their controls.

    Attributes:
        where: Path, for messages.
        conditions: Drugs, at each dose and in each line.
        controls: Numbers of each stratum's controls, in two random halves.
        strata: Line and plate of each stratum.
        names: Names of the controls that are used.
        notes: Sentences on what was left out.
    """

    where: str
    conditions: list[Condition]
    controls: list[tuple[np.ndarray, np.ndarray]]
    strata: list[tuple[str, str]]
    names: set[str]
    notes: list[str]


def check_columns(where: str, there: Sequence[str], columns: Columns) -> None:
    """Raise ValueError if a column is missing; the message names those that are there."""
    for argument, name in columns.named().items():
        if name not in there:
            raise ValueError(
                f"{argument}={name} (--{argument}) is not a column of obs of {where}; there are {', '.join(there)}."
            )


def open_space(
    path: str | Path, space: str, key: str, columns: Columns, folder: Path, like: dict[str, Any] | None = None
) -> tuple[Space, "pd.DataFrame"]:
    """Open the cells of a screen; their values are written into a folder, so that they need not fit into memory.

    Args:
        path: `.parquet`, `.h5ad` or `.zarr` with embeddings, or an `.h5ad` with raw counts for expression.
        space: `embeddings` or `expression`.
        key: Slot of `obsm`, or name of the column of embeddings.
        columns: Columns of obs.
        folder: Folder for the values.
        like: Record of the expression that other cells are compared with; None for the first.

    Returns:
        The values, and the columns of obs with the names of the cells as index.

    Raises:
        ValueError: If a column is missing, or the cells cannot be read so.
    """
    if space == EXPRESSION:
        return _open_expression(Path(path), columns, folder, like)
    stored = open_embeddings(path, key)
    check_columns(stored.path, list(stored.columns), columns)
    return _open_embeddings(stored, columns, folder)


def _open_embeddings(stored: StoredEmbeddings, columns: Columns, folder: Path) -> tuple[Space, "pd.DataFrame"]:
    import pandas as pd

    values = np.lib.format.open_memmap(folder / "embeddings.npy", "w+", np.float32, (stored.num_cells, stored.width))
    frames, at = [], 0
    for piece in stored.pieces():
        values[at : at + len(piece.names)] = piece.embeddings
        at += len(piece.names)
        part = piece.columns.select(list(dict.fromkeys(columns.named().values()))).to_pandas()
        frames.append(part.set_index(pd.Index(piece.names.to_pylist())))
    return Space(EMBEDDINGS, values, stored.record), pd.concat(frames)


def _open_expression(
    path: Path, columns: Columns, folder: Path, like: dict[str, Any] | None
) -> tuple[Space, "pd.DataFrame"]:
    """Write log-normalised counts of the most variable genes, or of those of `like`.

    Counts are scaled to the median of the cells' sums: scaled to 10,000, the few molecules of a targeted panel would
    make the difference between 0 and 1 larger than any other.
    """
    from scipy.sparse import csr_matrix, diags

    if path.suffix != ".h5ad":
        raise ValueError(f"{path}: expression is read from .h5ad files with raw counts.")
    cells = read_cells(path)
    check_columns(str(path), list(map(str, cells.adata.obs.columns)), columns)
    sums = np.asarray(cells.adata.X.sum(axis=1), dtype=np.float64).ravel()
    scaled_to = float(np.median(sums)) if like is None else like["scaled_to"]
    scales = np.divide(scaled_to, sums, out=np.zeros_like(sums), where=sums > 0)
    normalized = csr_matrix(diags(scales) @ cells.adata.X.astype(np.float64)).log1p()
    own = cells.genes.tolist()
    genes = [own[number] for number in variable_genes(normalized)] if like is None else like["genes"]
    place = {name: number for number, name in enumerate(own)}
    known = [name for name in genes if name in place]
    if len(known) < _SHARED * len(genes):
        raise ValueError(
            f"{path} has {len(known)} of the {len(genes)} genes of the signatures: cells seen by other genes cannot "
            "be compared with them."
        )
    values = np.lib.format.open_memmap(folder / "expression.npy", "w+", np.float32, (len(sums), len(genes)))
    to, of = np.flatnonzero([name in place for name in genes]), [place[name] for name in known]
    for start in range(0, len(sums), _CHUNK):
        values[start : start + _CHUNK, to] = normalized[start : start + _CHUNK][:, of].toarray()
    names = list(dict.fromkeys(columns.named().values()))
    frame = cells.adata.obs[names].set_axis(cells.adata.obs_names.astype(str))
    return Space(EXPRESSION, values, {"genes": genes, "scaled_to": scaled_to}), frame


def make_screen(
    where: str, obs: "pd.DataFrame", columns: Columns, min_cells: int, drop_few: bool, seed: int
) -> Screen:
    """Find the drugs and their controls, and halve both at random.

    Args:
        where: Path, for messages.
        obs: Columns of obs, with the names of the cells as index.
        columns: Names of the columns.
        min_cells: Fewest cells of a drug on a plate, and of the controls of a line on a plate.
        drop_few: Whether lines on plates with fewer controls are left out; otherwise they are an error.
        seed: Seed of the halves.

    Raises:
        ValueError: If there are no controls or too few, no drugs, or one plate only; the message says what to do.
    """
    named = columns.named()
    for argument, name in named.items():
        if obs[name].isna().any():
            raise ValueError(f"{argument}={name} of {where} has missing values: remove these cells.")
    keys = {argument: obs[name].astype(str).to_numpy(dtype=object) for argument, name in named.items()}
    if columns.plate is not None and len(set(keys["plate"])) == 1:
        raise ValueError(
            f"plate={columns.plate} (--plate) of {where} has one value, {keys['plate'][0]}: what a plate does cannot "
            "be told from what a drug does. Leave plate out to go on all the same."
        )
    if columns.control not in set(keys["drug"]):
        some = ", ".join(sorted(set(keys["drug"]))[:20])
        raise ValueError(
            f"control={columns.control} (--control) is no value of {columns.drug} of {where}; there are {some}."
        )
    none = np.full(len(obs), ALL, dtype=object)
    lines, plates = keys.get("line", none), keys.get("plate", none)
    doses = keys.get("dose", np.full(len(obs), "", dtype=object))
    random = np.random.default_rng(seed)
    # Groups and cells by name, so that the halves do not depend on the order of the file.
    order = np.argsort(obs.index.to_numpy(dtype=str), kind="stable")
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for row in order.tolist():
        dose = "" if keys["drug"][row] == columns.control else doses[row]
        groups.setdefault((keys["drug"][row], dose, lines[row], plates[row]), []).append(row)
    halves = {key: _halves(np.array(groups[key]), random) for key in sorted(groups)}
    strata = sorted({key[2:] for key in halves})
    sizes = {stratum: len(groups.get((columns.control, "", *stratum), [])) for stratum in strata}
    few = [stratum for stratum in strata if sizes[stratum] < min_cells]
    notes = []
    if few:
        listed = "; ".join(f"{' '.join(_shown(stratum))}: {sizes[stratum]}" for stratum in few[:5])
        if not drop_few or len(few) == len(strata):
            raise ValueError(
                f"{where}: too few controls ({columns.control}) for {len(few)} of {len(strata)} lines on plates "
                f"({listed}); {min_cells} are needed (min_cells, --min-cells). Leave these cells out "
                "(drop_few, --drop-few)."
            )
        notes.append(
            f"{len(few)} of {len(strata)} lines on plates have fewer than {min_cells} controls and are left out."
        )
    kept = [stratum for stratum in strata if stratum not in few]
    conditions, lost = _conditions(halves, columns.control, kept, min_cells)
    if not conditions:
        raise ValueError(f"{where}: no drug has {min_cells} cells (min_cells, --min-cells) on a plate with controls.")
    if lost:
        notes.append(f"{lost} drugs in a line on a plate have fewer than {min_cells} cells and are left out.")
    controls = [halves[(columns.control, "", *stratum)] for stratum in kept]
    index = obs.index.to_numpy(dtype=str)
    names = {name for pair in controls for half in pair for name in index[half].tolist()}
    return Screen(where, conditions, controls, kept, names, notes)


def _shown(stratum: tuple[str, str]) -> Iterator[str]:
    return (name for name in stratum if name != ALL)


def _halves(rows: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mixed = random.permutation(rows)[:_MOST]
    return np.sort(mixed[: len(mixed) // 2]), np.sort(mixed[len(mixed) // 2 :])


def _conditions(
    halves: dict[tuple[str, str, str, str], tuple[np.ndarray, np.ndarray]],
    control: str,
    strata: list[tuple[str, str]],
    min_cells: int,
) -> tuple[list[Condition], int]:
    found: dict[tuple[str, str, str], list[Part]] = {}
    lost = 0
    for key, pair in halves.items():
        if key[0] == control or key[2:] not in strata:
            continue
        if sum(map(len, pair)) < min_cells:
            lost += 1
            continue
        found.setdefault(key[:3], []).append(Part(strata.index(key[2:]), pair))
    return [Condition(*key, parts) for key, parts in found.items()], lost
