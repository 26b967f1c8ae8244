# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Numbers that follow from a cell's counts, so that sampling does not depend on its place in a file."""

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows, mix64


def content_numbers(rows: GeneRows) -> np.ndarray:
    """Return a number for each cell, from which the tokenizer samples the genes of cells longer than the context.

    By default the tokenizer uses the cell's place in the file; a prediction would then change when the file is sorted
    or cut.

    Args:
        rows: Genes and raw counts of the cells.

    Returns:
        Hashes of the cells' genes and counts in any order, not negative, shape `(cells,)`, int64.
    """
    counts = np.ascontiguousarray(rows.counts, dtype=np.float32).view(np.uint32).astype(np.uint64)
    hashes = mix64((rows.tokens.astype(np.uint64) << np.uint64(32)) | counts)
    upto = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(hashes, dtype=np.uint64)])  # may wrap around
    sums = upto[rows.offsets[1:]] - upto[rows.offsets[:-1]]
    return (sums >> np.uint64(1)).astype(np.int64)
