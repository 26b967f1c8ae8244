# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Genes with a label, essential or not, and with the protein family of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tahoex1_hf.data.vocabulary import read_table

if TYPE_CHECKING:
    import pandas as pd

_IDS = ("ensembl_gene_id", "ensembl", "ensembl_id", "gene_id")
_KEYS = ("gene_key", "HGNC_ID", *_IDS)  # columns by which the table of families is joined
_LABEL, _FAMILY = "label", "cluster_id"


@dataclass(frozen=True, eq=False)
class LabelledGenes:
    """Genes with labels.

    Attributes:
        names: Ensembl ids, each once, shape `(genes,)`.
        labels: 1 for essential genes, 0 for others, shape `(genes,)`.
        families: Protein family of each gene, shape `(genes,)`.
        left_out: Reason -> number of genes that are left out.
    """

    names: np.ndarray
    labels: np.ndarray
    families: np.ndarray
    left_out: dict[str, int]

    def some(self, kept: np.ndarray, reason: str) -> "LabelledGenes":
        """Return the genes for which `kept`, shape `(genes,)`, is true; the others are counted under a reason.

        Raises:
            ValueError: If no gene of one of the two kinds is left.
        """
        left_out = self.left_out | {reason: int((~kept).sum())}
        found = LabelledGenes(self.names[kept], self.labels[kept], self.families[kept], left_out)
        if len(np.unique(found.labels)) < 2:
            raise ValueError(f"--labels: of {len(found.labels)} genes that are left, all have one label ({left_out}).")
        return found


def read_gene_labels(paths: Sequence[Path], families: Path) -> LabelledGenes:
    """Read labels of genes.

    Args:
        paths: One table with a column `label` (1 essential, 0 not, missing for neither); or two tables, of essential
            genes and of others. The Ensembl ids are in `ensembl_gene_id`, `ensembl`, `ensembl_id` or `gene_id`.
        families: Table with the protein family of each gene in `cluster_id`; it shares a column `gene_key` (HGNC id)
            or a column of Ensembl ids with the labels.

    Raises:
        FileNotFoundError: If a table does not exist.
        ValueError: If a column is missing, or a gene has two labels.
    """
    import pandas as pd

    tables = [read_table(path) for path in paths]
    if len(tables) == 1 and _LABEL not in tables[0]:
        raise ValueError(f"--labels {paths[0]} has no column {_LABEL}; there are {', '.join(map(str, tables[0]))}.")
    if len(tables) > 2:
        raise ValueError(
            f"--labels: {len(tables)} tables; pass one with a column {_LABEL}, or essential genes and others."
        )
    if len(tables) == 2:
        tables = [table.assign(**{_LABEL: 1 - number}) for number, table in enumerate(tables)]
    table = pd.concat(tables, ignore_index=True)
    column = _column(table, _IDS, f"--labels {paths[0]}")
    left_out = {"without a label": int(table[_LABEL].isna().sum())}
    table = table[table[_LABEL].notna() & table[column].notna()]
    _check_labels(table, column, paths)
    table = table.drop_duplicates(column)
    family = _families(table, families)
    found = LabelledGenes(
        table[column].astype(str).to_numpy(dtype=str),
        table[_LABEL].astype(int).to_numpy(),
        family.astype(str).to_numpy(dtype=object),
        left_out,
    )
    return found.some(family.notna().to_numpy(), "without a family")


def _check_labels(table: "pd.DataFrame", column: str, paths: Sequence[Path]) -> None:
    if not table[_LABEL].isin((0, 1)).all():
        raise ValueError(f"--labels {paths[0]}: the column {_LABEL} must hold 1, 0 or nothing.")
    twice = table.groupby(column)[_LABEL].nunique()
    if (twice > 1).any():
        raise ValueError(f"--labels: {twice.index[twice > 1][0]} is essential and not: remove one of its rows.")


def _families(table: "pd.DataFrame", path: Path) -> "pd.Series":
    """Return the family of each row of a table of genes; missing where there is none."""
    families = read_table(path)
    if _FAMILY not in families:
        raise ValueError(f"--families {path} has no column {_FAMILY}; there are {', '.join(map(str, families))}.")
    theirs = _column(families, _KEYS, f"--families {path}")
    same = _KEYS[:2] if theirs in _KEYS[:2] else _IDS
    ours = _column(table, same, "--labels")
    families = families.drop_duplicates([theirs, _FAMILY])
    if families[theirs].duplicated().any():
        raise ValueError(f"--families {path}: a gene is in two families, which would then not be disjoint.")
    return table[ours].map(families.set_index(theirs)[_FAMILY])


def _column(table: "pd.DataFrame", names: Sequence[str], where: str) -> str:
    for name in names:
        if name in table:
            return name
    raise ValueError(f"{where} has none of the columns {', '.join(names)}; there are {', '.join(map(str, table))}.")
