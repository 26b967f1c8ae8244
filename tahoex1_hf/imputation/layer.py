# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A sparse layer that is added to a copy of an `.h5ad` file, written piece by piece."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.cells.readers.stores import writable_group
from tahoex1_hf.common.files import WholeFile

logger = logging.getLogger(__name__)


class LayerWriter:
    """A copy of an `.h5ad` file with a further layer, which appears when it is finished.

    As a context manager, it abandons the file if an error occurs; `finish` must be called.

    Args:
        source: `.h5ad` file, which is not changed.
        output: `.h5ad` file to write; may be the source.
        layer: Name of the layer, and of the record in `uns`. What the source has there is replaced.
        shape: Numbers of cells and genes.
    """

    def __init__(self, source: Path, output: Path, layer: str, shape: tuple[int, int]):
        import h5py

        self.output, self.layer, self.shape = output, layer, shape
        self.whole = WholeFile(output)
        self.offsets = [np.zeros(1, dtype=np.int64)]
        try:
            shutil.copyfile(source, self.whole.partial)
            self.file = h5py.File(self.whole.partial, "r+")
            self._remove("layers")
            self.group = writable_group(self.file, "layers").create_group(layer)
            self.data, self.indices = (
                self.group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(2**16,), compression="lzf")
                for name, dtype in (("data", np.float32), ("indices", np.int32))
            )
        except BaseException:
            self.abandon()
            raise

    def _remove(self, slot: str) -> None:
        if self.layer in writable_group(self.file, slot):
            logger.warning("%s has %s[%r], which is replaced in the output.", self.output, slot, self.layer)
            del self.file[slot][self.layer]

    def write(self, lengths: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Write the next cells.

        Args:
            lengths: `(cells,)` number of values of each cell.
            columns: `(values,)` column of each value, rising within a cell.
            values: `(values,)` float32.
        """
        start = int(self.offsets[-1][-1])
        self.offsets.append(start + np.cumsum(lengths, dtype=np.int64))
        for array, part in ((self.data, values), (self.indices, columns)):
            array.resize((start + len(part),))
            array[start:] = part

    def finish(self, record: dict[str, Any]) -> None:
        """Write the layer's index and the record, and move the file into place."""
        from anndata.io import write_elem

        self.group.create_dataset("indptr", data=np.concatenate(self.offsets))
        self.group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        self.group.attrs["shape"] = np.array(self.shape, dtype=np.int64)
        self._remove("uns")
        write_elem(self.file["uns"], self.layer, record)
        self.file.close()
        self.whole.finish()

    def abandon(self) -> None:
        """Remove the unfinished file."""
        with suppress(Exception):  # the error that led here is being raised
            self.file.close()
        self.whole.discard()

    def __enter__(self) -> "LayerWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self.abandon()
