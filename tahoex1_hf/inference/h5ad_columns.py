# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""New columns of obs in an `.h5ad` file or a `.zarr` store, whichever anndata wrote it."""

from typing import Any

import numpy as np

from tahoex1_hf.cells.readers.base import INDEX
from tahoex1_hf.cells.readers.stores import column_names, read_column


def add_to_column_order(file: Any, column: str) -> Any:
    """Make a column the last one of an open file's obs, and return the group to write it into.

    Args:
        file: `h5py.File` or zarr group, open for writing. A column of that name stays for the caller to remove.
        column: Name of the column.
    """
    _rewrite_old_obs(file)
    obs = file["obs"]
    set_column_order(obs, [*(name for name in obs.attrs["column-order"] if name != column), column])
    return obs


def set_column_order(obs: Any, names: list[str]) -> None:
    """Note the names of the columns in the group of a data frame."""
    import h5py

    if isinstance(obs, h5py.Group):
        obs.attrs.create("column-order", np.array(names, dtype=h5py.string_dtype()), shape=(len(names),))
    else:
        obs.attrs["column-order"] = names


def make_array(group: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """Make an empty array, with the attributes that anndata looks for, and return it."""
    create = group.create_array if hasattr(group, "create_array") else group.create_dataset
    array = create(name, shape=shape, dtype=dtype)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return array


def make_names(group: Any, name: str, number: int) -> Any:
    """Make an empty array of texts, with the attributes that anndata looks for, and return it."""
    import h5py

    if isinstance(group, h5py.Group):
        array = group.create_dataset(name, shape=(number,), dtype=h5py.string_dtype())
    else:
        array = group.create_array(name, shape=(number,), dtype=str)
    array.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return array


def _rewrite_old_obs(file: Any) -> None:
    """Rewrite obs if anndata before 0.8 wrote it, since its columns and today's cannot be in one table."""
    import pandas as pd
    from anndata.io import write_elem

    obs = file["obs"]
    if not hasattr(obs, "dtype") and obs.attrs.get("encoding-version") == "0.2.0":
        return
    columns = {name: read_column(obs, name).array for name in column_names(obs)}
    frame = pd.DataFrame(columns, index=pd.Index(read_column(obs, INDEX).astype(str)))
    del file["obs"]
    write_elem(file, "obs", frame)
