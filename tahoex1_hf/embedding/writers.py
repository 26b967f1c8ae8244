# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Writers of the output of an embedding run, which is written from the shards and appears when it is complete."""

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.cells.readers.stores import writable_group
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.inference.h5ad_columns import add_to_column_order, make_array
from tahoex1_hf.inference.provenance import check_key, deviation_key, provenance_key

logger = logging.getLogger(__name__)

_FORMATS = (".h5ad", ".parquet", ".npy")


def check_output(output: str, gene_embeddings: bool, key_added: str, draws: int = 1) -> None:
    """Raise ValueError for an output that could not be written, before any work is done."""
    check_key(key_added)
    name = output.rpartition("/")[2]
    if not output.endswith(_FORMATS):
        raise ValueError(f"The output must end in .h5ad, .parquet or .npy, got {name!r}.")
    if gene_embeddings and not output.endswith(".h5ad"):
        raise ValueError(f"Gene embeddings need an output that ends in .h5ad, got {name!r}.")
    if draws > 1 and output.endswith(".npy"):
        raise ValueError(f"draws={draws} gives a deviation per cell, for which {name!r} has no place: name an .h5ad.")
    if "://" in output:
        if output.endswith(".h5ad"):
            raise ValueError(f"An .h5ad file cannot be written to {output}: name a local one, or a .parquet.")
    elif not Path(output).parent.is_dir():
        raise ValueError(f"The output's folder {Path(output).parent} does not exist.")


class EmbeddingWriter(ABC):
    """Base of the writers, which write embeddings in order to a partial file that `finish` moves into place.

    Args:
        output: path, or URL for some formats.
        shape: numbers of cells and dimensions.
        key_added: slot of `obsm`, or the beginning of the columns' names.
    """

    def __init__(self, output: str, shape: tuple[int, int], key_added: str):
        self.output, self.shape, self.key_added = output, shape, key_added
        self.remote = "://" in output
        self.whole = None if self.remote else WholeFile(output)
        self.partial = output if self.whole is None else str(self.whole.partial)
        self.done = 0

    def open(self) -> Any:
        """Open the output as a stream; an object store shows what is written when the stream is closed."""
        import fsspec

        return fsspec.open(self.partial, "wb").open()

    @abstractmethod
    def write(
        self, names: Sequence[str], source: str, embeddings: np.ndarray, deviations: np.ndarray | None = None
    ) -> None:
        """Write the next cells, which come from one source.

        Args:
            names: names of the cells.
            source: where they come from.
            embeddings: `(cells, width)`.
            deviations: `(cells,)`, how far the embeddings vary with the sample, where that was asked for.
        """

    def write_genes(self, embeddings: np.ndarray) -> None:
        """Write `(genes, width)` gene embeddings."""
        raise ValueError(f"Gene embeddings need an output that ends in .h5ad, got {self.output}.")

    @abstractmethod
    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write what made the embeddings, if the format has a place for it."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def finish(self) -> None:
        """Move the finished file into place."""
        self.close()
        if self.whole is not None:
            self.whole.finish()

    def abandon(self) -> None:
        """Remove the unfinished file."""
        with suppress(Exception):  # the error that matters is being raised already
            self.close()
        if self.whole is not None:
            self.whole.discard()


