# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The two sets of cells, reference and query: their columns, their counts, and whether they go together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.annotation.labels import ORIGINS
from tahoex1_hf.cells.encoding import CHUNK_CELLS
from tahoex1_hf.cells.opening import read_obs_column, read_obs_names
from tahoex1_hf.cells.readers.base import INDEX, CellInput
from tahoex1_hf.cells.rows import pick_cells
from tahoex1_hf.common.reading import reading
from tahoex1_hf.finetuning.cells.baselines import log_normalized

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

# Share of the known genes of either side that the other must have, and that below which a warning is given.
_FEW, _SOME = 0.1, 0.75


@dataclass(frozen=True, eq=False)
class Side:
    """Reference or query.

    Attributes:
        role: `reference` or `query`.
        cells: The opened cells.
        obs: The columns of obs that are read, with the names of the cells as index.
    """

    role: str
    cells: CellInput
    obs: "pd.DataFrame"

    @property
    def where(self) -> str:
        """Name for messages."""
        return self.cells.path

    def column(self, name: str, argument: str) -> "pd.Series":
        """Return a column of obs.

        Raises:
            ValueError: If there is none of that name.
        """
        if name not in self.obs:
            raise ValueError(
                f"{argument}={name} is not a column of obs of {self.where}; there are "
                f"{', '.join(sorted(self.cells.obs_columns))}."
            )
        return self.obs[name]


def read_obs(path: str, wanted: Sequence[str]) -> "pd.DataFrame":
    """Read columns of obs of a file, and those of `ORIGINS`, as far as they are there; the index holds the names."""
    import pandas as pd

    there = read_obs_names(path)
    names = [name for name in dict.fromkeys([*wanted, *ORIGINS]) if name in there]
    index = pd.Index(read_obs_column(path, INDEX, "name").astype(str))
    columns = {name: read_obs_column(path, name, "obs").array for name in names}
    return pd.DataFrame(columns, index=index)


def check_sides(reference: Side, query: Side) -> tuple[np.ndarray, list[str]]:
    """Return the tokens of the genes that both sides have, rising, and a sentence where these are few.

    Raises:
        ValueError: If a side holds no counts, or the genes of the two hardly overlap.
    """
    tokens = []
    for side in (reference, query):
        seen = side.cells.seen
        if seen is not None and seen.doubt is not None and side.cells.tokenizer.value_encoding != "raw":
            raise ValueError(
                f"{side.where} ({side.role}): no raw counts: {seen.doubt}{side.cells.count_hint()} Distances between "
                "cells of counts and of other values mean nothing."
            )
        if side.cells.genes is None:
            raise ValueError(f"{side.where} ({side.role}) has no table of genes: pass an .h5ad file.")
        ids = np.asarray(side.cells.genes.token_ids)
        tokens.append(np.unique(ids[ids >= 0]))
    shared = np.intersect1d(tokens[0], tokens[1])
    larger = max(len(each) for each in tokens)
    if len(shared) < _FEW * larger or not len(shared):
        raise ValueError(
            f"{reference.where} (reference) and {query.where} (query) share {len(shared)} of the genes that the model "
            f"knows; they have {len(tokens[0])} and {len(tokens[1])}. Cells seen by different genes cannot be "
            "compared: choose another reference."
        )
    if len(shared) >= _SOME * larger:
        return shared, []
    return shared, [
        f"Reference and query share {len(shared)} of the {len(tokens[0])} and {len(tokens[1])} genes that the model "
        "knows: embeddings of the one are made from genes that the other lacks."
    ]


def read_values(cells: CellInput, numbers: np.ndarray, tokens: np.ndarray) -> "csr_matrix":
    """Return log-normalised counts of some cells and genes, which stay sparse.

    Args:
        cells: Opened cells.
        numbers: Numbers of the cells, `(picked,)`, in any order.
        tokens: Tokens of the genes, rising, `(genes,)`.

    Returns:
        `(picked, genes)` float32, in the order of `numbers`.
    """
    from scipy.sparse import csr_matrix, vstack

    with reading(cells.path):
        cells.sort_by_cell()
    rising = np.sort(numbers)
    column_of = np.full(len(cells.tokenizer), -1, dtype=np.int64)
    column_of[tokens] = np.arange(len(tokens))
    parts: list[Any] = [csr_matrix((0, len(tokens)), dtype=np.float32)]
    at = 0
    for chunk in cells.chunks(0, cells.num_cells, CHUNK_CELLS):
        upto = int(np.searchsorted(rising, chunk.first_cell + chunk.num_cells))
        if upto > at:
            rows = pick_cells(chunk, rising[at:upto] - chunk.first_cell)
            columns = column_of[rows.tokens]
            kept = columns >= 0
            offsets = np.concatenate([[0], np.cumsum(kept)])[rows.offsets]
            shape = (upto - at, len(tokens))
            found = csr_matrix((rows.counts[kept].astype(np.float32), columns[kept], offsets), shape=shape)
            found.sort_indices()
            parts.append(log_normalized(found))
        at = upto
    order = np.empty(len(numbers), dtype=np.int64)
    order[np.argsort(numbers, kind="stable")] = np.arange(len(numbers))
    return csr_matrix(vstack(parts, format="csr")[order])
