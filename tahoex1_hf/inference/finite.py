# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Stop a run whose results turn out not to be finite, and name the cell."""

import numpy as np

from tahoex1_hf.cells.readers.base import INDEX, CellInput


def check_results(values: np.ndarray, numbers: np.ndarray | range, cells: CellInput, precision: str) -> None:
    """Check that results of cells are finite.

    Args:
        values: `(results, ...)` float, each row the embedding of a cell, or its prediction.
        numbers: `(results,)` number in the input of the cell of each row.
        cells: The input.
        precision: The precision of the computation, for the message.

    Raises:
        ValueError: If a result is not finite; the message names the first such cell.
    """
    # A sum is finite only if all its terms are; in float64, no sum of these is too large.
    with np.errstate(invalid="ignore"):
        sums = values.reshape(len(values), -1).sum(axis=1, dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(sums))
    if len(wrong):
        number = int(numbers[wrong[0]])
        name = str(cells.column(INDEX).iloc[number])
        raise ValueError(
            f"{cells.path}: the model gives NaN or infinite values for cell {name!r} (number {number}, from 0) and "
            f"{len(wrong) - 1} other cells computed with it, in {precision}. Its weights are too large for that "
            'precision, or are not those of a trained model: pass dtype="float32" (--dtype float32), or use another '
            "checkpoint."
        )
