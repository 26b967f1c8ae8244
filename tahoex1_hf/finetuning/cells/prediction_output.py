# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The file with predictions: the input with new columns, written piece by piece, then renamed."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.cells.readers.stores import writable_group
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.inference.h5ad_columns import add_to_column_order, make_array

logger = logging.getLogger(__name__)


def deviation_column(column: str) -> str:
    """Return the column of obs that says how far a prediction varies with the sample."""
    return f"{column}_sd"


class PredictionWriter:
    """A copy of an `.h5ad` file, to which predictions are added in the order of its cells.

    Args:
        source: `.h5ad` file, which is not changed.
        output: `.h5ad` file to write; may be the source.
        column: Name of the column of obs. Probabilities go to `obsm[column + "_probabilities"]`, their provenance to
            `uns[column]`. Slots of these names in the source are replaced.
        num_cells: Number of cells of the source.
        classes: Names of the classes; None where numbers are predicted.
        with_deviations: Whether there is a column for the deviations between samples.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        column: str,
        num_cells: int,
        classes: Sequence[str] | None,
        with_deviations: bool = False,
    ):
        import h5py

        self.output, self.column, self.classes = output, column, classes
        self.whole = WholeFile(output)
        self.done = 0
        try:
            shutil.copyfile(source, self.whole.partial)
            self.file = h5py.File(self.whole.partial, "r+")
            self._make_column(num_cells)
            self.deviations: Any = None
            if with_deviations:
                name = deviation_column(column)
                self.deviations = self._array(add_to_column_order(self.file, name), name, (num_cells,), np.float32)
            if classes is not None:
                shape = (num_cells, len(classes))
                self.probabilities = self._array(
                    writable_group(self.file, "obsm"), f"{column}_probabilities", shape, np.float32
                )
        except BaseException:
            self.abandon()
            raise

    def _make_column(self, num_cells: int) -> None:
        from anndata.io import write_elem

        obs = add_to_column_order(self.file, self.column)
        self._remove(obs, self.column)
        if self.classes is None:
            self.values = self._array(obs, self.column, (num_cells,), np.float32)
            return
        column = obs.create_group(self.column)
        column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
        write_elem(column, "categories", np.array(self.classes, dtype=object))
        self.values = self._array(column, "codes", (num_cells,), np.min_scalar_type(-len(self.classes)))

    def _array(self, group: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        self._remove(group, name)
        return make_array(group, name, shape, dtype)

    def _remove(self, group: Any, name: str) -> None:
        if name in group:
            logger.warning("%s has %s[%r], which is replaced in the output.", self.output, group.name[1:], name)
            del group[name]

    def write(self, predictions: np.ndarray, deviations: np.ndarray) -> None:
        """Write the next cells: `(cells, classes)` probabilities, or `(cells,)` numbers, and `(cells,)` deviations."""
        rows = slice(self.done, self.done + len(predictions))
        if self.classes is None:
            self.values[rows] = predictions
        else:
            self.values[rows] = predictions.argmax(1)
            self.probabilities[rows] = predictions
        if self.deviations is not None:
            self.deviations[rows] = deviations
        self.done += len(predictions)

    def finish(self, provenance: dict[str, Any]) -> None:
        """Write `uns`, and move the file into place."""
        from anndata.io import write_elem

        self._remove(writable_group(self.file, "uns"), self.column)
        names = {} if self.classes is None else {"classes": np.array(self.classes, dtype=object)}
        write_elem(self.file["uns"], self.column, {**names, **provenance})
        self.file.close()
        self.whole.finish()

    def abandon(self) -> None:
        """Remove the unfinished file."""
        with suppress(Exception):  # the error that led here is being raised
            self.file.close()
        self.whole.discard()
