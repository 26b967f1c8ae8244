# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A check of some cells before the work begins: how much unknown genes would lose, and whether values are counts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from tahoex1_hf.cells.counts import doubt, in_memory
from tahoex1_hf.cells.gene_search import FoundGenes

# All cells of a small input are checked. In other inputs, this many cells are checked, from this many places.
_CELLS, _PLACES = 256, 8
# A larger share of the counts in genes that are not in the vocabulary causes a warning.
MUCH = 0.05


@dataclass(frozen=True)
class Seen:
    """The result of the check.

    Attributes:
        cells: Number of cells that were checked.
        unknown_genes: Number of genes that are not in the vocabulary.
        genes: Number of genes.
        lost: Share of the counts in genes that are not in the vocabulary.
        most: Up to ten of these genes, those with the most counts, and their shares of all counts.
        doubt: Description of the values if they do not look like counts; otherwise None.
    """

    cells: int
    unknown_genes: int
    genes: int
    lost: float
    most: tuple[tuple[str, float], ...]
    doubt: str | None

    def losses(self, of_all: bool) -> str:
        """Return a sentence that says what is lost; `of_all` tells whether all cells were checked."""
        cells = "" if of_all else f" (in {self.cells} cells)"
        names = ", ".join(f"{name} {share:.1%}" for name, share in self.most)
        return (
            f"{self.unknown_genes} of {self.genes} genes ({self.unknown_genes / self.genes:.1%}) are not in the "
            f"vocabulary and are left out, with {self.lost:.1%} of the counts{cells}"
            f"{f'. Most counts have {names}' if names else ''}."
        )


def places_to_look(num_cells: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of evenly spaced ranges of cells to check."""
    if num_cells <= _CELLS:
        yield 0, num_cells
        return
    size = _CELLS // _PLACES
    for start in np.linspace(0, num_cells - size, _PLACES).astype(np.int64).tolist():
        yield start, start + size


def look(matrices: Iterable[Any], found: FoundGenes) -> Seen:
    """Check some cells.

    Args:
        matrices: `(cells, genes)` values of some cells, CSR or dense.
        found: Genes of the columns.
    """
    lost = found.is_gene & (found.match.token_ids < 0)
    sums = np.zeros(len(lost))
    values, lengths, cells = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], 0
    for matrix in matrices:
        given = in_memory(matrix)
        if given.dtype == np.float16 or not given.dtype.isnative:  # scipy has no sparse matrices of these types
            given = given.astype(np.float64)
        rows = csr_matrix(given)
        good = np.isfinite(rows.data) & (rows.data > 0) & found.is_gene[rows.indices]
        data = rows.data.astype(np.float64)[good]
        if lost.any():
            sums += np.bincount(rows.indices[good], weights=data, minlength=len(lost))
        values.append(data)
        lengths.append(np.diff(np.concatenate([[0], np.cumsum(good)])[rows.indptr]))
        cells += rows.shape[0]
    total = max(float(sums.sum()), 1e-300)
    order = np.flatnonzero(lost)[np.argsort(-sums[lost], kind="stable")[:10]]
    return Seen(
        cells=cells,
        unknown_genes=int(lost.sum()),
        genes=int(found.is_gene.sum()),
        lost=float(sums[lost].sum()) / total,
        most=tuple((str(found.names[place]), float(sums[place]) / total) for place in order if sums[place]),
        doubt=doubt(np.concatenate(values), np.concatenate([[0], np.cumsum(np.concatenate(lengths))])),
    )
