# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Shards: the embeddings that an unfinished run has made so far, as Parquet files in a folder or object store.

A shard holds consecutive chunks, and appears complete or not at all. It is named after its chunks, so that the names
alone show which chunks are missing. Several processes write into the same folder, and none changes the files of
another.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tahoex1_hf.cells.fingerprint import agrees
from tahoex1_hf.common.folders import Folder

_SHARD = re.compile(r"chunks-(\d{12})-(\d{12})\.parquet")
_RUN = "run.json"
# Number of values in a row group: 1 MB.
_GROUP_VALUES = 2**18
# Prefix of the columns of obs, which tells them from the shard's own columns.
_OBS = "obs:"
NUMBERS = ("deviation", "score", "score_sd")
"""Names of what may be computed of each cell beside its embedding, see `EmbeddedChunk`."""


class Shard(NamedTuple):
    """Embeddings of consecutive cells.

    Attributes:
        names: Names of the cells; empty for outputs without names.
        embeddings: `(cells, width)` float32.
        num_empty: Number of cells in which no known gene is expressed.
        numbers: `(cells,)` float32 numbers beside the embeddings, by their names in `NUMBERS`.
        obs: Columns of obs; None if none were requested.
    """

    names: list[str]
    embeddings: np.ndarray
    num_empty: int
    numbers: Mapping[str, np.ndarray] = MappingProxyType({})
    obs: pa.Table | None = None


def _same(key: str, before: Any, now: Any) -> bool:
    """Return whether an entry of two identities is the same.

    The entry `cells` is a list with `[path, fingerprint, number of cells]` of each input.
    """
    if key != "cells" or before == now or not isinstance(now, list) or len(before) != len(now):
        return bool(before == now)
    pairs = zip(before, now, strict=True)
    return all(one[0] == two[0] and agrees(one[1], two[1]) and one[2:] == two[2:] for one, two in pairs)


