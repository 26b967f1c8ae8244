# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Measures of perturbations: the shift of cell embeddings, and the change of predicted expression.

Cells come in chunks. For perturbed cells only sums are kept; for each unperturbed cell of a group its embedding and,
if expression is predicted, one value for each gene that it expresses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tahoex1_hf.common.prefetch import prefetch
from tahoex1_hf.encoding_tahoe_x1 import mix64
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.inference.expression import ExpressionPredictor, halves
from tahoex1_hf.inference.finite import check_results
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.perturbation.cells import Change, Pairs, PerturbationBatch, gene_places

# Number of genes of perturbed cells that are encoded together: tens of megabytes, intermediate arrays included.
PIECE_TOKENS = 2**19


class Moments:
    """Running mean and standard error of several groups of values."""

    def __init__(self, size: int):
        self.count, self.mean, self.squares = np.zeros((3, size))

    def add(self, groups: np.ndarray, values: np.ndarray) -> None:
        """Add `(values,)` values, each to its group (Chan, Golub and LeVeque 1983, doi:10.2307/2683386)."""
        size = len(self.count)
        count = np.bincount(groups, minlength=size).astype(np.float64)
        mean = np.bincount(groups, weights=values, minlength=size) / np.maximum(count, 1)
        squares = np.bincount(groups, weights=(values - mean[groups]) ** 2, minlength=size)
        total = self.count + count
        step, share = mean - self.mean, count / np.maximum(total, 1)
        self.squares += squares + step**2 * self.count * share
        self.mean += step * share
        self.count = total

    def standard_error(self) -> np.ndarray:
        """Return the standard error of each group's mean; NaN for fewer than two values."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.count > 1, np.sqrt(self.squares / (self.count - 1) / self.count), np.nan)

    def of(self, group: int) -> tuple[float, float]:
        """Return the mean and standard error of a group; NaN where there are too few values."""
        mean = self.mean[group] if self.count[group] else np.nan
        return float(mean), float(self.standard_error()[group])


class Forward:
    """A model that embeds encoded cells, and predicts expression if that was asked for.

    Args:
        encoder: Model that embeds the cells.
        predictor: Predictor of expression; None for no predictions.
    """

    def __init__(self, encoder: CellEncoder, predictor: ExpressionPredictor | None = None):
        self.encoder, self.predictor = encoder, predictor

    def pooled(self, cells: EncodedCells, of: PerturbationBatch, numbers: np.ndarray) -> np.ndarray:
        """Embed cells.

        Args:
            cells: Encoded cells.
            of: Unperturbed batch that the cells come from.
            numbers: `(cells,)` number in the data of each cell.

        Returns:
            `(cells, width)` float32 embeddings, not normalised.

        Raises:
            ValueError: If an embedding is not finite; the message names the cell.
        """
        embeddings = np.empty((cells.num_cells, self.encoder.width), dtype=np.float32)
        for rows, pooled in self.encoder.pooled_batches(cells):
            embeddings[rows] = pooled.float().cpu().numpy()
        check_results(embeddings, numbers, of.source.cells, self.encoder.dtype_name)
        return embeddings


@dataclass
class Unperturbed:
    """Embeddings and predicted expression of unperturbed cells.

    Attributes:
        numbers: `(cells,)` numbers of the cells in the data.
        pooled: `(cells, width)` float32 embeddings, not normalised.
        predicted: `(genes of the cells,)` float32 expression, predicted while the gene's half of the cell is hidden.
    """

    numbers: np.ndarray
    pooled: np.ndarray
    predicted: np.ndarray | None


def unperturbed(cells: PerturbationBatch, forward: Forward) -> Unperturbed:
    """Run the model over unperturbed cells."""
    encoded = cells.encoded()
    predicted = None
    if forward.predictor is not None:
        predicted = np.full(len(cells.rows.tokens), np.nan, dtype=np.float32)
        places = np.flatnonzero(cells.keep)
        half = halves(cells.rows.cells(), cells.rows.tokens, cells.contents, cells.source.options.seed)[places]
        for side in (0, 1):
            predicted[places[half == side]] = predict_genes(forward.predictor, encoded, half == side)[half == side]
    return Unperturbed(cells.numbers, forward.pooled(encoded, cells, cells.numbers), predicted)


def predict_genes(predictor: ExpressionPredictor, cells: EncodedCells, hidden: np.ndarray) -> np.ndarray:
    """Return `ExpressionPredictor.predict` for arrays over the genes of the cells, without the special tokens."""
    special = 1 if cells.drug_ids is None else 2
    places = gene_places(cells.offsets - special * np.arange(cells.num_cells + 1), special)
    everywhere = np.zeros(len(cells.input_ids), dtype=bool)
    everywhere[places] = hidden
    return predictor.predict(cells, everywhere)[places]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return the rows scaled to length 1, in float64."""
    precise = vectors.astype(np.float64)
    return precise / np.maximum(np.linalg.norm(precise, axis=-1, keepdims=True), 1e-12)


