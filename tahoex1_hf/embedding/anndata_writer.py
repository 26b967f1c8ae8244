# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Writers of AnnData outputs: `.h5ad` files and `.zarr` stores with the same elements."""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.cells.readers.stores import writable_group, zarr_for_writing
from tahoex1_hf.common.files import WholeFile, WholeFolder
from tahoex1_hf.embedding.obs_columns import free_name
from tahoex1_hf.embedding.shards import Shard
from tahoex1_hf.embedding.source_copy import SourceCopy
from tahoex1_hf.embedding.writers import EmbeddingWriter, Layout
from tahoex1_hf.inference.h5ad_columns import add_to_column_order, make_array, make_names, set_column_order
from tahoex1_hf.inference.provenance import provenance_key

logger = logging.getLogger(__name__)


class AnnDataWriter(EmbeddingWriter):
    """Writer of a copy of the only source with new slots, or of cells without counts.

    Cells without counts have their names, the columns of obs of all sources, and, if there are several sources, the
    column `source`.

    Args:
        output: Path of the output.
        layout: Layout of the output.
        copied: Copy of the source; None for cells without counts.
        obs: Column of obs -> function that returns its values, or None to leave the column out; only used for cells
            without counts.
    """

    def __init__(self, output: str, layout: Layout, copied: SourceCopy | None, obs: Mapping[str, Callable[[], Any]]):
        self.output, self.layout, self.copied, self.done = output, layout, copied, 0
        self.whole = self._place() if copied is None else copied.wait()
        try:
            self.file: Any = self._open()
            self._make_slots(obs)
        except BaseException:
            self.abandon()
            raise

    @abstractmethod
    def _place(self) -> WholeFile | WholeFolder:
        """Return the output's place, with nothing in it."""

    @abstractmethod
    def _open(self) -> Any:
        """Open the partial file or folder, which is at first a copy of the source, or empty."""

    def _make_slots(self, obs: Mapping[str, Callable[[], Any]]) -> None:
        key, shape = self.layout.key_added, self.layout.shape
        if self.copied is None:
            self._make_frames(obs)
        self._remove("obsm", key)
        self.dataset = make_array(writable_group(self.file, "obsm"), key, shape, np.float32)
        self.numbers: dict[str, Any] = {}
        for name, column in self.layout.numbers.items():
            group = add_to_column_order(self.file, column)
            self._remove("obs", column)
            self.numbers[name] = make_array(group, column, shape[:1], np.float32)

    def _make_frames(self, columns: Mapping[str, Callable[[], Any]]) -> None:
        """Make `obs` and `var` in the format of anndata; the names of the cells are filled in later."""
        import pandas as pd
        from anndata.io import write_elem

        self.file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(self.file, "var", pd.DataFrame(index=pd.Index([], dtype=str)))
        obs = self.file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        self.names = make_names(obs, "_index", self.layout.shape[0])
        taken = {"_index", *self.layout.own_columns}
        names = []
        if self.layout.several:
            column = obs.create_group("source")
            column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
            write_elem(column, "categories", np.array(self.layout.sources, dtype=object))
            self.codes = make_array(column, "codes", self.layout.shape[:1], np.int32)
            names.append("source")
        for given, read in columns.items():
            values = read()
            if values is not None:
                names.append(free_name(given, {*taken, *names}))
                write_elem(obs, names[-1], values)
        set_column_order(obs, names)

    def _remove(self, group: str, name: str) -> None:
        if name in writable_group(self.file, group):
            logger.warning("%s already had %s[%r], which is replaced in the output.", self.output, group, name)
            del self.file[group][name]

    def write(self, shard: Shard, source: str) -> None:
        """Write the rows of a shard."""
        rows = slice(self.done, self.done + len(shard.embeddings))
        self.dataset[rows] = shard.embeddings
        for name, values in self.numbers.items():
            values[rows] = shard.numbers[name]
        if self.copied is None:
            self.names[rows] = np.array(shard.names, dtype=object)
            if self.layout.several:
                self.codes[rows] = self.layout.sources.index(source)
        self.done += len(shard.embeddings)

    def write_genes(self, slot: str, embeddings: np.ndarray) -> None:
        """Write gene embeddings into `varm[slot]`."""
        self._write_element("varm", slot, embeddings)

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write the record of how the embeddings were made into `uns`."""
        self._write_element("uns", provenance_key(self.layout.key_added), provenance)

    def _write_element(self, group: str, name: str, value: Any) -> None:
        from anndata.io import write_elem

        self._remove(group, name)
        write_elem(self.file[group], name, value)


class H5adWriter(AnnDataWriter):
    """Writer of an `.h5ad` file."""

    def _place(self) -> WholeFile:
        return WholeFile(self.output)

    def _open(self) -> Any:
        import h5py

        return h5py.File(self.whole.partial, "w" if self.copied is None else "r+")

    def finish(self) -> None:
        """Close the file, and move it into place."""
        self.file.close()
        self.whole.finish()

    def abandon(self) -> None:
        """Remove the unfinished file."""
        with suppress(Exception):  # the error that matters is being raised already
            self.file.close()
        self.whole.discard()


class ZarrWriter(AnnDataWriter):
    """Writer of a `.zarr` store, which replaces an existing store."""

    def _place(self) -> WholeFolder:
        return WholeFolder(Path(self.output), replace=True)

    def _open(self) -> Any:
        return zarr_for_writing(self.whole.partial, new=self.copied is None)

    def finish(self) -> None:
        """Write the list of all parts of the store, which readers look at first, and move the store into place."""
        import zarr

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr 3 has no standard for this list yet; anndata writes it, too
            zarr.consolidate_metadata(self.file.store)
        self.whole.finish()

    def abandon(self) -> None:
        """Remove the unfinished folder."""
        self.whole.discard()
