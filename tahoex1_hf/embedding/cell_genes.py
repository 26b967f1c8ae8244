# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Contextual gene embeddings of each cell, as a Parquet table with a row for every gene of every cell.

The embeddings are too large for memory. Each chunk has a file, into which its batches are written with one row group
per cell. At the end, the table is written from these files in the order of the cells; until they are removed, the
embeddings are on disk twice.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tahoex1_hf.cells.readers.base import cell_names
from tahoex1_hf.embedding.shards import ShardFolder
from tahoex1_hf.embedding.streams import WholeStream
from tahoex1_hf.inference.encoder import TokenSink
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# Number of values in a row group of the table: 64 MB.
_GROUP_VALUES = 2**24
# Key of a chunk file's metadata: for each row group, the row number of its cell in the chunk.
_CELLS = "cells"


def check_cell_gene_output(location: str, output: str) -> None:
    """Raise ValueError before any work is done if the table cannot be written."""
    if not location.endswith(".parquet"):
        raise ValueError(f"cell_gene_embeddings={location!r} must end in .parquet.")
    if location == output or ("://" not in location and Path(location).resolve() == Path(output).resolve()):
        raise ValueError(f"cell_gene_embeddings={location!r} is also the output of the cells: name another file.")
    if "://" not in location and not Path(location).parent.is_dir():
        raise ValueError(f"cell_gene_embeddings: the folder {Path(location).parent} does not exist.")


class CellGenes:
    """The gene embeddings of the cells of a run: stored by chunk in the folder of the shards, then written as a table.

    Args:
        location: Path or URL of the table.
        shards: Folder of the shards.
        tokenizer: Tokenizer, whose tokens are the names of the genes.
        width: Number of dimensions.
        key_added: Name of the column of embeddings.
        several: Whether there are several sources, so that the table has a column with their names.
    """

    def __init__(
        self,
        location: str,
        shards: ShardFolder,
        tokenizer: TahoeX1Tokenizer,
        width: int,
        key_added: str,
        several: bool,
    ):
        self.location, self.shards, self.width = location, shards, width
        self.is_gene = tokenizer.is_gene
        names = np.full(len(self.is_gene), "", dtype=object)
        for token, number in tokenizer.get_vocab().items():
            names[number] = token
        self.genes = pa.array(names, pa.string())
        labels = ["cell", *(["source"] if several else []), "gene"]
        fields = [*(pa.field(name, pa.string()) for name in labels), pa.field(key_added, _vectors(width))]
        self.schema, self.labels = pa.schema(fields), labels

    @contextmanager
    def of_chunk(self, number: int, source: str, chunk: EncodedCells) -> Iterator[TokenSink]:
        """Yield the function that receives the batches of a chunk; when the block ends, its file is complete.

        Args:
            number: Number of the chunk.
            source: Name of the source in the table.
            chunk: Encoded cells, with their names.
        """
        cells: list[int] = []
        names = cell_names(chunk.obs)
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with (
            WholeStream(self._file_of(number)) as file,
            pq.ParquetWriter(file, self.schema, **options) as writer,
        ):

            def add(rows: np.ndarray, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> None:
                lengths = chunk.lengths[rows].tolist()
                parts = zip(rows.tolist(), input_ids.cpu().split(lengths), hidden_states.split(lengths), strict=True)
                for row, ids, states in parts:
                    cells.append(row)
                    writer.write_table(self._rows(names[row], source, ids, states))

            yield add
            writer.add_key_value_metadata({_CELLS: json.dumps(cells)})

    def _file_of(self, number: int) -> str:
        return self.shards.place(f"genes-{number:012d}.parquet")

    def _rows(self, cell: str, source: str, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> pa.Table:
        """Return the rows of a cell, without its special tokens."""
        ids = input_ids.numpy()
        genes = np.flatnonzero(self.is_gene[ids])
        values = hidden_states.float().cpu().numpy()[genes]
        if not np.isfinite(values).all():
            raise ValueError(f"{self.location}: the gene embeddings of cell {cell!r} have NaN or infinite values.")
        columns: dict[str, Any] = {
            "cell": pa.repeat(pa.scalar(cell, pa.string()), len(genes)),
            "source": pa.repeat(pa.scalar(source, pa.string()), len(genes)),
            "gene": self.genes.take(pa.array(ids[genes])),
        }
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=_vectors(self.width))
        return pa.Table.from_arrays([*(columns[name] for name in self.labels), vectors], schema=self.schema)

    def without(self, finished: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the finished shards for which the file of at least one chunk is missing."""
        there = set(self.shards.names())
        names = {shard: [f"genes-{number:012d}.parquet" for number in range(*shard)] for shard in finished}
        return [shard for shard in finished if not there.issuperset(names[shard])]

    def write(self, num_chunks: int, provenance: dict[str, Any]) -> None:
        """Write the table from the files of the chunks.

        Args:
            num_chunks: Number of chunks of the run.
            provenance: Record of how the embeddings were made, for the file's metadata.
        """
        most = max(1, _GROUP_VALUES // self.width)
        waiting: list[pa.Table] = []
        with (
            WholeStream(self.location) as file,
            pq.ParquetWriter(file, self.schema, use_dictionary=self.labels, write_statistics=self.labels) as writer,
        ):
            for cell in self._cells(num_chunks):
                if waiting and sum(len(each) for each in waiting) + len(cell) > most:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
                waiting.append(cell)
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
            writer.add_key_value_metadata({name: json.dumps(value) for name, value in provenance.items()})

    def _cells(self, num_chunks: int) -> Iterator[pa.Table]:
        """Yield the rows of each cell, in the order of the cells."""
        for number in range(num_chunks):
            with self.shards.open(f"genes-{number:012d}.parquet") as file:
                table = pq.ParquetFile(file)
                cells = json.loads(table.metadata.metadata[_CELLS.encode()])
                for group in np.argsort(cells):
                    yield table.read_row_group(int(group))


def _vectors(width: int) -> pa.DataType:
    return pa.list_(pa.float32(), width)
