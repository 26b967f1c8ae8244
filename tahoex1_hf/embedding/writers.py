# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Writers of the output of an embedding run; it is written from the shards, and appears when it is complete."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.readers.paths import is_zarr_store
from tahoex1_hf.embedding.obs_columns import conformed, free_name
from tahoex1_hf.embedding.shards import Shard
from tahoex1_hf.embedding.streams import WholeStream
from tahoex1_hf.inference.provenance import check_key, provenance_key

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_FORMATS = (".h5ad", ".zarr", ".parquet", ".npy")
_ANNDATA = (".h5ad", ".zarr")
# Number of values of a row group of a Parquet table: 8 MB.
_GROUP_VALUES = 2**21


def check_output(
    output: str,
    gene_embeddings: bool,
    key_added: str,
    numbers: Sequence[str] = (),
    wide: bool = False,
    obs: Sequence[str] | None = None,
) -> None:
    """Raise ValueError before any work is done if the output cannot be written."""
    check_key(key_added)
    name = output.rpartition("/")[2]
    if not output.endswith(_FORMATS):
        raise ValueError(f"The output must end in .h5ad, .zarr, .parquet or .npy, got {name!r}.")
    if gene_embeddings and not output.endswith(_ANNDATA):
        raise ValueError(f"Gene embeddings need an output that ends in .h5ad or .zarr, got {name!r}.")
    if numbers and output.endswith(".npy"):
        raise ValueError(
            f"draws and score give each cell further numbers ({', '.join(numbers)}), which {name!r} cannot hold: name "
            "an .h5ad."
        )
    if wide and not output.endswith(".parquet"):
        raise ValueError(f"wide (--wide) needs an output that ends in .parquet, got {name!r}.")
    if obs is not None and output.endswith(".npy"):
        raise ValueError(f"obs={','.join(obs)}: {name!r} has no place for columns of obs; name a .parquet.")
    if "://" in output:
        if output.endswith(_ANNDATA):
            kind = name.rpartition(".")[2]
            raise ValueError(f"A .{kind} output cannot be written to {output}: name a local one, or a .parquet.")
    elif not Path(output).parent.is_dir():
        raise ValueError(f"The output's folder {Path(output).parent} does not exist.")
    elif output.endswith(".zarr") and Path(output).exists() and not is_zarr_store(Path(output)):
        raise ValueError(f"{output} exists and is not a zarr store: name another output.")


@dataclass(frozen=True)
class Layout:
    """The layout of an output.

    Attributes:
        shape: Numbers of cells and dimensions.
        key_added: Slot of `obsm`, or name of the column of embeddings.
        sources: Names of the sources; if there are several, a column holds the source of each cell.
        numbers: Names of the numbers of each cell (see `Shard`), with their columns in the output.
    """

    shape: tuple[int, int]
    key_added: str
    sources: list[str]
    numbers: Mapping[str, str] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether there are several sources."""
        return len(self.sources) > 1

    @property
    def own_columns(self) -> list[str]:
        """Names of the columns other than embeddings, columns of obs, and names of the cells."""
        return [*(["source"] if self.several else []), *self.numbers.values()]


class EmbeddingWriter(ABC):
    """Base of the writers, which write embeddings in order to a partial file that `finish` moves into place."""

    layout: Layout

    @abstractmethod
    def write(self, shard: Shard, source: str) -> None:
        """Write the next cells, which come from one source."""

    def write_genes(self, slot: str, embeddings: np.ndarray) -> None:
        """Write `(genes, width)` gene embeddings into a slot of `varm`."""
        raise ValueError("Gene embeddings need an output that ends in .h5ad or .zarr.")

    @abstractmethod
    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write the record of how the embeddings were made, if the format has a place for it."""

    @abstractmethod
    def finish(self) -> None:
        """Close the file, and move it into place."""

    @abstractmethod
    def abandon(self) -> None:
        """Remove the unfinished file."""


