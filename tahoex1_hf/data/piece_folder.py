# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The pieces of an unfinished dataset: Arrow files that are mapped, or objects in a store, read by stretches.

The cells of a piece are sorted by key. A shard is a range of keys, of which each piece has a few cells. So what a
store keeps of a piece is cut by key into batches of some 16 cells, and an index beside it says where each lies: a
shard reads one stretch of each piece. The index is written last; a piece without one is not there.
"""

import base64
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tahoex1_hf.common.folders import Folder
from tahoex1_hf.data.columns import MAX_CATEGORIES
from tahoex1_hf.data.pieces import SPLITS, PieceStatistics

_STATISTICS = b"tahoex1"
# Cells of a batch in a store: a shard reads so many more of each piece than it needs.
_BATCH_CELLS = 16
_OWN = ("key", "genes", "counts")  # columns that are not metadata


class PieceSummary(NamedTuple):
    """Facts of a piece, without its cells.

    Attributes:
        statistics: Its statistics.
        schema: Columns with their types.
    """

    statistics: PieceStatistics
    schema: pa.Schema


class PieceFolder(ABC):
    """A folder with pieces, which appear whole or not at all.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Folder):
        self.folder = folder

    @abstractmethod
    def finished(self) -> set[str]:
        """Return the names of the pieces that are there."""

    @abstractmethod
    def write(self, name: str, batches: Sequence[pa.RecordBatch], statistics: PieceStatistics) -> None:
        """Write a piece: a batch, sorted by key, for each of `SPLITS`."""

    @abstractmethod
    def summaries(self, names: Sequence[str]) -> list[PieceSummary]:
        """Return the summary of each piece."""

    @abstractmethod
    def add_values(self, known: set[str], name: str, column: str) -> None:
        """Add the values of a piece's column, as texts, to those that are known."""

    @abstractmethod
    def key_range(self, names: Sequence[str], split: str, number: int, num_shards: int) -> list[pa.RecordBatch]:
        """Return the cells of a shard in each piece, in order of the pieces and the keys, without empty batches.

        Args:
            names: Names of the pieces.
            split: `"train"` or `"validation"`.
            number: Number of the shard, from 0.
            num_shards: Number of shards of the split.
        """


def piece_folder(folder: Folder) -> PieceFolder:
    """Return the pieces in a folder."""
    return MappedPieces(folder) if folder.is_local else StoredPieces(folder)


