# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cells in `GeneRows`, cut, joined and picked by number."""

from collections.abc import Sequence

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows


def cut_cells(rows: GeneRows, start: int, stop: int) -> GeneRows:
    """Return the cells with the numbers `start` to `stop` of the input; the sum of unknown counts becomes 0."""
    first = rows.first_cell
    if (start, stop) == (first, first + rows.num_cells):
        return rows
    offsets = rows.offsets[start - first : stop - first + 1]
    genes = slice(offsets[0], offsets[-1])
    obs = None if rows.obs is None else rows.obs.iloc[start - first : stop - first]
    return GeneRows(rows.tokens[genes], rows.counts[genes], offsets - offsets[0], start, obs)


def join_cells(parts: Sequence[GeneRows]) -> GeneRows:
    """Join consecutive cells; either all parts have columns of obs or none has."""
    if len(parts) == 1:
        return parts[0]
    obs = None
    if parts[0].obs is not None:
        import pandas as pd

        obs = pd.concat([part.obs for part in parts])
    return GeneRows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))]),
        parts[0].first_cell,
        obs,
        sum(part.unknown_counts for part in parts),
    )


def pick_cells(rows: GeneRows, numbers: np.ndarray) -> GeneRows:
    """Copy the genes and counts of the cells with these row numbers, in this order."""
    starts, lengths = rows.offsets[numbers], rows.offsets[numbers + 1] - rows.offsets[numbers]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return GeneRows(rows.tokens[index], rows.counts[index], offsets)