@dataclass
class Piece:
    """Pairs of cells that are run through the model together.

    Attributes:
        pairs: Cells with and without a perturbation.
        tasks: `(pairs,)` number of each pair's perturbation.
        perturbed: The encoded perturbed cells.
        perturbed_genes: `(genes of the perturbed cells,)` index of each gene in the arrays of `pairs`.
        chunk: The unperturbed cells.
    """

    pairs: Pairs
    tasks: np.ndarray
    perturbed: EncodedCells
    perturbed_genes: np.ndarray
    chunk: Unperturbed


def cell_groups(cells: PerturbationBatch, number: int) -> np.ndarray:
    """Return the group of each cell, `(cells,)`: random, but the same for any order of the cells."""
    return np.asarray(mix64(cells.contents) % np.uint64(number)).astype(np.int64)


class BlockMeasures:
    """Measures of several perturbations of the cells of one group.

    Args:
        members: `(perturbations, genes)` tokens that are perturbed together.
        change: Change of their counts.
        forward: Model.
        target: `(width,)` embedding of length 1 toward which shifts are measured; None for none.
        affected: `(tokens,)` slot of every gene whose predicted change is summed, -1 for other tokens; None for no
            predictions.
        groups: Number of groups of cells in each of which the shifts of embeddings of length 1 are summed, as vectors;
            0 for no sums.
    """

    def __init__(
        self,
        members: np.ndarray,
        change: Change,
        forward: Forward,
        target: np.ndarray | None,
        affected: np.ndarray | None,
        groups: int = 0,
    ):
        self.members, self.change, self.forward, self.target = members, change, forward, target
        size = len(members)
        self.num_cells = 0
        self.num_expressing = np.zeros(size, dtype=np.int64)
        self.cosine, self.euclidean, self.toward = Moments(size), Moments(size), Moments(size)
        self.absolute, self.signed = Moments(size), Moments(size)
        self.shifts = np.zeros((size, groups, forward.encoder.width)) if groups else None
        self.group_cells = np.zeros(groups, dtype=np.int64)
        self.slots = affected
        self.num_slots = 0 if affected is None else int(affected.max()) + 1
        self.by_gene = Moments(size * self.num_slots)

    def add(self, read: Callable[[np.ndarray], PerturbationBatch], chunks: Sequence[Unperturbed]) -> Iterator[int]:
        """Measure the cells of a group.

        Args:
            read: Function that reads the counts of cells.
            chunks: The unperturbed cells.

        Yields:
            The number of perturbed cells measured since the previous item.
        """
        for piece in prefetch(self._pieces(read, chunks)):
            if isinstance(piece, Unperturbed):
                self.num_cells += len(piece.numbers)
            else:
                self._measure(piece)
                yield len(piece.tasks)

    def _pieces(
        self, read: Callable[[np.ndarray], PerturbationBatch], chunks: Sequence[Unperturbed]
    ) -> Iterator[Piece | Unperturbed]:
        """Yield the pairs of each chunk in pieces, and after them the chunk itself."""
        genes, slots = np.unique(self.members, return_inverse=True)
        slots = slots.reshape(self.members.shape)
        for chunk in chunks:
            cells = read(chunk.numbers)
            if self.shifts is not None:
                self.group_cells += np.bincount(
                    cell_groups(cells, len(self.group_cells)), minlength=len(self.group_cells)
                )
            counts = cells.counts_of(genes)
            new = self.change.applied(counts, self.change.counts(cells)[:, None])
            self.num_expressing += np.array([(counts[:, own] > 0).any(1).sum() for own in slots], dtype=np.int64)
            changed = np.array([(counts[:, own] != new[:, own]).any(1) for own in slots])  # (perturbations, cells)
            tasks, chosen = np.nonzero(changed)
            upto = np.cumsum(np.diff(cells.rows.offsets)[chosen] + 1) // PIECE_TOKENS
            for part in np.split(np.arange(len(tasks)), np.flatnonzero(np.diff(upto)) + 1):
                if len(part):
                    pairs = Pairs(cells, chosen[part], self.members[tasks[part]], self.change)
                    yield Piece(pairs, tasks[part], *pairs.perturbed(), chunk)
            yield chunk

    def _measure(self, piece: Piece) -> None:
        pairs, predictor = piece.pairs, self.forward.predictor
        expression = predictor is not None and self.slots is not None
        before, numbers = piece.chunk.pooled[pairs.chosen], pairs.cells.numbers[pairs.chosen]
        hidden, own = pairs.hidden() if expression else (None, pairs.own_before)
        encoded_own, own_genes = pairs.unperturbed(own)
        if own.any():
            before[own] = self.forward.pooled(encoded_own, pairs.cells, numbers[own])
        after = self.forward.pooled(piece.perturbed, pairs.cells, numbers)
        unit_before, unit_after = unit(before), unit(after)
        # 1 - cos = |u - v|^2 / 2 for vectors of length 1, without the cancellation.
        self.cosine.add(piece.tasks, ((unit_after - unit_before) ** 2).sum(1) / 2)
        if self.shifts is not None:
            groups = cell_groups(pairs.cells, self.shifts.shape[1])[pairs.chosen]
            np.add.at(self.shifts, (piece.tasks, groups), unit_after - unit_before)
        shift = after.astype(np.float64) - before
        self.euclidean.add(piece.tasks, np.linalg.norm(shift, axis=1))
        if self.target is not None:
            self.toward.add(piece.tasks, (unit_after - unit_before) @ self.target)
        if hidden is None or piece.chunk.predicted is None or predictor is None:
            return
        known = pairs.index >= 0
        predicted = np.full(len(pairs.tokens), np.nan, dtype=np.float32)
        predicted[known] = piece.chunk.predicted[pairs.index[known]]
        if own.any():
            predicted[own_genes] = predict_genes(predictor, encoded_own, hidden[own_genes])
        genes = piece.perturbed_genes
        now = predict_genes(predictor, piece.perturbed, hidden[genes])
        places = np.flatnonzero(hidden[genes])
        self._add_predictions(
            piece, genes[places], now[places].astype(np.float64) - predicted[genes[places]].astype(np.float64)
        )

    def _add_predictions(self, piece: Piece, genes: np.ndarray, difference: np.ndarray) -> None:
        """Add the change of hidden genes.

        Args:
            piece: Pairs of cells.
            genes: `(hidden genes,)` index of each gene in the arrays of the pairs.
            difference: `(hidden genes,)` change of the predicted expression.
        """
        pair = piece.pairs.pair[genes]
        counts = np.bincount(pair, minlength=len(piece.tasks))
        some = counts > 0
        for moments, values in ((self.absolute, np.abs(difference)), (self.signed, difference)):
            sums = np.bincount(pair, weights=values, minlength=len(piece.tasks))
            moments.add(piece.tasks[some], sums[some] / counts[some])
        if self.slots is not None:
            slots = self.slots[piece.pairs.tokens[genes]]
            self.by_gene.add(piece.tasks[pair] * self.num_slots + slots, difference)

    def affected(self, perturbation: int, number: int) -> list[tuple[int, float, float, int]]:
        """Return the genes whose predicted expression changes most: slot, mean change, standard error, cells.

        Only genes count that were predicted in at least three cells and in a twentieth of the perturbed cells.
        """
        part = slice(perturbation * self.num_slots, (perturbation + 1) * self.num_slots)
        mean, error, count = self.by_gene.mean[part], self.by_gene.standard_error()[part], self.by_gene.count[part]
        enough = np.flatnonzero(count >= max(3, self.cosine.count[perturbation] / 20))
        best = enough[np.argsort(-np.abs(mean[enough]), kind="stable")[:number]]
        return [(int(slot), float(mean[slot]), float(error[slot]), int(count[slot])) for slot in best]
