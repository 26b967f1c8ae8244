# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The order in which cells are seen: a function of seed, epoch and position, computed where it is needed.

No random generator keeps a state, so any position of any epoch is reached at once. That makes resuming exact, and lets
every process take its own cells without asking the others.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import mix64

# Every block of this many positions of a weighted mixture has each dataset in its exact proportion.
MIX_BLOCK = 8192
# Each purpose has its own stream of random numbers.
_SHARDS, _WINDOW, _MIX, _CELL = (np.uint64(stage) for stage in range(1, 5))


def _stream(*numbers: int | np.integer) -> np.ndarray:
    """Return a uint64 that depends on all the numbers and their order."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = mix64(state + np.uint64(number))
    return state


def _permutation(stream: np.ndarray, size: int) -> np.ndarray:
    return np.argsort(mix64(stream + np.arange(size, dtype=np.uint64)), kind="stable")


class CellPlaces(NamedTuple):
    """Places of cells in a dataset, and their streams of random numbers.

    Attributes:
        shards: `(cells,)` shard of each cell.
        rows: `(cells,)` row of each cell in its shard.
        streams: `(cells,)` uint64, where the random numbers of each cell start.
    """

    shards: np.ndarray
    rows: np.ndarray
    streams: np.ndarray

    def select(self, places: "slice | np.ndarray") -> "CellPlaces":
        """Return some of the cells."""
        return CellPlaces(self.shards[places], self.rows[places], self.streams[places])


def _joined(parts: Sequence[CellPlaces]) -> CellPlaces:
    if len(parts) == 1:
        return parts[0]
    empty = CellPlaces(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.uint64)))
    return CellPlaces(*(np.concatenate(values) for values in zip(empty, *parts, strict=True)))


class CellOrder:
    """The order of one dataset: in each epoch, shards are permuted, then cells within windows of the result.

    Args:
        shard_sizes: Number of cells of each shard.
        seed: Seed of the order.
        window: Number of cells that are shuffled together; the cells of a batch lie at most this far apart.
        shuffle: Whether to shuffle; otherwise the shards are read in their order.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int, shuffle: bool = True) -> None:
        if window < 1:
            raise ValueError(f"window={window}: pass at least 1.")
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_cells = int(self.sizes.sum())
        self.first_cells = np.cumsum(self.sizes) - self.sizes
        self.seed, self.window, self.shuffle = seed, window, shuffle
        # A few windows are in use at a time: those of the current batch and of batches that are made ahead.
        self._shard_order = lru_cache(maxsize=4)(self._make_shard_order)
        self._cells_of = lru_cache(maxsize=8)(self._window_cells)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without the caches, for the worker processes of a data loader."""
        return CellOrder, (self.sizes.tolist(), self.seed, self.window, self.shuffle)

    def cells(self, epoch: int, start: int, stop: int) -> CellPlaces:
        """Return the cells at positions `start` to `stop` of an epoch.

        The streams of random numbers depend on seed, epoch and cell alone.
        """
        windows = range(start // self.window, -(-stop // self.window))
        first = windows.start * self.window
        return _joined([self._cells_of(epoch, window) for window in windows]).select(
            slice(start - first, stop - first)
        )

    def shards_near(self, epoch: int, position: int, cells: int) -> list[int]:
        """Return the shards that hold the next `cells` cells from a position on, in the order of their use."""
        if not self.num_cells:
            return []
        shards, starts = self._shard_order(epoch)
        first = min(position, self.num_cells - 1) // self.window * self.window
        last = min(-(-(position + cells) // self.window) * self.window, self.num_cells) - 1
        low, high = np.searchsorted(starts, [first, max(last, first)], side="right") - 1
        return [int(shard) for shard in shards[low : high + 1]]

    def _make_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of an epoch, and the position of the first cell of each."""
        shards = np.flatnonzero(self.sizes)  # an empty shard has no position in the order
        if self.shuffle:
            shards = shards[_permutation(_stream(self.seed, _SHARDS, epoch), len(shards))]
        return shards, np.cumsum(self.sizes[shards]) - self.sizes[shards]

    def _window_cells(self, epoch: int, window: int) -> CellPlaces:
        """Return all cells of a window, in their order."""
        shards, starts = self._shard_order(epoch)
        first = window * self.window
        size = min(self.window, self.num_cells - first)
        places = np.arange(size)
        if self.shuffle:
            places = _permutation(_stream(self.seed, _WINDOW, epoch, window), size)
        ranks = np.searchsorted(starts, places + first, side="right") - 1
        rows = places + first - starts[ranks]
        numbers = (self.first_cells[shards[ranks]] + rows).astype(np.uint64)
        return CellPlaces(shards[ranks], rows, mix64(_stream(self.seed, _CELL, epoch) + numbers))


