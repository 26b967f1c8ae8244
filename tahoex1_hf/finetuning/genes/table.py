# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Genes with labels: a table with a row per gene, from which the genes that the cells express are kept."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tahoex1_hf.common.texts import MISSING, as_text
from tahoex1_hf.finetuning.cells.labels import class_labels, group_names
from tahoex1_hf.finetuning.config import GeneClassificationConfig
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class GeneTable:
    """The labelled genes that some cell expresses; a row is a number among these, 0 to `len - 1`.

    Attributes:
        names: Ensembl ids as the table writes them, shape `(genes,)`.
        tokens: Token ids, each once, shape `(genes,)`, int64.
        labels: Class numbers, shape `(genes,)`, int64.
        classes: Names of the classes.
        groups: Names of the genes' groups (protein families), shape `(genes,)`; None without groups.
        parts: `"train"`, `"validation"` or `"test"` for each gene, shape `(genes,)`, where a column says so.
        num_cells: Number of cells that express the gene, shape `(genes,)`, int64.
        left_out: Reason -> number of rows of the table that are left out.
    """

    names: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    classes: list[str]
    groups: np.ndarray | None
    parts: np.ndarray | None
    num_cells: np.ndarray
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.names)


def read_gene_table(
    config: GeneClassificationConfig, tokenizer: TahoeX1Tokenizer, cells_expressing: np.ndarray
) -> GeneTable:
    """Read the table of a run.

    Args:
        config: Configuration of the run.
        tokenizer: Tokenizer of the base.
        cells_expressing: Number of cells that express the gene of each token, shape `(vocabulary,)`.

    Raises:
        FileNotFoundError: For a table that does not exist.
        ValueError: For columns or labels that cannot be used, and where no labelled gene is expressed.
    """
    table = _read(config)
    left_out = {"without a label": len(table)}
    table = table[_present(table[config.label])]
    left_out["without a label"] -= len(table)
    tokens = _tokens(table, config, tokenizer)
    left_out["not in the vocabulary"] = int((tokens < 0).sum())
    table, tokens = table[tokens >= 0], tokens[tokens >= 0]
    table, tokens = _without_repeats(table, tokens, config, left_out)
    expressed = cells_expressing[tokens] > 0
    left_out["expressed in no cell"] = int((~expressed).sum())
    table, tokens = table[expressed], tokens[expressed]
    if not len(table):
        raise ValueError(f"genes={config.genes}: no gene with a label is expressed in {config.data} ({left_out}).")
    found = class_labels(table[config.label], config, "genes")
    left_out["of a rare class"] = len(table) - len(found.rows)
    assert found.classes is not None
    groups = None if config.group is None else group_names(table[config.group], found.rows, config.group, "genes")
    table, tokens = table.iloc[found.rows], tokens[found.rows]
    parts = None if config.split is None else as_text(table[config.split]).to_numpy(dtype=object)
    for reason, number in left_out.items():
        if number:
            logger.warning("%d genes of %s are left out: %s.", number, config.genes, reason)
    return GeneTable(
        table[config.genes_id_column].astype(str).to_numpy(dtype=object),
        tokens,
        found.values,
        found.classes,
        groups,
        parts,
        cells_expressing[tokens].astype(np.int64),
        left_out,
    )


def _read(config: GeneClassificationConfig) -> "pd.DataFrame":
    from tahoex1_hf.data.vocabulary import read_table

    path = Path(str(config.genes))
    if not path.is_file():
        raise FileNotFoundError(f"genes={config.genes} does not exist.")
    table = read_table(path)
    for role, column in (
        ("genes_id_column", config.genes_id_column),
        ("label", config.label),
        ("group", config.group),
        ("split", config.split),
    ):
        if column is not None and column not in table:
            raise ValueError(f"{role}={column} is not a column of {path}; there are {', '.join(map(str, table))}.")
    return table


def _present(column: "pd.Series") -> np.ndarray:
    text = column.astype(object)
    return np.asarray(text.notna() & ~text.astype(str).isin(MISSING), dtype=bool)


def _tokens(table: "pd.DataFrame", config: GeneClassificationConfig, tokenizer: TahoeX1Tokenizer) -> np.ndarray:
    names = table[config.genes_id_column]
    try:
        return tokenizer.match_genes(names.astype(str)).token_ids
    except ValueError as error:
        raise ValueError(f"genes={config.genes}, genes_id_column={config.genes_id_column}: {error}") from error


def _without_repeats(
    table: "pd.DataFrame", tokens: np.ndarray, config: GeneClassificationConfig, left_out: dict[str, int]
) -> tuple["pd.DataFrame", np.ndarray]:
    """Keep one row of each gene.

    Raises:
        ValueError: If the rows of a gene contradict each other.
    """
    _, first, row = np.unique(tokens, return_index=True, return_inverse=True)
    for column in (config.label, config.group, config.split):
        if column is None:
            continue
        values = as_text(table[column])
        differs = values.to_numpy() != values.to_numpy()[first][row]
        if differs.any():
            name = table[config.genes_id_column].iloc[int(np.flatnonzero(differs)[0])]
            raise ValueError(f"genes={config.genes}: {name} occurs twice, with another {column}: keep one row.")
    keep = np.sort(first)
    left_out["repeated"] = len(tokens) - len(keep)
    return table.iloc[keep], tokens[keep]
