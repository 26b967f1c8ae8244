# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Numbers for cells that follow from what they hold: a cell keeps its genes wherever it stands in a file."""

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows, mix64


def content_numbers(rows: GeneRows) -> np.ndarray:
    """A number of each cell for the tokenizer, which samples cells longer than the context by it.

    With the cell's place in the file, what the tokenizer takes otherwise, a prediction would change when the file is
    sorted or cut.

    Args:
        rows: the cells' genes and raw counts.

    Returns:
        `(cells,)` int64, not negative, a hash of the cell's genes and counts in whatever order; equal for equal cells.
    """
    counts = np.ascontiguousarray(rows.counts, dtype=np.float32).view(np.uint32).astype(np.uint64)
    hashes = mix64((rows.tokens.astype(np.uint64) << np.uint64(32)) | counts)
    upto = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(hashes, dtype=np.uint64)])  # wraps around: no harm
    sums = upto[rows.offsets[1:]] - upto[rows.offsets[:-1]]
    return (sums >> np.uint64(1)).astype(np.int64)