class MixedOrder:
    """A mixture of datasets by weight: which dataset, and which of its cells, comes at a position.

    In every block of 8,192 positions each dataset has its exact share. A dataset whose cells have all been seen starts
    over in another order, independently of the others.

    Args:
        orders: Order of each dataset.
        weights: Share of each dataset, in any unit.
        num_cells: Number of positions in an epoch of the mixture.
        seed: Seed of the mixture.
    """

    def __init__(self, orders: Sequence[CellOrder], weights: Sequence[float], num_cells: int, seed: int) -> None:
        if len(weights) != len(orders) or not all(0 < weight < np.inf for weight in weights):
            raise ValueError(
                f"weights={list(weights)}: pass a positive number for each of the {len(orders)} datasets."
            )
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * MIX_BLOCK
        self.quotas = np.floor(shares).astype(np.int64)
        for dataset in np.argsort(self.quotas - shares, kind="stable")[: MIX_BLOCK - int(self.quotas.sum())]:
            self.quotas[dataset] += 1  # the largest remainders
        if (self.quotas == 0).any():
            raise ValueError(f"weights={list(weights)}: a share below 1 in {MIX_BLOCK} cannot be mixed.")
        self.orders, self.num_cells, self.seed = list(orders), num_cells, seed
        self.weights = list(weights)
        self._block = lru_cache(maxsize=8)(self._make_block)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without the caches, for the worker processes of a data loader."""
        return MixedOrder, (self.orders, self.weights, self.num_cells, self.seed)

    def cells(self, epoch: int, start: int, stop: int) -> list[tuple[np.ndarray, CellPlaces]]:
        """Return, for each dataset, its cells at positions `start` to `stop` of an epoch, after their row numbers."""
        first, last = epoch * self.num_cells + start, epoch * self.num_cells + stop
        blocks = range(first // MIX_BLOCK, -(-last // MIX_BLOCK))
        parts = [self._block(block) for block in blocks]
        offset = blocks.start * MIX_BLOCK
        datasets = np.concatenate([part[0] for part in parts])[first - offset : last - offset]
        places = np.concatenate([part[1] for part in parts])[first - offset : last - offset]
        result = []
        for number, order in enumerate(self.orders):
            rows = np.flatnonzero(datasets == number)
            result.append((rows, _cells_across_epochs(order, places[rows])))
        return result

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the dataset of each position of a block, and the position in the dataset's own sequence of epochs."""
        datasets = np.repeat(np.arange(len(self.quotas)), self.quotas)
        datasets = datasets[_permutation(_stream(self.seed, _MIX, block), MIX_BLOCK)]
        places = np.empty(MIX_BLOCK, dtype=np.int64)
        for number, quota in enumerate(self.quotas):
            places[datasets == number] = block * quota + np.arange(quota)
        return datasets, places


def _cells_across_epochs(order: CellOrder, places: np.ndarray) -> CellPlaces:
    """Return the cells at increasing positions in a sequence of epochs."""
    epochs, within = places // order.num_cells, places % order.num_cells
    parts = []
    for epoch in np.unique(epochs):
        wanted = within[epochs == epoch]
        cells = order.cells(int(epoch), int(wanted[0]), int(wanted[-1]) + 1)
        parts.append(cells.select(wanted - wanted[0]))
    return _joined(parts)