class ShardFolder(Folder):
    """The folder with the shards of a run."""

    # Identity of the run -----------------------------------------------------------------------------

    def recorded(self) -> dict[str, Any] | None:
        """Return the identity of the run that has begun here; None if none has."""
        return json.loads(self.read_file(_RUN)) if _RUN in self.names() else None

    def claim(self, identity: dict[str, Any], restart: bool, formerly: Mapping[str, Any]) -> None:
        """Begin a run, or resume a run with the same identity.

        Args:
            identity: All settings and inputs that decide the result, as JSON. An entry that an older run did not
                record is assumed to be the same.
            restart: Whether to remove the files of an earlier run.
            formerly: Known values of entries that older runs did not record.

        Raises:
            ValueError: If the folder holds the shards of a run with another identity.
        """
        if restart:
            self.remove()
        recorded = self.recorded()
        if recorded is not None:
            found = {**formerly, **recorded}
            different = sorted(key for key, value in found.items() if not _same(key, value, identity.get(key)))
            if different:
                raise ValueError(
                    f"{self.location} holds an unfinished run with other settings ({', '.join(different)}): finish it "
                    "with its own command, or pass restart=True (--restart) to start from the beginning."
                )
            return
        self.write_file(_RUN, json.dumps(identity, indent=1).encode())

    # Shards ----------------------------------------------------------------------------------------

    def finished(self) -> list[tuple[int, int]]:
        """Return the first chunk of every shard and the chunk after its last, in order and without overlaps.

        A shard that overlaps one before it counts as not there: it is what a worker wrote that was taken for lost
        while another did its work, cut in another way.
        """
        matches = (_SHARD.fullmatch(name) for name in self.names())
        found: list[tuple[int, int]] = []
        for start, stop in sorted((int(match[1]), int(match[2])) for match in matches if match):
            if not found or start >= found[-1][1]:
                found.append((start, stop))
        return found

    def write(self, start: int, stop: int, shard: Shard) -> None:
        """Write the shard of chunks `start` to `stop`."""
        if not self.is_local:
            self.write_packed(start, stop, packed(shard))
            return
        self.make()
        with self.writing(_name_of(start, stop)) as partial:
            _write_table(shard, partial)

    def write_packed(self, start: int, stop: int, content: bytes) -> None:
        """Write the shard of chunks `start` to `stop` that `packed` has put into bytes."""
        self.write_file(_name_of(start, stop), content)

    def read(self, start: int, stop: int) -> Shard:
        """Read the shard of chunks `start` to `stop`."""
        name = _name_of(start, stop)
        table = pq.read_table(self.place(name) if self.is_local else pa.BufferReader(self.read_file(name)))
        column = table.column("embedding")
        whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        flat = whole.flatten().to_numpy(zero_copy_only=False)
        names = table.column("cell").to_pylist() if "cell" in table.column_names else []
        numbers = {name: table.column(name).to_numpy() for name in NUMBERS if name in table.column_names}
        metadata = table.schema.metadata or {}
        embeddings = flat.reshape(table.num_rows, -1)
        return Shard(names, embeddings, int(metadata[b"num_empty"]), numbers, _obs_of(table))

    def obs_schemas(self) -> list[pa.Schema]:
        """Return the columns of obs of each shard, with their types."""
        schemas = []
        for start, stop in self.finished():
            with self.open(_name_of(start, stop)) as file:
                schemas.append(_obs_of(pq.read_schema(file).empty_table()).schema)
        return schemas

    def summed(self) -> list[tuple[int, int]]:
        """Return the shards whose cells are included in a sum.

        Shards whose cells are in no sum are removed, and so are sums that include cells of missing shards.
        """
        finished = set(self.finished())
        covered: set[tuple[int, int]] = set()
        for name, shards, _ in list(self.read_sums()):
            if shards <= finished:
                covered |= shards
            else:
                self.delete(name)
        self.drop(finished - covered)
        return sorted(covered)

    def drop(self, shards: Iterable[tuple[int, int]]) -> None:
        """Remove shards; their cells must then be embedded again."""
        for start, stop in shards:
            self.delete(_name_of(start, stop))

    # Sums over the cells of shards -----------------------------------------------------------------

    def write_sums(self, writer: str, shards: Iterable[tuple[int, int]], sums: dict[str, np.ndarray]) -> None:
        """Write a process's sums over the cells of its shards, and replace the sums that it wrote before."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**sums, "shards": np.array(list(shards), dtype=np.int64).reshape(-1, 2)}
        np.savez(buffer, **arrays)
        self.write_file(f"sums-{writer}.npz", buffer.getvalue())

    def read_sums(self) -> Iterator[tuple[str, set[tuple[int, int]], dict[str, np.ndarray]]]:
        """Yield the name of every file with a process's sums, the shards that they include, and the sums."""
        for name in self.names():
            if name.startswith("sums-"):
                with np.load(io.BytesIO(self.read_file(name)), allow_pickle=False) as arrays:
                    sums = {key: arrays[key] for key in arrays.files}
                yield name, {(int(a), int(b)) for a, b in sums.pop("shards")}, sums


def packed(shard: Shard) -> bytes:
    """Return the content of a shard's file; the same shard gives the same bytes."""
    buffer = io.BytesIO()
    _write_table(shard, buffer)
    return buffer.getvalue()


def _write_table(shard: Shard, place: Path | io.BytesIO) -> None:
    width = shard.embeddings.shape[1]
    values = pa.array(np.ascontiguousarray(shard.embeddings, dtype=np.float32).ravel())
    columns = {"embedding": pa.FixedSizeListArray.from_arrays(values, width)}
    columns |= {name: pa.array(values, pa.float32()) for name, values in shard.numbers.items()}
    if shard.names:
        columns = {"cell": pa.array(shard.names, pa.string()), **columns}
    for name, values in zip(shard.obs.column_names, shard.obs.columns, strict=True) if shard.obs else ():
        columns[f"{_OBS}{name}"] = values
    table = pa.table(columns).replace_schema_metadata({"num_empty": str(shard.num_empty)})
    # Arrow holds as many bytes again as a group has, for the places of its lists.
    rows = max(1, _GROUP_VALUES // width)
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, place, row_group_size=rows, **options)


def _name_of(start: int, stop: int) -> str:
    return f"chunks-{start:012d}-{stop:012d}.parquet"


def _obs_of(table: pa.Table) -> pa.Table:
    """Return the columns of obs of a shard's table."""
    names = [name for name in table.column_names if name.startswith(_OBS)]
    return table.select(names).rename_columns([name.removeprefix(_OBS) for name in names])
