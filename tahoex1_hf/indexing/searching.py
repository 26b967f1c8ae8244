# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the cells nearest to others: exactly, or through the search index with a recall that is measured."""

import logging
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pyarrow as pa

from tahoex1_hf.indexing.store import CELL, ROW_ID, VECTOR, CellIndex

logger = logging.getLogger(__name__)

QUERIES = 256  # cells that are looked for at a time
MANY = 2048  # cells that are looked for at a time where every cell of the index is read for them
SAMPLE = 100  # cells by which recall is measured
_SCANNED = 2**13  # cells that are compared at a time
_REFINED = 2  # times k cells of the search index whose distances are computed anew from the whole embeddings
# Cells that pass a filter and are compared one by one rather than through the search index: so many, or so many for
# each cell that is looked for. benchmarks/nearest.py: with 155,000 of them a thousand cells take 10 CPU s, and 57 s.
_FEW, _FEW_EACH = 100_000, 1000
_QUANTILE = 1.645  # of the normal distribution at 95 %
_PATIENCE = timedelta(minutes=10)  # for one cell, after which a search is given up
_SAME = 1e-6  # squared distances that differ by less count as equal: embeddings have length 1 and 24 bits


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest cells of some cells.

    Attributes:
        ids: Row ids, nearest first, `(cells, k)`; where `distances` is infinite there is no such neighbour.
        distances: Euclidean distances, `(cells, k)` float32.
    """

    ids: np.ndarray
    distances: np.ndarray


def exact_neighbours(index: CellIndex, queries: np.ndarray, k: int, where: str | None = None) -> Neighbours:
    """Compare cells with every cell of an index; the index is read once, a piece at a time.

    Args:
        index: Index.
        queries: Embeddings, `(cells, width)` float32.
        k: Number of neighbours.
        where: Filter of the index's cells.
    """
    ids = np.zeros((len(queries), k), dtype=np.uint64)
    squares = np.full((len(queries), k), np.inf, dtype=np.float32)
    own = np.square(queries).sum(axis=1)[:, None]
    scan = index.table.search()
    if where is not None:
        scan = scan.where(where)
    for batch in scan.select([VECTOR]).with_row_id(True).to_batches(_SCANNED):
        vectors = _matrix(batch[VECTOR])
        found = own + np.square(vectors).sum(axis=1) - 2 * (queries @ vectors.T)
        if found.shape[1] > k:
            best = np.argpartition(found, k - 1, axis=1)[:, :k]
        else:
            best = np.broadcast_to(np.arange(found.shape[1]), found.shape)
        both = np.concatenate([squares, np.take_along_axis(found, best, axis=1)], axis=1)
        numbers = np.concatenate([ids, batch[ROW_ID].to_numpy()[best]], axis=1)
        order = np.argsort(both, axis=1, kind="stable")[:, :k]
        squares, ids = np.take_along_axis(both, order, axis=1), np.take_along_axis(numbers, order, axis=1)
    return _refined(index, queries, ids, np.isfinite(squares))


def _refined(index: CellIndex, queries: np.ndarray, ids: np.ndarray, there: np.ndarray) -> Neighbours:
    """Compute the distances of the nearest cells anew, since differences of squares lose digits."""
    distances = np.full(ids.shape, np.inf, dtype=np.float32)
    for low in range(0, len(ids), QUERIES):
        part = slice(low, low + QUERIES)
        mine = there[part]
        if mine.any():
            vectors = _matrix(index.rows(ids[part][mine], [VECTOR])[VECTOR].combine_chunks())
            distances[part][mine] = np.linalg.norm(vectors - queries[part][np.nonzero(mine)[0]], axis=1)
    order = np.argsort(distances, axis=1, kind="stable")
    return Neighbours(np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1))


def _matrix(vectors: pa.FixedSizeListArray) -> np.ndarray:
    return np.asarray(vectors.flatten().to_numpy(zero_copy_only=False)).reshape(len(vectors), -1)


def indexed_neighbours(
    index: CellIndex, queries: np.ndarray, k: int, probes: int, where: str | None = None
) -> Neighbours:
    """Look for the nearest cells in the parts of the search index that are nearest to each cell.

    The search index holds embeddings in 8 bits; the distances of twice k candidates are computed from the whole ones.

    Args:
        index: Index.
        queries: Embeddings, `(cells, width)` float32.
        k: Number of neighbours.
        probes: Number of parts that are read.
        where: Filter of the index's cells.
    """
    ids = np.zeros((len(queries), k), dtype=np.uint64)
    distances = np.full((len(queries), k), np.inf, dtype=np.float32)
    for row, query in enumerate(queries):  # one by one: hundreds in one search stood still on a busy machine
        search = index.table.search(query).limit(k).nprobes(probes).refine_factor(_REFINED)
        if where is not None:
            search = search.where(where, prefilter=True)
        found = search.select([CELL, "_distance"]).with_row_id(True).to_arrow(timeout=_PATIENCE)
        squares, numbers = found["_distance"].to_numpy(), found[ROW_ID].to_numpy()
        order = np.lexsort((numbers, squares))
        ids[row, : len(order)] = numbers[order]
        distances[row, : len(order)] = np.sqrt(np.maximum(squares[order], 0))
    return Neighbours(ids, distances)


def recalls_of(found: Neighbours, truth: Neighbours) -> np.ndarray:
    """Return the share of each cell's true neighbours that was found, `(cells,)`.

    A cell that is as near as the farthest of the true neighbours counts as one.
    """
    farthest = np.where(np.isfinite(truth.distances), truth.distances, 0).max(axis=1, keepdims=True)
    right = np.square(found.distances) <= np.square(farthest) + _SAME
    there = np.isfinite(truth.distances).sum(axis=1)
    return np.where(there > 0, right.sum(axis=1) / np.maximum(1, there), 1.0)


def find_probes(
    index: CellIndex, queries: np.ndarray, k: int, least: float, where: str | None = None, start: int = 1
) -> tuple[int, float]:
    """Return the number of parts to read so that the recall is high enough, and the recall of some cells.

    High enough is the lower end of the one-sided 95 % interval of the mean over these cells: the first number of parts
    whose mean passes would otherwise be one that passes by chance.

    Args:
        index: Index.
        queries: Embeddings of the cells, `(cells, width)` float32.
        k: Number of neighbours.
        least: Least recall.
        where: Filter of the index's cells.
        start: Number of parts that is tried first; it is doubled until the recall is high enough.
    """
    truth, partitions = exact_neighbours(index, queries, k, where), index.manifest.partitions
    probes = max(1, min(start, partitions))
    while True:
        recalls = recalls_of(indexed_neighbours(index, queries, k, probes, where), truth)
        doubt = _QUANTILE * recalls.std(ddof=1) / np.sqrt(len(recalls)) if len(recalls) > 1 else 0.0
        if recalls.mean() - doubt >= least or probes >= partitions:
            return probes, float(recalls.mean())
        probes = min(2 * probes, partitions)


class Search:
    """A search for the nearest cells, whose way depends on the number of cells that pass its filter.

    Args:
        index: Complete index.
        k: Number of neighbours.
        where: Filter of the index's cells.
        exact: Whether every cell is compared.
        least: Least recall under a filter.
        seed: Seed of the sample by which the recall under a filter is measured.

    Attributes:
        passing: Number of the index's cells that pass the filter.
        recall: Share of the true neighbours that are found; measured when the index was built or, under a filter, by a
            sample of the queries.
    """

    def __init__(self, index: CellIndex, k: int, where: str | None, exact: bool, least: float, seed: int = 0):
        self.index, self.k, self.where, self.least, self.seed = index, k, where, least, seed
        self.passing = index.count(where)
        self.probes = 0 if exact or (where is not None and self.passing <= _FEW) else index.manifest.probes
        self.recall = 1.0 if not self.probes else index.manifest.recall or 0.0
        self._measured = where is None

    def expect(self, number: int) -> None:
        """Compare one by one the cells that pass a filter where that is less work for `number` cells."""
        if self.where is not None and self.passing <= _FEW_EACH * number:
            self.probes, self.recall = 0, 1.0

    def measure(self, queries: np.ndarray) -> None:
        """Under a filter, find how many parts must be read for a sample of the cells to be looked for."""
        if not self.probes or self._measured:
            return
        self._measured = True
        start = round(self.probes * self.index.manifest.num_cells / self.passing)
        rows = np.random.default_rng(self.seed).permutation(len(queries))[:SAMPLE]
        self.probes, self.recall = find_probes(self.index, queries[rows], self.k, self.least, self.where, start)

    def __call__(self, queries: np.ndarray) -> Neighbours:
        """Return the nearest cells of some cells, whose embeddings are `(cells, width)`."""
        if not self.probes:
            return exact_neighbours(self.index, queries, self.k, self.where)
        self.measure(queries)
        found = indexed_neighbours(self.index, queries, self.k, self.probes, self.where)
        short = np.flatnonzero(~np.isfinite(found.distances[:, min(self.k, self.passing) - 1]))
        if len(short):  # too few of the cells that pass the filter lie in these parts
            rest = exact_neighbours(self.index, queries[short], self.k, self.where)
            found.ids[short], found.distances[short] = rest.ids, rest.distances
        return found
