# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""An array of `obsm` on disk, read piece by piece with the cells' names and columns of obs, without their counts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.readers.base import INDEX, BadInput

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class StoredSlot:
    """An array of `obsm` of an `.h5ad` file or a `.zarr` store.

    Attributes:
        path: Path of the file.
        key: Key of the array in `obsm`.
        num_cells: Number of cells.
        width: Number of columns of the array.
        record: Slot of `uns` that was asked for; None where there is none.
        columns: Names of the columns of obs.
    """

    path: str
    key: str
    num_cells: int
    width: int
    record: Any
    columns: list[str]

    def pieces(self, bounds: Iterable[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray, "pd.DataFrame"]]:
        """Read consecutive cells.

        Args:
            bounds: Number of the first cell of each piece, and of the cell after its last.

        Yields:
            Names of the cells, `(cells,)` str; values, `(cells, width)` float32; columns of obs.
        """
        import pandas as pd

        from tahoex1_hf.cells.readers.stores import open_store, read_column

        with open_store(self.path) as store:
            for low, high in bounds:
                names = read_column(store["obs"], INDEX, low, high).astype(str)
                columns = {name: read_column(store["obs"], name, low, high) for name in self.columns}
                yield (
                    names.to_numpy(dtype=object),
                    np.asarray(store["obsm"][self.key][low:high], dtype=np.float32),
                    pd.DataFrame(columns, index=range(high - low)),
                )


def open_slot(path: str, key: str, record: str) -> StoredSlot:
    """Look at an array of `obsm`; its values are not read.

    Args:
        path: `.h5ad` file or `.zarr` store.
        key: Key of the array.
        record: Key of a slot of `uns` to read.

    Raises:
        BadInput: If there is no such array, or it does not have a row for each cell.
    """
    from anndata.io import read_elem

    from tahoex1_hf.cells.readers.stores import column_names, num_rows, open_store

    with open_store(path) as store:
        slots = list(store.get("obsm", {}))
        if key not in slots:
            raise BadInput(f'it has no obsm["{key}"]; there is {", ".join(slots) or "none"}.')
        values, num_cells = store["obsm"][key], num_rows(store["obs"])
        if not hasattr(values, "shape") or len(values.shape) != 2 or values.shape[0] != num_cells:
            raise BadInput(f'its obsm["{key}"] is not an array of {num_cells} cells x dimensions.')
        made = read_elem(store["uns"][record]) if record in store.get("uns", {}) else None
        return StoredSlot(path, key, num_cells, int(values.shape[1]), made, column_names(store["obs"]))
