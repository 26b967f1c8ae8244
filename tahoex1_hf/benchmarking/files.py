# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read embeddings of cells or genes from files of other programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.cells.whole import read_slot
from tahoex1_hf.common.reading import reading

_NAME_COLUMNS = ("cell", "gene", "name", "names", "index", "__index_level_0__")


def read_embeddings(source: Source, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Read names and embeddings.

    Args:
        source: Source of the kind `file`.
        axis: `obs` for embeddings of cells, `var` for embeddings of genes.

    Returns:
        `(rows,)` names as text, and `(rows, width)` float32 embeddings.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it does not hold such embeddings; the message says what is expected.
    """
    path = Path(source.what)
    if not path.is_file():
        raise FileNotFoundError(f"--source {source.name}: {path} does not exist.")
    with reading(path):
        if path.suffix == ".h5ad":
            names, values = read_slot(path, source.key, axis)
        elif path.suffix == ".npz":
            names, values = _from_npz(path)
        else:
            names, values = _from_parquet(path)
    values = np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or len(names) != len(values):
        raise ValueError(
            f"{path}: {len(names)} names do not fit embeddings {values.shape}: they must be (rows, width)."
        )
    if len(np.unique(names)) != len(names):
        raise ValueError(f"{path}: a name is there twice, so that its embedding is not known: make the names unique.")
    return names, values


def aligned(names: np.ndarray, values: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
    """Return the rows of `values` in the order of `wanted`; NaN where a name is missing."""
    place = {name: number for number, name in enumerate(names.tolist())}
    rows = np.array([place.get(name, -1) for name in wanted], dtype=np.int64)
    return np.where((rows >= 0)[:, None], values[rows], np.float32(np.nan))


def _from_npz(path: Path) -> tuple[np.ndarray, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        if not {"names", "embeddings"} <= set(arrays):
            raise ValueError(f"{path} must hold the arrays names (text) and embeddings; it holds {', '.join(arrays)}.")
        return arrays["names"].astype(str), arrays["embeddings"]


def _from_parquet(path: Path) -> tuple[np.ndarray, Any]:
    import pandas as pd

    table = pd.read_parquet(path).reset_index()
    column = next((name for name in _NAME_COLUMNS if name in table and table[name].dtype.kind not in "iuf"), None)
    if column is None:
        raise ValueError(f"{path} has no column of names: call it cell or gene.")
    names = table[column].astype(str).to_numpy()
    lists = [name for name in table if name not in _NAME_COLUMNS and isinstance(table[name].iloc[0], np.ndarray)]
    if lists:
        return names.astype(str), np.stack(table[lists[0]].to_numpy())
    numbers = [name for name in table if name not in _NAME_COLUMNS and table[name].dtype.kind in "iuf"]
    if not numbers:
        raise ValueError(f"{path} has neither a column of lists nor columns of numbers, which would be embeddings.")
    return names.astype(str), table[numbers].to_numpy()
