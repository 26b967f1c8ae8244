# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The chunks of all inputs of an embedding run, and their division among processes or pieces."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tahoex1_hf.cells import encoding
from tahoex1_hf.cells.encoding import ChunkEncoder


class Stretch(NamedTuple):
    """Consecutive chunks of one input.

    Attributes:
        start: Number of the first chunk in the run.
        stop: Number after the last chunk.
        number: Number of the input.
        low: Number of the first cell in the input.
        high: Number after the last cell.
    """

    start: int
    stop: int
    number: int
    low: int
    high: int


class Plan:
    """The chunks of all inputs, numbered consecutively, and their division among processes.

    Args:
        encoders: Encoder of each input.
    """

    def __init__(self, encoders: Sequence[ChunkEncoder]):
        self.encoders = encoders
        self.inputs = inputs = [each.cells for each in encoders]
        counts = [-(-each.num_cells // encoding.CHUNK_CELLS) for each in inputs]
        self.firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.num_chunks = int(self.firsts[-1])
        self.num_cells = sum(each.num_cells for each in inputs)

    def cells(self, start: int, stop: int) -> tuple[int, int, int]:
        """Return the number of the input with chunks `start` to `stop`, their first cell, and the cell after them."""
        number = int(np.searchsorted(self.firsts, start, side="right")) - 1
        low = (start - int(self.firsts[number])) * encoding.CHUNK_CELLS
        high = min((stop - int(self.firsts[number])) * encoding.CHUNK_CELLS, self.inputs[number].num_cells)
        return number, low, high

    def stretch(self, start: int, stop: int) -> Stretch:
        """Return chunks `start` to `stop`, which must be of one input, with their cells."""
        return Stretch(start, stop, *self.cells(start, stop))

    def ranges(self, todo: np.ndarray) -> list[tuple[int, int]]:
        """Group chunks, which must be in order, into ranges (start, stop) of consecutive chunks of one input."""
        if not len(todo):
            return []
        owners = np.searchsorted(self.firsts, todo, side="right")
        cuts = np.flatnonzero((np.diff(todo) != 1) | (np.diff(owners) != 0)) + 1
        bounds = [0, *cuts.tolist(), len(todo)]
        return [(int(todo[a]), int(todo[b - 1]) + 1) for a, b in pairwise(bounds)]

    def pieces(self, todo: np.ndarray, chunks: int) -> list[Stretch]:
        """Cut chunks, which must be in order, into pieces of one input with at most `chunks` chunks each."""
        cuts = [range(start, stop, chunks) for start, stop in self.ranges(todo)]
        return [self.stretch(start, min(start + chunks, cut.stop)) for cut in cuts for start in cut]

    def unfinished(self, finished: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return the numbers of the chunks that are not in a shard."""
        missing = np.ones(self.num_chunks, dtype=bool)
        for start, stop in finished:
            missing[start:stop] = False
        return np.flatnonzero(missing)

    def shares(self, todo: np.ndarray, processes: int) -> list[np.ndarray]:
        """Return the chunks of each process, which are consecutive and have about the same number of tokens."""
        if processes == 1:
            return [todo]
        tokens = np.concatenate([each.chunk_tokens() for each in self.encoders])[todo].astype(np.float64)
        middles = np.cumsum(tokens) - tokens / 2
        owner = np.minimum((middles * processes / max(tokens.sum(), 1)).astype(np.int64), processes - 1)
        return [todo[owner == process] for process in range(processes)]
