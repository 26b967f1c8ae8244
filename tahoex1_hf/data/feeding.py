# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Finished training batches from prepared datasets, for any number of processes, with exact resume.

The cells of an epoch have one order (`order.py`). It is cut into batches; process `r` of `n` takes batches r, r + n,
r + 2n and so on, so that the n batches of a step, put together, are the same however many processes share them.
Batches are made ahead by threads: the inner loop (`kernels.py`) runs without the GIL, and handing arrays between
processes costs more than making them.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from tahoex1_hf.data.collator import CellCollator, CountRows
from tahoex1_hf.data.order import CellOrder, Cells, MixedOrder
from tahoex1_hf.data.shard_files import DatasetFolder, check_vocabulary

# Cells whose lengths are looked up at once, to fill batches up to a number of tokens.
_LENGTHS_AHEAD = 4096


class _Place(NamedTuple):
    """Cells of an epoch that are done, and how many steps from there a data loader's worker leaves to the others."""

    cells: int
    skip: int | None = None


class CellBatches(IterableDataset):
    """Batches of training cells, to be iterated over as it is, or through a data loader with `batch_size=None`.

    Args:
        locations: folder or URL of a prepared dataset, or several.
        collator: makes the batches.
        batch_size: cells of a batch of one process; or
        batch_tokens: most tokens of a batch of one process, padding not counted as there is none: as many cells as
            fit, one after the other, for a collator with `packed`. The number of batches is then not known before.
        split: `"train"` or `"validation"`.
        seed: of order, samples and targets.
        shuffle: False keeps the order on disk.
        weights: share of each dataset in every batch, in any unit; without, the cells of all datasets are one pool,
            and each is seen once per epoch.
        epoch_cells: with `weights`: cells of an epoch; by default as many as the datasets have together.
        window: cells that are shuffled together after the shards are.
        rank: number of this process.
        world_size: number of processes.
        drop_last: leave out the last cells of an epoch that do not make a (with `batch_size`: full) batch for every
            process; else they are divided among the processes, of which some may then have one batch less.
        num_threads: threads that make batches ahead; 0 makes them when they are asked for.
        prefetch: batches made ahead.
        cache_folder: where remote shards are kept, by default `~/.cache/tahoex1_hf/data` or `TAHOEX1_DATA_CACHE`.
        cache_bytes: most bytes kept there.
        storage_options: for remote datasets, passed to fsspec.

    Raises:
        FileNotFoundError: where there is no prepared dataset.
        ValueError: for settings that cannot be used, and for datasets whose vocabulary is not the tokenizer's.
    """

    def __init__(
        self,
        locations: str | Path | Sequence[str | Path],
        collator: CellCollator,
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        split: str = "train",
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        epoch_cells: int | None = None,
        window: int = 32768,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        num_threads: int = 2,
        prefetch: int = 4,
        cache_folder: str | Path | None = None,
        cache_bytes: float = 20e9,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (batch_size is None) == (batch_tokens is None):
            raise ValueError(f"batch_size={batch_size}, batch_tokens={batch_tokens}: pass one of them.")
        if batch_tokens is not None and (not collator.packed or batch_tokens < collator.context_length):
            raise ValueError(
                f"batch_tokens={batch_tokens} needs a collator with packed=True, and at least its context_length "
                f"({collator.context_length}), the longest that a cell can be."
            )
        if (batch_size is not None and batch_size < 1) or num_threads < 0 or prefetch < 1:
            raise ValueError(f"batch_size={batch_size}, num_threads={num_threads}, prefetch={prefetch}: too small.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: rank must be from 0 to world_size - 1.")
        if epoch_cells is not None and weights is None:
            raise ValueError(f"epoch_cells={epoch_cells} needs weights: without, an epoch is every cell once.")
        self.collator, self.seed = collator, seed
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.num_threads, self.prefetch = num_threads, prefetch
        places = [locations] if isinstance(locations, (str, Path)) else list(locations)
        self.folders = [
            DatasetFolder(
                place,
                split,
                max_open=8 + 4 * len(places),
                cache_folder=cache_folder,
                cache_bytes=cache_bytes / len(places),
                drug_id=collator.drug_id if collator.drug_token else None,
                storage_options=storage_options,
            )
            for place in places
        ]
        for folder in self.folders:
            check_vocabulary(folder, collator.tokenizer)
        if weights is None:
            sizes = [size for folder in self.folders for size in folder.sizes]
            self._owners = [(d, s) for d, folder in enumerate(self.folders) for s in range(len(folder.sizes))]
            self._pool, self._mixture = CellOrder(sizes, seed, window, shuffle), None
            self.num_cells = self._pool.num_cells
        else:
            # Each dataset has a seed of its own, or equal datasets would be seen in step.
            orders = [CellOrder(f.sizes, seed + 7919 * d, window, shuffle) for d, f in enumerate(self.folders)]
            self.num_cells = sum(order.num_cells for order in orders) if epoch_cells is None else epoch_cells
            self._mixture = MixedOrder(orders, weights, self.num_cells, seed)
        self.epoch = 0
        self._start = _Place(0)  # where the next iteration begins
        self._next: _Place | None = None  # what comes next in the iteration that has begun
        self._identity = self._describe(shuffle, weights, window)
        if batch_size is not None and not len(self):
            raise self._too_few()

    def _too_few(self) -> ValueError:
        return ValueError(
            f"batch_size={self.batch_size}, batch_tokens={self.batch_tokens}: {self.num_cells} cells do not make a "
            f"batch for each of {self.world_size} processes; make it smaller, or set drop_last=False."
        )

    def _describe(self, shuffle: bool, weights: Sequence[float] | None, window: int) -> dict[str, Any]:
        """What decides the batches; a state is of use only where all of it is the same."""
        shards = [shard["sha256"] for folder in self.folders for shard in folder.shards]
        return {
            "shards": hashlib.sha256("\n".join(shards).encode()).hexdigest(),
            "seed": self.seed,
            "shuffle": shuffle,
            "weights": None if weights is None else list(weights),
            "num_cells": self.num_cells,
            "window": window,
        }

    # Where we are -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of this process in an epoch.

        Raises:
            TypeError: with `batch_tokens`, where that is known only when all cells have been seen.
        """
        if self.batch_size is None:
            raise TypeError("the number of batches is not known with batch_tokens: train for a number of steps.")
        full, rest = divmod(self.num_cells, self.batch_size * self.world_size)
        low, high = self._share(rest)
        return full + (not self.drop_last and low < high)

    def _share(self, cells: int) -> tuple[int, int]:
        """This process's part of the cells of a step, divided as evenly as can be."""
        return cells * self.rank // self.world_size, cells * (self.rank + 1) // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless it is the present one."""
        if epoch != self.epoch:
            self.epoch, self._start, self._next = epoch, _Place(0), None

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: how many cells of the epoch all processes have seen together."""
        worker = get_worker_info()
        place = self._start if self._next is None else self._next
        if worker and place.skip is None:  # a worker that has not begun
            place = place._replace(skip=worker.id)
        workers = worker.num_workers if worker else None
        return {
            "epoch": self.epoch,
            "cells": place.cells,
            "skip": place.skip if worker else None,
            "num_workers": workers,
            "identity": dict(self._identity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with any number of processes that shares a step's cells.

        Raises:
            ValueError: for a state of other data or settings, or in the midst of a step.
        """
        different = [key for key, value in self._identity.items() if state["identity"].get(key) != value]
        if different:
            raise ValueError(
                f"the state is of other {', '.join(different)}: resume with the datasets and settings that it was "
                "saved with."
            )
        worker = get_worker_info()
        if state["num_workers"] is not None and (worker is None or worker.num_workers != state["num_workers"]):
            raise ValueError(
                f"the state is of one of {state['num_workers']} workers of a data loader: resume with as many."
            )
        if self.batch_size is not None and state["cells"] % (self.batch_size * self.world_size):
            raise ValueError(
                f"{state['cells']} cells were seen, no multiple of batch_size * world_size = "
                f"{self.batch_size * self.world_size}: choose them so that a step has as many cells as before."
            )
        self.epoch, self._start, self._next = state["epoch"], _Place(state["cells"], state["skip"]), None

    # Batches ----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rest of the epoch; in a data loader's worker every so many-th batch, so that the loader's order fits."""
        worker = get_worker_info()
        own, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        place = self._start
        skip = own if place.skip is None else place.skip
        self._start, self._next = _Place(0), place._replace(skip=skip if worker else None)
        steps = islice(self._steps(self.epoch, place.cells), skip, None, stride)
        for after, batch in self._made_ahead(steps):
            self._next = _Place(after, stride - 1 if worker else None)
            yield batch
        self.epoch, self._next = self.epoch + 1, None

    def _steps(self, epoch: int, position: int) -> Iterator[tuple[int, int, int]]:
        """Steps from a position on: the position behind each, and this process's cells of it, from and to."""
        if self.batch_size is None:
            yield from self._token_steps(epoch, position)
            return
        full = self.batch_size * self.world_size
        while position < self.num_cells:
            cells = min(full, self.num_cells - position)
            low, high = self._share(cells)
            if (cells < full and self.drop_last) or low == high:
                return
            yield position + cells, position + low, position + high
            position += cells

    def _token_steps(self, epoch: int, position: int) -> Iterator[tuple[int, int, int]]:
        """The same with batches filled up to `batch_tokens`: where one ends depends on where it began alone."""
        assert self.batch_tokens is not None
        first = position
        known, sums = position, np.zeros(1, dtype=np.int64)  # tokens of the cells from `known` on, added up
        while position < self.num_cells:
            cuts = [position]
            while len(cuts) <= self.world_size and cuts[-1] < self.num_cells:
                low = cuts[-1] - known
                stop = int(np.searchsorted(sums, sums[low] + self.batch_tokens, side="right")) - 1
                end = known + len(sums) - 1
                if known + stop == end and end < self.num_cells:  # the batch may go on behind what is known
                    more = self._lengths(epoch, end, min(end + _LENGTHS_AHEAD, self.num_cells))
                    sums = np.concatenate([sums[low:], sums[-1] + np.cumsum(more)])
                    known = cuts[-1]
                    continue
                cuts.append(known + stop)
            if len(cuts) <= self.world_size and self.drop_last and position == first == 0:
                raise self._too_few()
            if len(cuts) <= self.world_size and (self.drop_last or len(cuts) <= self.rank + 1):
                return
            yield cuts[-1], cuts[self.rank], cuts[self.rank + 1]
            position = cuts[-1]

    def _lengths(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Tokens of cells at positions of an epoch."""
        num_genes = np.zeros(stop - start, dtype=np.int64)
        for rows, dataset, shard, shard_rows in self._cells(epoch, start, stop)[0]:
            num_genes[rows] = self.folders[dataset].shard(shard).cells.lengths[shard_rows]
        return self.collator.lengths(num_genes)

    def _made_ahead(self, steps: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
        epoch = self.epoch
        if not self.num_threads:
            for after, start, stop in steps:
                yield after, self.batch(epoch, start, stop)
            return
        waiting: deque[tuple[int, Future[dict[str, Any]]]] = deque()
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="cell-batches") as pool:
            try:
                for after, start, stop in steps:
                    waiting.append((after, pool.submit(self.batch, epoch, start, stop)))
                    if len(waiting) > self.prefetch:
                        done, future = waiting.popleft()
                        yield done, future.result()
                while waiting:
                    done, future = waiting.popleft()
                    yield done, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, epoch: int, start: int, stop: int) -> dict[str, Any]:
        """The batch of the cells at positions `start` to `stop` of an epoch."""
        parts, streams = self._cells(epoch, start, stop)
        self._look_ahead(epoch, start)
        rows_of_parts: list[tuple[np.ndarray, CountRows]] = []
        drug_ids = np.zeros(stop - start, dtype=np.int64) if self.collator.drug_token else None
        for rows, dataset, shard_number, shard_rows in parts:
            shard = self.folders[dataset].shard(shard_number)
            rows_of_parts.append((rows, shard.rows(shard_rows)))
            if drug_ids is not None and shard.drug_ids is not None:
                drug_ids[rows] = shard.drug_ids[shard_rows]
        return self.collator.collate(rows_of_parts, streams, drug_ids)

    def _cells(
        self, epoch: int, start: int, stop: int
    ) -> tuple[list[tuple[np.ndarray, int, int, np.ndarray]], np.ndarray]:
        """Cells at positions of an epoch: per shard (rows in the batch, dataset, shard, rows of it), and streams."""
        parts: list[tuple[np.ndarray, int, int, np.ndarray]] = []
        if self._mixture is None:
            cells = self._pool.cells(epoch, start, stop)
            for rows, shard in _by_shard(cells):
                dataset, number = self._owners[shard]
                parts.append((rows, dataset, number, cells.rows[rows]))
            return parts, cells.streams
        streams = np.zeros(stop - start, dtype=np.uint64)
        for dataset, (places, cells) in enumerate(self._mixture.cells(epoch, start, stop)):
            streams[places] = cells.streams
            for rows, shard in _by_shard(cells):
                parts.append((places[rows], dataset, shard, cells.rows[rows]))
        return parts, streams

    def _look_ahead(self, epoch: int, position: int) -> None:
        """Have the shards fetched that are needed now and next, where they are remote."""
        if all(folder.cache is None for folder in self.folders):
            return
        wanted: list[list[int]] = [[] for _ in self.folders]
        if self._mixture is None:
            for shard in self._pool.shards_near(epoch, position, self._pool.window):
                dataset, number = self._owners[shard]
                wanted[dataset].append(number)
        else:
            for dataset, order in enumerate(self._mixture.orders):
                place = int((epoch * self.num_cells + position) * self._mixture.quotas[dataset] / 8192)
                wanted[dataset] = order.shards_near(*divmod(place, order.num_cells), order.window)
        for folder, numbers in zip(self.folders, wanted, strict=True):
            folder.prefetch(numbers)


def _by_shard(cells: Cells) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of the cells of each shard."""
    if len(cells.shards) and (cells.shards == cells.shards[0]).all():  # as in most batches
        yield np.arange(len(cells.shards)), int(cells.shards[0])
        return
    for shard in np.unique(cells.shards):
        yield np.flatnonzero(cells.shards == shard), int(shard)
