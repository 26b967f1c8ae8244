# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Predictions for chosen genes of cells, whether the cells express them or not.

A gene is always hidden while it is predicted, and so are at most as many genes as half the context holds. What else of
the cell fits is seen; of a cell with more genes, a sample by its content and the seed.
"""

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows, kept_genes
from tahoex1_hf.inference.expression import ExpressionPredictor, halves
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.perturbation.cells import PerturbationBatch, gene_places

# Most genes that are asked for in one pass: a cell of 1,000 genes keeps nearly all of them as context.
_GROUP = 64


class TargetPredictor:
    """Predictor of the expression of chosen genes.

    Args:
        predictor: Model that predicts expression.
        seed: Seed of halves and samples.
    """

    def __init__(self, predictor: ExpressionPredictor, seed: int = 0):
        self.predictor, self.seed = predictor, seed

    def own_genes(self, cells: PerturbationBatch) -> np.ndarray:
        """Predict every gene that a cell expresses, once, from the half of the cell that it is not in.

        Returns:
            `(total genes,)` float32, in the order of `cells.rows`.
        """
        half = halves(cells.rows.cells(), cells.rows.tokens, cells.contents, self.seed)
        first, second = (self.hidden_genes(cells, half == side) for side in (0, 1))
        return np.where(half == 0, first, second)

    def hidden_genes(self, cells: PerturbationBatch, wanted: np.ndarray) -> np.ndarray:
        """Predict some of the genes that cells express, from the others alone.

        Args:
            cells: Cells.
            wanted: `(total genes,)` bool over `cells.rows`.

        Returns:
            `(total genes,)` float32, NaN where not `wanted`.
        """
        rows, most = cells.rows, self._most(cells)
        values = np.full(len(rows.tokens), np.nan, dtype=np.float32)
        piece = _pieces(rows, wanted, most)
        for number in range(int(piece.max(initial=-1)) + 1):
            some = np.flatnonzero(np.bincount(rows.cells()[piece == number], minlength=cells.num_cells))
            there = np.isin(rows.cells(), some)
            part, hidden = cells.pick(some), (piece == number)[there]
            seen = ~wanted[there]
            values[piece == number] = self.predict(part, hidden, _none(), _none(), most, seen)[0]
        return values

    def asked_genes(self, cells: PerturbationBatch, tokens: np.ndarray) -> np.ndarray:
        """Predict the same genes in every cell: `(cells, genes)` float32 for `(genes,)` distinct tokens."""
        rows, values = cells.rows, np.empty((cells.num_cells, len(tokens)), dtype=np.float32)
        size = min(_GROUP, self._most(cells))
        for start in range(0, len(tokens), size):
            group = tokens[start : start + size]
            column = np.full(cells.source.num_tokens, -1)
            column[group] = np.arange(start, start + len(group))
            hidden = column[rows.tokens] >= 0
            places = rows.cells()[hidden], column[rows.tokens[hidden]]
            lacking = np.ones((cells.num_cells, len(group)), dtype=bool)
            lacking[places[0], places[1] - start] = False
            owners, which = np.nonzero(lacking)
            found = self.predict(cells, hidden, owners, group[which], size)
            values[places], values[owners, start + which] = found
        return values

    def predict(
        self,
        cells: PerturbationBatch,
        hidden: np.ndarray,
        added_cells: np.ndarray,
        added_tokens: np.ndarray,
        most: int,
        seen: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict genes that cells express, and genes that they do not express, all hidden at once.

        Args:
            cells: Cells.
            hidden: `(total genes,)` bool over `cells.rows`, expressed genes to predict.
            added_cells: `(added,)` row number of the cell of each gene that is added, rising.
            added_tokens: `(added,)` token of each such gene.
            most: Most genes that are predicted in a cell; as much of the context is kept free for them.
            seen: `(total genes,)` bool, genes that may be seen; by default all that are not hidden.

        Returns:
            Predictions of the hidden genes, `(hidden genes,)`, and of the added ones, `(added,)`, in the tokenizer's
            unit.
        """
        keep = hidden | self._context(cells, ~hidden if seen is None else seen & ~hidden, most)
        encoded = cells.source.encode(cells.rows, keep, cells.numbers, cells.drug_ids)
        special = 1 if cells.drug_ids is None else 2
        flags = np.zeros(len(encoded.input_ids), dtype=bool)
        flags[gene_places(encoded.offsets - special * np.arange(cells.num_cells + 1), special)] = hidden[keep]
        joined, order = _with_added(encoded, added_cells, added_tokens)
        flags = np.concatenate([flags, np.ones(len(added_tokens), dtype=bool)])
        predicted = np.empty(len(flags), dtype=np.float32)
        predicted[order] = self.predictor.predict(joined, flags[order])
        before = len(encoded.input_ids)
        return predicted[:before][flags[:before]], predicted[before:]

    def _most(self, cells: PerturbationBatch) -> int:
        """Return the most genes that are hidden at once."""
        room = cells.source.room
        return 2**31 if room is None else max(1, room // 2)

    def _context(self, cells: PerturbationBatch, seen: np.ndarray, most: int) -> np.ndarray:
        """Choose the genes that are seen, `(total genes,)` bool, so that `most` others have room in the context."""
        room, overflow = cells.source.room, cells.source.tokenizer.overflow
        if room is None:
            return seen
        kept = kept_genes(cells.rows.select(seen), self.seed, room - most, overflow, contents=cells.contents)
        if kept is not None:
            seen = seen.copy()
            seen[seen] = kept
        return seen


def _pieces(rows: GeneRows, wanted: np.ndarray, most: int) -> np.ndarray:
    """Number the passes in which genes are predicted, so that no pass hides more than `most` of a cell.

    Returns:
        `(total genes,)` int64, -1 for genes that are not wanted.
    """
    owners, places = rows.cells(), np.flatnonzero(wanted)
    order = places[np.lexsort((rows.tokens[places], owners[places]))]
    counts = np.bincount(owners[places], minlength=rows.num_cells)
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.full(len(rows.tokens), -1)
    pieces[order] = ranks // most
    return pieces


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


def _with_added(cells: EncodedCells, owners: np.ndarray, tokens: np.ndarray) -> tuple[EncodedCells, np.ndarray]:
    """Put tokens behind those of their cells.

    Returns:
        The cells; and, for each of their tokens, its place among the tokens of before followed by the added ones.
    """
    every = np.concatenate([np.repeat(np.arange(cells.num_cells), cells.lengths), owners])
    order = np.argsort(every, kind="stable")
    ids = np.concatenate([cells.input_ids, tokens])[order]
    values = np.concatenate([cells.expression_values, np.zeros(len(tokens), dtype=np.float32)])[order]
    offsets = np.searchsorted(every[order], np.arange(cells.num_cells + 1))
    return EncodedCells(ids, values, offsets, cells.drug_ids, cells.cell_numbers, cells.empty_cells), order