class ParquetWriter(EmbeddingWriter):
    """Writer of a Parquet table: `cell` (the name), `source` (if several), columns of obs, and the embedding.

    The embedding is one column of lists of fixed size, named `key_added`; or, with `wide`, one column per dimension.
    The columns before them hold the numbers of each cell, if there are any.

    Args:
        output: Path or URL.
        layout: Layout of the output.
        obs: Column of obs -> its type.
        wide: Whether each dimension is a column.
    """

    def __init__(self, output: str, layout: Layout, obs: dict[str, "pa.DataType"], wide: bool):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.layout, self.obs, self.wide = layout, obs, wide
        width, key = layout.shape[1], layout.key_added
        dimensions = [pa.field(f"{key}_{i}", pa.float32()) for i in range(width)]
        if not wide:
            dimensions = [pa.field(key, pa.list_(pa.float32(), width))]
        own = {"cell", *layout.own_columns, *(each.name for each in dimensions)}
        source = [pa.field("source", pa.string())] if layout.several else []
        numbers = [pa.field(column, pa.float32()) for column in layout.numbers.values()]
        columns = []
        for name, kind in obs.items():
            columns.append(pa.field(free_name(name, own), kind))
            own.add(columns[-1].name)
        self.schema = pa.schema([pa.field("cell", pa.string()), *source, *columns, *numbers, *dimensions])
        self.stream = WholeStream(output)
        labels = ["cell", *(each.name for each in (*source, *columns) if not pa.types.is_nested(each.type))]
        # Values of embeddings hardly ever repeat, so a dictionary or statistics of them would be useless.
        options: dict[str, Any] = {"use_dictionary": labels, "write_statistics": labels}
        self.file = pq.ParquetWriter(self.stream.file, self.schema, **options)
        self.group_rows, self.waiting = max(1, _GROUP_VALUES // width), self.schema.empty_table()

    def write(self, shard: Shard, source: str) -> None:
        """Write the rows of a shard, in row groups that do not depend on how the cells were cut into shards."""
        import pyarrow as pa

        columns = [pa.array(shard.names, pa.string())]
        if self.layout.several:
            columns.append(pa.array([source] * len(shard.names), pa.string()))
        columns += conformed(shard.obs, self.obs, len(shard.names))
        columns += [pa.array(shard.numbers[name], pa.float32()) for name in self.layout.numbers]
        if self.wide:
            columns += [pa.array(column) for column in shard.embeddings.T]
        else:
            values = pa.array(np.ascontiguousarray(shard.embeddings, dtype=np.float32).ravel())
            columns.append(pa.FixedSizeListArray.from_arrays(values, self.layout.shape[1]))
        arrays = [column.cast(kind) for column, kind in zip(columns, self.schema.types, strict=True)]
        self.waiting = pa.concat_tables([self.waiting, pa.Table.from_arrays(arrays, schema=self.schema)])
        while len(self.waiting) >= self.group_rows:
            self._write_group(self.group_rows)

    def _write_group(self, rows: int) -> None:
        self.file.write_table(self.waiting.slice(0, rows).combine_chunks(), row_group_size=rows)
        self.waiting = self.waiting.slice(rows).combine_chunks()  # a copy, so that what was written is freed

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write the record of how the embeddings were made into the file's metadata, as JSON under `tahoe_x1`."""
        self.file.add_key_value_metadata({provenance_key(self.layout.key_added): json.dumps(provenance)})

    def finish(self) -> None:
        """Write the last rows and the footer, and move the file into place."""
        if len(self.waiting):
            self._write_group(len(self.waiting))
        self.file.close()
        self.stream.finish()

    def abandon(self) -> None:
        """Remove the unfinished file."""
        with suppress(Exception):  # the error that matters is being raised already
            self.file.close()
        self.stream.abandon()


class NpyWriter(EmbeddingWriter):
    """Writer of an `.npy` file with a `(cells, width)` array."""

    def __init__(self, output: str, layout: Layout):
        self.layout, self.stream = layout, WholeStream(output)
        np.lib.format.write_array_header_2_0(
            self.stream.file, {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": layout.shape}
        )

    def write(self, shard: Shard, source: str) -> None:
        """Write the rows of a shard."""
        self.stream.file.write(np.ascontiguousarray(shard.embeddings, dtype=np.float32).tobytes())

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Log the record of how the embeddings were made, since the format has no place for it."""
        logger.info("An .npy file cannot hold the record of how the embeddings were made: %s", json.dumps(provenance))

    def finish(self) -> None:
        """Move the file into place."""
        self.stream.finish()

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self.stream.abandon()