class H5adWriter(EmbeddingWriter):
    """Writer of an `.h5ad` file: a copy of the only `.h5ad` source plus new slots, or cells without counts.

    Cells without counts have their names and, with several sources, the column `source` in `obs`.

    Args:
        copied: the `.h5ad` source to copy; None for cells without counts.
        sources: names of the sources.
        with_deviations: whether there is a column of obs for how far the embeddings vary with the sample.
    """

    def __init__(
        self,
        output: str,
        shape: tuple[int, int],
        key_added: str,
        copied: str | None,
        sources: list[str],
        with_deviations: bool,
    ):
        import h5py

        super().__init__(output, shape, key_added)
        self.copied, self.sources = copied, sources
        if copied is not None:
            shutil.copyfile(copied, self.partial)
        self.file = h5py.File(self.partial, "r+" if copied is not None else "w")
        if copied is None:
            self._make_frames()
        self._remove("obsm", key_added)
        self.dataset = make_array(writable_group(self.file, "obsm"), key_added, shape, np.float32)
        if with_deviations:
            column = deviation_key(key_added)
            obs = add_to_column_order(self.file, column)
            self._remove("obs", column)
            self.deviations = make_array(obs, column, shape[:1], np.float32)

    def _make_frames(self) -> None:
        """Make `obs` and `var` as anndata stores them; the names of the cells are filled in later."""
        import h5py
        import pandas as pd
        from anndata.io import write_elem

        self.file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(self.file, "var", pd.DataFrame(index=pd.Index([], dtype=str)))
        several = len(self.sources) > 1
        obs = self.file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        columns = ["source"] if several else []
        obs.attrs.create("column-order", np.array(columns, dtype=h5py.string_dtype()), shape=(len(columns),))
        self.names = obs.create_dataset("_index", shape=(self.shape[0],), dtype=h5py.string_dtype())
        self.names.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        if several:
            column = obs.create_group("source")
            column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
            write_elem(column, "categories", np.array(self.sources, dtype=object))
            self.codes = make_array(column, "codes", self.shape[:1], np.int32)

    def _remove(self, group: str, name: str) -> None:
        if name in writable_group(self.file, group):
            logger.warning("%s had %s[%r] already: it is replaced in the output.", self.output, group, name)
            del self.file[group][name]

    def write(
        self, names: Sequence[str], source: str, embeddings: np.ndarray, deviations: np.ndarray | None = None
    ) -> None:
        """Write rows."""
        rows = slice(self.done, self.done + len(embeddings))
        self.dataset[rows] = embeddings
        if deviations is not None:
            self.deviations[rows] = deviations
        if self.copied is None:
            self.names[rows] = list(names)
            if len(self.sources) > 1:
                self.codes[rows] = self.sources.index(source)
        self.done += len(embeddings)

    def write_genes(self, embeddings: np.ndarray) -> None:
        """Write `varm[key_added]`."""
        self._write_element("varm", self.key_added, embeddings)

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write `uns`."""
        self._write_element("uns", provenance_key(self.key_added), provenance)

    def _write_element(self, group: str, name: str, value: Any) -> None:
        from anndata.io import write_elem

        self._remove(group, name)
        write_elem(self.file[group], name, value)

    def close(self) -> None:
        """Close the HDF5 file."""
        self.file.close()


class ParquetWriter(EmbeddingWriter):
    """Writer of a Parquet table with the columns `cell` (the name), `source` (if several), and one per dimension.

    Where embeddings are means over samples, their deviations stand before the dimensions.
    """

    def __init__(self, output: str, shape: tuple[int, int], key_added: str, sources: list[str], with_deviations: bool):
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(output, shape, key_added)
        self.several = len(sources) > 1
        labels = [pa.field("cell", pa.string()), *([pa.field("source", pa.string())] if self.several else [])]
        if with_deviations:
            labels.append(pa.field(deviation_key(key_added), pa.float32()))
        self.schema = pa.schema([*labels, *(pa.field(f"{key_added}_{i}", pa.float32()) for i in range(shape[1]))])
        self.stream = self.open()
        self.file = pq.ParquetWriter(self.stream, self.schema)

    def write(
        self, names: Sequence[str], source: str, embeddings: np.ndarray, deviations: np.ndarray | None = None
    ) -> None:
        """Write rows as one row group."""
        import pyarrow as pa

        labels = [pa.array(names, pa.string())]
        if self.several:
            labels.append(pa.array([source] * len(names), pa.string()))
        if deviations is not None:
            labels.append(pa.array(deviations, pa.float32()))
        self.file.write_table(pa.Table.from_arrays([*labels, *map(pa.array, embeddings.T)], schema=self.schema))

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write what made the embeddings as JSON into the file's metadata, under `tahoe_x1`."""
        self.file.add_key_value_metadata({provenance_key(self.key_added): json.dumps(provenance)})

    def close(self) -> None:
        """Write the footer."""
        self.file.close()
        self.stream.close()


class NpyWriter(EmbeddingWriter):
    """Writer of an `.npy` file with a `(cells, width)` array."""

    def __init__(self, output: str, shape: tuple[int, int], key_added: str):
        super().__init__(output, shape, key_added)
        self.stream = self.open()
        np.lib.format.write_array_header_2_0(
            self.stream, {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
        )

    def write(
        self, names: Sequence[str], source: str, embeddings: np.ndarray, deviations: np.ndarray | None = None
    ) -> None:
        """Write rows."""
        self.stream.write(np.ascontiguousarray(embeddings, dtype=np.float32).tobytes())

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Log what made the embeddings, since the format has no place for it."""
        logger.info("An .npy file has no place for what made the embeddings: %s", json.dumps(provenance))

    def close(self) -> None:
        """Close the stream."""
        self.stream.close()


def open_writer(
    output: str,
    shape: tuple[int, int],
    key_added: str,
    copied: str | None,
    sources: list[str],
    with_deviations: bool = False,
) -> EmbeddingWriter:
    """Open the writer for an output, which the ending of its name decides.

    Args:
        output: path or URL, see `check_output`.
        shape: numbers of cells and dimensions.
        key_added: slot of `obsm`, or beginning of the columns' names.
        copied: `.h5ad` source that an `.h5ad` output copies; None for cells without counts.
        sources: names of the sources.
        with_deviations: whether `write` gets deviations.
    """
    if output.endswith(".h5ad"):
        return H5adWriter(output, shape, key_added, copied, sources, with_deviations)
    if output.endswith(".parquet"):
        return ParquetWriter(output, shape, key_added, sources, with_deviations)
    return NpyWriter(output, shape, key_added)
