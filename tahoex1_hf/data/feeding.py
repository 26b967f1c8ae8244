# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Finished training batches from prepared datasets, for any number of processes, with exact resuming.

The cells of an epoch have one order (`order.py`). It is cut into batches; process `r` of `n` takes batches r, r + n,
r + 2n and so on, so that the n batches of a step, put together, are the same however many processes share them.
Threads make batches ahead: the inner loop (`kernels.py`) runs without the GIL, and passing arrays between processes
costs more than making them.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from tahoex1_hf.cells.ragged import RowViews
from tahoex1_hf.cells.readers.prepared import PreparedDataset, check_vocabulary, column_ids, count_values
from tahoex1_hf.common.prefetch import prefetch_calls
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.data.order import MIX_BLOCK, CellOrder, CellPlaces, MixedOrder
from tahoex1_hf.encoding_tahoe_x1 import DrugTable

if TYPE_CHECKING:
    import pyarrow as pa


class _Position(NamedTuple):
    """A position in an epoch.

    Attributes:
        cells: Number of the epoch's cells that are done.
        skip: Number of the following steps that belong to other workers of a data loader; None outside a worker that
            has begun.
    """

    cells: int
    skip: int | None = None


class CellBatches(IterableDataset):
    """Batches of training cells, to be iterated over directly, or through a data loader with `batch_size=None`.

    Args:
        locations: Folder or URL of a prepared dataset, or several.
        collator: Collator that makes the batches.
        batch_size: Number of cells in a batch of one process.
        split: `"train"` or `"validation"`.
        seed: Seed of the order, the samples and the targets.
        shuffle: Whether to shuffle the cells; otherwise they keep their order on disk.
        weights: Share of each dataset in every batch, in any unit; by default the cells of all datasets are one pool,
            and each cell is seen once per epoch.
        epoch_cells: With `weights`, number of cells in an epoch; by default the number of cells of all datasets.
        window: Number of cells that are shuffled together after the shards are.
        rank: Number of this process.
        world_size: Number of processes.
        drop_last: Whether to leave out the last cells of an epoch, which do not make a full batch for every process;
            otherwise they are divided among the processes, some of which may then have one batch less.
        num_threads: Number of threads that make batches ahead; 0 makes a batch when it is asked for.
        prefetch: Number of batches made ahead.
        cache_folder: Folder for copies of remote shards, by default `TAHOEX1_DATA_CACHE` or
            `~/.cache/tahoex1_hf/data`.
        cache_bytes: Most bytes kept there.
        storage_options: Options for remote datasets, passed to fsspec.

    Raises:
        FileNotFoundError: For a location without a prepared dataset.
        ValueError: For settings that cannot be used, and for datasets of another vocabulary than the tokenizer's.
    """

    def __init__(
        self,
        locations: str | Path | Sequence[str | Path],
        collator: CellCollator,
        *,
        batch_size: int,
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
        if batch_size < 1 or num_threads < 0 or prefetch < 1:
            raise ValueError(
                f"batch_size={batch_size}, num_threads={num_threads}, prefetch={prefetch}: pass at least 1, 0 and 1."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: rank must be from 0 to world_size - 1.")
        if epoch_cells is not None and weights is None:
            raise ValueError(f"epoch_cells={epoch_cells} needs weights: without, an epoch is every cell once.")
        self.collator, self.seed, self.batch_size = collator, seed, batch_size
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.num_threads, self.prefetch = num_threads, prefetch
        places = [locations] if isinstance(locations, (str, Path)) else list(locations)
        cache = {"cache_folder": cache_folder, "cache_bytes": cache_bytes / len(places)}
        self.folders = self._open_folders(places, split, {**cache, "storage_options": storage_options})
        self._set_order(shuffle, weights, epoch_cells, window)
        self.epoch = 0
        self._start = _Position(0)  # where the next iteration begins
        self._next: _Position | None = None  # the next position of an iteration that has begun
        self._identity = self._describe(shuffle, weights, window)
        if not len(self):
            raise ValueError(
                f"batch_size={batch_size}: {self.num_cells} cells do not make a batch for each of {world_size} "
                "processes; make it smaller, or set drop_last=False."
            )

    def _open_folders(self, places: list[str | Path], split: str, options: dict[str, Any]) -> list[PreparedDataset]:
        tokenizer = self.collator.tokenizer
        table = tokenizer.drug_table if self.collator.drug_token else None
        warn = "new" if self.rank == 0 else "never"  # all processes refuse unknown drugs, but only one warns
        settle = None if table is None else partial(_settle, table, tokenizer.unknown_drugs, warn)
        ids = None if table is None or settle is None else partial(_drug_ids, table, settle)
        folders = [
            PreparedDataset(place, split, max_open=8 + 4 * len(places), drug_ids=ids, **options) for place in places
        ]
        for folder in folders:
            check_vocabulary(folder, tokenizer)
        if settle is not None:  # drugs of remote datasets are checked when their shards arrive
            settle(sum((folder.value_counts("drug") for folder in folders if folder.cache is None), Counter()))
        return folders

    def _set_order(self, shuffle: bool, weights: Sequence[float] | None, epoch_cells: int | None, window: int) -> None:
        """Set the order of the cells: one pool of all datasets, or a mixture by weight."""
        if weights is None:
            sizes = [size for folder in self.folders for size in folder.sizes]
            self._owners = [(d, s) for d, folder in enumerate(self.folders) for s in range(len(folder.sizes))]
            self._pool, self._mixture = CellOrder(sizes, self.seed, window, shuffle), None
            self.num_cells = self._pool.num_cells
            return
        # Each dataset has its own seed: with a common seed, equal datasets would be read in step.
        orders = [CellOrder(f.sizes, self.seed + 7919 * d, window, shuffle) for d, f in enumerate(self.folders)]
        self.num_cells = sum(order.num_cells for order in orders) if epoch_cells is None else epoch_cells
        self._mixture = MixedOrder(orders, weights, self.num_cells, self.seed)

    def _describe(self, shuffle: bool, weights: Sequence[float] | None, window: int) -> dict[str, Any]:
        """Return the settings that decide the batches; a state can be resumed only where all are the same."""
        shards = [shard["sha256"] for folder in self.folders for shard in folder.shards]
        return {
            "shards": hashlib.sha256("\n".join(shards).encode()).hexdigest(),
            "seed": self.seed,
            "shuffle": shuffle,
            "weights": None if weights is None else list(weights),
            "num_cells": self.num_cells,
            "window": window,
        }

    # Position ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of this process's batches in an epoch."""
        full, rest = divmod(self.num_cells, self.batch_size * self.world_size)
        low, high = self._share(rest)
        return full + (not self.drop_last and low < high)

    def _share(self, cells: int) -> tuple[int, int]:
        """Return this process's first cell in a step and the cell after its last; steps are divided evenly."""
        return cells * self.rank // self.world_size, cells * (self.rank + 1) // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self._start, self._next = epoch, _Position(0), None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the iteration: the number of cells of the epoch that all processes have seen."""
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
        """Resume where `state_dict` was taken, with any number of processes that share a step's cells evenly.

        Raises:
            ValueError: If the state was saved with other data or settings, or within a step.
        """
        different = [key for key, value in self._identity.items() if state["identity"].get(key) != value]
        if different:
            raise ValueError(
                f"the state was saved with other {', '.join(different)}: resume with the same datasets and settings."
            )
        worker = get_worker_info()
        if state["num_workers"] is not None and (worker is None or worker.num_workers != state["num_workers"]):
            raise ValueError(
                f"the state is of one of {state['num_workers']} workers of a data loader: resume with as many."
            )
        if state["cells"] % (self.batch_size * self.world_size):
            raise ValueError(
                f"{state['cells']} cells were seen, not a multiple of batch_size * world_size = "
                f"{self.batch_size * self.world_size}: choose them so that a step has as many cells as before."
            )
        self.epoch, self._start, self._next = state["epoch"], _Position(state["cells"], state["skip"]), None

    # Batches ----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of the rest of the epoch.

        Worker `w` of `n` workers of a data loader makes batches w, w + n, w + 2n and so on: the loader takes batches
        from its workers in turn.
        """
        worker = get_worker_info()
        own, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        place = self._start
        skip = own if place.skip is None else place.skip
        self._start, self._next = _Position(0), place._replace(skip=skip if worker else None)
        steps = islice(self._steps(place.cells), skip, None, stride)
        for after, batch in self._made_ahead(steps):
            self._next = _Position(after, stride - 1 if worker else None)
            yield batch
        self.epoch, self._next = self.epoch + 1, None

    def _steps(self, position: int) -> Iterator[tuple[int, int, int]]:
        """Yield the steps from a position on: the position after the step, and this process's first and last cell."""
        full = self.batch_size * self.world_size
        while position < self.num_cells:
            cells = min(full, self.num_cells - position)
            low, high = self._share(cells)
            if (cells < full and self.drop_last) or low == high:
                return
            yield position + cells, position + low, position + high
            position += cells

    def _made_ahead(self, steps: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
        make = partial(self._step_batch, self.epoch)
        calls = (partial(make, *step) for step in steps)
        yield from prefetch_calls(calls, self.prefetch, self.num_threads, name="cell-batches")

    def _step_batch(self, epoch: int, after: int, start: int, stop: int) -> tuple[int, dict[str, Any]]:
        return after, self.batch(epoch, start, stop)

    def batch(self, epoch: int, start: int, stop: int) -> dict[str, Any]:
        """Make the batch of the cells at positions `start` to `stop` of an epoch."""
        parts, streams = self._cells(epoch, start, stop)
        self._fetch_ahead(epoch, start)
        rows_of_parts: list[tuple[np.ndarray, RowViews]] = []
        drug_ids = np.zeros(stop - start, dtype=np.int64) if self.collator.drug_token else None
        for rows, dataset, shard_number, shard_rows in parts:
            shard = self.folders[dataset].shard(shard_number)
            rows_of_parts.append((rows, shard.cells.select(shard_rows)))
            if drug_ids is not None and shard.drug_ids is not None:
                drug_ids[rows] = shard.drug_ids[shard_rows]
        return self.collator.collate(rows_of_parts, streams, drug_ids)

    def _cells(
        self, epoch: int, start: int, stop: int
    ) -> tuple[list[tuple[np.ndarray, int, int, np.ndarray]], np.ndarray]:
        """Find the cells at positions of an epoch.

        Returns:
            For each shard, the cells' rows in the batch, the dataset, the shard, and the cells' rows in the shard; and
            `(batch,)` uint64, where the random numbers of each cell start.
        """
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

    def _fetch_ahead(self, epoch: int, position: int) -> None:
        """Start to fetch the remote shards that are needed now and next."""
        if all(folder.cache is None for folder in self.folders):
            return
        wanted: list[list[int]] = [[] for _ in self.folders]
        if self._mixture is None:
            for shard in self._pool.shards_near(epoch, position, self._pool.window):
                dataset, number = self._owners[shard]
                wanted[dataset].append(number)
        else:
            for dataset, order in enumerate(self._mixture.orders):
                place = int((epoch * self.num_cells + position) * self._mixture.quotas[dataset] / MIX_BLOCK)
                wanted[dataset] = order.shards_near(*divmod(place, order.num_cells), order.window)
        for folder, numbers in zip(self.folders, wanted, strict=True):
            folder.prefetch(numbers)


def _settle(table: DrugTable, rule: str, warn: str, cells: Mapping[Any, int]) -> None:
    """Refuse or report the drugs that the table lacks, given the number of cells of each drug."""
    table.settle(table.unknown(cells), rule, warn)


def _drug_ids(table: DrugTable, settle: Callable[[Mapping[Any, int]], None], column: "pa.ChunkedArray") -> np.ndarray:
    """Return the drug ids of a shard's column."""
    settle(count_values(column))
    return column_ids(column, lambda names: table.look_up(names)[0])


def _by_shard(cells: CellPlaces) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the rows of the cells of each shard, and the shard."""
    if len(cells.shards) and (cells.shards == cells.shards[0]).all():  # as in most batches
        yield np.arange(len(cells.shards)), int(cells.shards[0])
        return
    for shard in np.unique(cells.shards):
        yield np.flatnonzero(cells.shards == shard), int(shard)