class MappedPieces(PieceFolder):
    """Pieces in a folder on a file system: Arrow files, which are mapped."""

    def _path(self, name: str) -> Path:
        return Path(self.folder.location) / f"{name}.arrow"

    def finished(self) -> set[str]:
        """Return the names of the pieces that are there."""
        return {name.removesuffix(".arrow") for name in self.folder.names() if not name.startswith(".")}

    def write(self, name: str, batches: Sequence[pa.RecordBatch], statistics: PieceStatistics) -> None:
        """Write a piece."""
        schema = batches[0].schema.with_metadata({_STATISTICS: json.dumps(asdict(statistics)).encode()})
        with self.folder.writing(f"{name}.arrow") as partial, pa.ipc.new_file(str(partial), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    def summaries(self, names: Sequence[str]) -> list[PieceSummary]:
        """Return the summary of each piece."""
        return [self._summary(name) for name in names]

    def _summary(self, name: str) -> PieceSummary:
        with pa.memory_map(str(self._path(name))) as file, pa.ipc.open_file(file) as reader:
            schema = reader.schema
            statistics = PieceStatistics(**json.loads(schema.metadata[_STATISTICS]))
            return PieceSummary(statistics, schema.remove_metadata())

    def _split(self, name: str, split: str) -> pa.RecordBatch:
        return pa.ipc.open_file(pa.memory_map(str(self._path(name)))).get_batch(SPLITS.index(split))

    def add_values(self, known: set[str], name: str, column: str) -> None:
        """Add the values of a piece's column to those that are known."""
        for split in SPLITS:
            known.update(_texts(self._split(name, split).column(column)))

    def key_range(self, names: Sequence[str], split: str, number: int, num_shards: int) -> list[pa.RecordBatch]:
        """Return the cells of a shard in each piece."""
        bounds = _bounds(number, num_shards)
        return _filled(_between(self._split(name, split), *bounds) for name in names)


class StoredPieces(PieceFolder):
    """Pieces in an object store, each of two objects: batches one after the other, and their index.

    The index of a piece holds its statistics, its schema, and for each split the number of bits by which the batches
    are cut: batch number b holds the keys that begin with the bits of b. It also says where each batch ends, and where
    the values of each column of texts are.
    """

    @cached_property
    def _indexes(self) -> dict[str, dict[str, Any]]:
        """The indexes that were read."""
        return {}

    def finished(self) -> set[str]:
        """Return the names of the pieces that are there."""
        return {name.removesuffix(".json") for name in self.folder.names() if name.endswith(".json")}

    def write(self, name: str, batches: Sequence[pa.RecordBatch], statistics: PieceStatistics) -> None:
        """Write a piece, its index last."""
        content = bytearray()
        index: dict[str, Any] = {
            "statistics": asdict(statistics),
            "schema": base64.b64encode(batches[0].schema.serialize()).decode(),
            "splits": {},
            "values": {},
        }
        for split, batch in zip(SPLITS, batches, strict=True):
            bits, ends, start = _bits(batch.num_rows), [], len(content)
            cut = _plain(batch)
            firsts = np.array([number << (64 - bits) for number in range(2**bits)], dtype=np.uint64)
            rows = [*np.searchsorted(batch.column("key").to_numpy(), firsts), batch.num_rows]
            for low, high in pairwise(int(row) for row in rows):
                content += cut.slice(low, high - low).serialize()
                ends.append(len(content))
            index["splits"][split] = {"bits": bits, "start": start, "ends": ends}
        for field in batches[0].schema:
            if field.name not in _OWN:
                texts = sorted(set().union(*(_texts(batch.column(field.name)) for batch in batches)))
                start = len(content)
                content += json.dumps(texts[: MAX_CATEGORIES + 1]).encode()
                index["values"][field.name] = [start, len(content)]
        self.folder.write_file(f"{name}.cells", bytes(content))
        self.folder.write_file(f"{name}.json", json.dumps(index).encode())

    def _read_indexes(self, names: Sequence[str]) -> list[dict[str, Any]]:
        missing = [name for name in names if name not in self._indexes]
        for name, content in zip(missing, self.folder.read_files([f"{name}.json" for name in missing]), strict=True):
            self._indexes[name] = json.loads(content)
        return [self._indexes[name] for name in names]

    def summaries(self, names: Sequence[str]) -> list[PieceSummary]:
        """Return the summary of each piece."""
        return [
            PieceSummary(PieceStatistics(**index["statistics"]), _schema(index)) for index in self._read_indexes(names)
        ]

    def add_values(self, known: set[str], name: str, column: str) -> None:
        """Add the values of a piece's column to those that are known."""
        (index,) = self._read_indexes([name])
        (content,) = self.folder.read_ranges([(f"{name}.cells", *index["values"][column])])
        known.update(json.loads(content))

    def key_range(self, names: Sequence[str], split: str, number: int, num_shards: int) -> list[pa.RecordBatch]:
        """Return the cells of a shard in each piece."""
        low, high = _bounds(number, num_shards)
        indexes, ranges = self._read_indexes(names), []
        for name, index in zip(names, indexes, strict=True):
            part = index["splits"][split]
            first, last = low >> (64 - part["bits"]), (high - 1) >> (64 - part["bits"])
            ends = [part["start"], *part["ends"]]
            ranges.append((f"{name}.cells", ends[first], ends[last + 1]))
        found = []
        for index, content in zip(indexes, self.folder.read_ranges(ranges), strict=True):
            stream, schema = pa.BufferReader(content), _plain_schema(_schema(index))
            while stream.tell() < len(content):
                found.append(_between(pa.ipc.read_record_batch(pa.ipc.read_message(stream), schema), low, high))
        return _filled(found)


def _bounds(number: int, num_shards: int) -> tuple[int, int]:
    """Return the first key of a shard, and the key after its last."""
    # The first key of shard s is s * 2^64 / num_shards, rounded up.
    return -(-number * 2**64 // num_shards), -(-(number + 1) * 2**64 // num_shards)


def _between(batch: pa.RecordBatch, low: int, high: int) -> pa.RecordBatch:
    keys = batch.column("key").to_numpy()
    first = int(np.searchsorted(keys, np.uint64(low)))
    last = len(keys) if high == 2**64 else int(np.searchsorted(keys, np.uint64(high)))
    return batch.slice(first, last - first)


def _filled(batches: Iterable[pa.RecordBatch]) -> list[pa.RecordBatch]:
    return [batch for batch in batches if batch.num_rows]


def _bits(num_cells: int) -> int:
    return max(0, math.ceil(math.log2(max(1, num_cells) / _BATCH_CELLS)))


def _texts(column: pa.Array) -> set[str]:
    values = column.dictionary if pa.types.is_dictionary(column.type) else column.cast(pa.string()).unique()
    return {text for text in values.to_pylist() if text is not None}


def _schema(index: dict[str, Any]) -> pa.Schema:
    return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(index["schema"])))


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch whose dictionaries are decoded, so that its parts can be read by themselves."""
    columns = [each.dictionary_decode() if pa.types.is_dictionary(each.type) else each for each in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=_plain_schema(batch.schema))


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema(
        [
            pa.field(field.name, field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
            for field in schema
        ]
    )
