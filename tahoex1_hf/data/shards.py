# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Second pass of preparing: gather shards from the pieces; each shard is a range of the cells' random keys."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tahoex1_hf.cells.ragged import gather_rows
from tahoex1_hf.common.folders import Folder
from tahoex1_hf.data.columns import unified

# Number of rows of a record batch (Arrow) or row group (Parquet): about 50 MB, which a reader without a memory map
# holds.
_BATCH_CELLS = 8192


@dataclass(frozen=True)
class DatasetSchema:
    """Types of the columns of the dataset.

    Attributes:
        genes: Numpy name of the type of gene ids: `uint16` or `int32`.
        counts: `uint16` where every count of the dataset is a whole number below 65,536, else `float32`.
        columns: Metadata column -> Arrow type.
        categories: Metadata column -> its values in order, where it is written as a dictionary.
    """

    genes: str
    counts: str
    columns: dict[str, pa.DataType]
    categories: dict[str, list[str]]

    def arrow(self) -> pa.Schema:
        """Return the schema of the shards."""
        fields = [
            pa.field("genes", pa.list_(_TYPES[self.genes])),
            pa.field("counts", pa.list_(_TYPES[self.counts])),
        ]
        for name, kind in self.columns.items():
            plain = pa.types.is_dictionary(kind) and name not in self.categories
            fields.append(pa.field(name, pa.string() if plain else kind))
        return pa.schema(fields)


_TYPES = {"uint16": pa.uint16(), "int32": pa.int32(), "float32": pa.float32()}


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as the manifest lists it."""

    file: str
    cells: int
    genes: int
    bytes: int
    sha256: str


def write_shard(
    folder: Folder, name: str, batches: Sequence[pa.RecordBatch], schema: DatasetSchema, format: str
) -> ShardRecord:
    """Gather a shard from its cells in the pieces and write it; the file appears whole or not at all.

    Args:
        folder: Folder of the shards.
        name: Name of the file.
        batches: Cells of the shard in each piece, in order of the pieces and of the keys.
        schema: Types of the columns.
        format: `"arrow"` or `"parquet"`.
    """
    order = np.argsort(_joined_keys(batches), kind="stable")
    arrays: list[pa.Array] = []
    for column in ("genes", "counts", *schema.columns):
        parts = [
            batch.column(column) if column in batch.schema.names else pa.nulls(batch.num_rows) for batch in batches
        ]
        if column in ("genes", "counts"):
            arrays.append(_gathered(parts, order, np.dtype(schema.genes if column == "genes" else schema.counts)))
        else:
            joined = unified(parts, schema.columns[column], schema.categories.get(column))
            arrays.append(joined.take(pa.array(order)))
    table = pa.table(arrays, schema=schema.arrow())
    with folder.writing(name) as partial:
        _write_table(table, partial, schema, format)
        return ShardRecord(
            file=f"data/{name}",
            cells=table.num_rows,
            genes=len(table.column("genes").combine_chunks().flatten()),
            bytes=partial.stat().st_size,
            sha256=file_sha256(partial),
        )


def _write_table(table: pa.Table, path: Path, schema: DatasetSchema, format: str) -> None:
    if format == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=_BATCH_CELLS)
        return
    import pyarrow.parquet as pq

    dictionaries = list(schema.categories) or False
    pq.write_table(table, path, row_group_size=_BATCH_CELLS, compression="zstd", use_dictionary=dictionaries)


def _gathered(parts: list[pa.ListArray], order: np.ndarray, dtype: np.dtype) -> pa.ListArray:
    """Return the rows of list arrays, joined and put in order."""
    lengths = np.concatenate([np.diff(np.asarray(part.offsets)) for part in parts]).astype(np.int64)
    values = np.empty(lengths.sum(), dtype=dtype)
    place = 0
    for part in parts:
        flat = part.flatten().to_numpy(zero_copy_only=False)  # has the rows of the slice alone
        values[place : place + len(flat)] = flat
        place += len(flat)
    target = np.empty_like(values)
    gather_rows(values, (np.cumsum(lengths) - lengths)[order], lengths[order], target)
    offsets = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(target))


def _joined_keys(batches: Sequence[pa.RecordBatch]) -> np.ndarray:
    return np.concatenate([batch.column("key").to_numpy() for batch in batches])


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_record(folder: Folder, name: str, record: ShardRecord) -> None:
    """Note that a shard is finished."""
    folder.write_file(name, json.dumps(asdict(record)).encode())


def load_record(folder: Folder, name: str, output: Folder) -> ShardRecord | None:
    """Return what `save_record` noted, if the shard is still there with that size."""
    if folder.size(name) is None:
        return None
    record = ShardRecord(**json.loads(folder.read_file(name)))
    return record if output.size(record.file) == record.bytes else None
