# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""How surprising cells are to a model: the error of its predictions of genes that are hidden from it.

Of each cell half the genes are hidden, as in the model's training, and predicted from the other half; then the halves
change places, and further masks begin with another halving. The halves follow from seed, the cell's content and the
gene alone, so a score depends neither on the batch nor on the file, the order of the cells or the process.

The error is divided by the variance of the cell's own values. A shallow cell, most of whose genes have the lowest bin,
would otherwise look easy to predict. A score of 0 is a perfect prediction; 1 is the error of whoever knows the cell's
mean and nothing of its genes.
"""

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows, content_numbers, sample_seed
from tahoex1_hf.inference.expression import ExpressionPredictor, halves
from tahoex1_hf.padding_tahoe_x1 import EncodedCells

DEFAULT_MASKS = 4


def num_masks(score: bool | int) -> int:
    """Return the number of masks that `score` asks for; 0 for no scores.

    Raises:
        ValueError: For a negative number.
    """
    if score is True:
        return DEFAULT_MASKS
    if score < 0:
        raise ValueError(f"score={score}: pass True, or the number of masks, at least 1 (--score-masks).")
    return int(score)


class CellScorer:
    """Scorer of encoded cells.

    Args:
        predictor: Model that predicts expression.
        masks: Number of masks, at least 1.
        seed: Seed of the masks.
    """

    def __init__(self, predictor: ExpressionPredictor, masks: int, seed: int = 0):
        self.predictor, self.masks, self.seed = predictor, masks, seed
        self._is_gene = predictor.encoder.tokenizer.is_gene

    def score(self, cells: EncodedCells) -> tuple[np.ndarray, np.ndarray]:
        """Score cells.

        Returns:
            `(cells,)` float32 scores, means over the masks: the squared error at hidden genes, as a share of the
            variance of the cell's values; and `(cells,)` float32, the standard deviation of one mask's score. Both
            are NaN for cells whose values are all equal, and the latter for a single mask.
        """
        size = cells.num_cells
        owners = np.repeat(np.arange(size), cells.lengths)
        genes = self._is_gene[cells.input_ids]
        values = cells.expression_values.astype(np.float64)
        variance = _variances(values[genes], owners[genes], size)
        contents = content_numbers(GeneRows(cells.input_ids, cells.expression_values, cells.offsets))
        scores = np.full((self.masks, size), np.nan)
        for mask in range(self.masks):
            half = halves(owners, cells.input_ids, contents, sample_seed(self.seed, mask // 2))
            hidden = genes & (half == mask % 2) & (variance > 0)[owners]
            errors = (self.predictor.predict(cells, hidden)[hidden] - values[hidden]) ** 2
            number = np.bincount(owners[hidden], minlength=size)
            some = number > 0
            sums = np.bincount(owners[hidden], weights=errors, minlength=size)
            scores[mask, some] = sums[some] / number[some] / variance[some]
        return _mean_and_deviation(scores)


def _variances(values: np.ndarray, cells: np.ndarray, size: int) -> np.ndarray:
    """Return the `(cells,)` variance of each cell's values; 0 for a cell without any."""
    number = np.maximum(np.bincount(cells, minlength=size), 1)
    means = np.bincount(cells, weights=values, minlength=size) / number
    return np.bincount(cells, weights=(values - means[cells]) ** 2, minlength=size) / number


def _mean_and_deviation(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means and standard deviations (with n - 1) of the finite numbers in each column, NaN for too few."""
    number = np.isfinite(scores).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.nansum(scores, axis=0) / number
        squares = np.nansum((scores - means) ** 2, axis=0) / (number - 1)
    return means.astype(np.float32), np.where(number > 1, np.sqrt(np.maximum(squares, 0)), np.nan).astype(np.float32)
