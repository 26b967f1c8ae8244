# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read files of cells as they are, for comparisons that know no vocabulary: all genes, or embeddings in slots."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.readers.hdf5_bounds import check_hdf5
from tahoex1_hf.common.reading import reading

if TYPE_CHECKING:
    from anndata import AnnData


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """Check a file as `open_cells` does, and make the errors of the block name it."""
    import h5py

    with reading(path):
        with h5py.File(path, "r") as file:
            check_hdf5(file, str(path))
        yield


def read_all_genes(path: Path) -> "AnnData":
    """Read a whole `.h5ad` file into memory.

    Raises:
        ValueError: If it cannot be read.
    """
    from anndata import read_h5ad

    with _checked(path):
        return read_h5ad(path)


def read_sample(path: Path, most: int, seed: int) -> tuple["AnnData", int]:
    """Read a random sample of the cells of an `.h5ad` file, in the order of the file.

    Args:
        path: Path of the file.
        most: Most cells to read.
        seed: Seed of the sample.

    Returns:
        The cells, and the number of cells of the file.

    Raises:
        ValueError: If the file cannot be read.
    """
    from anndata import read_h5ad

    with _checked(path):
        adata = read_h5ad(path, backed="r")
        try:
            total = adata.n_obs
            chosen = np.arange(total)
            if total > most:
                chosen = np.sort(np.random.default_rng(seed).choice(total, most, replace=False))
            return adata[chosen].to_memory(), total
        finally:
            adata.file.close()


def read_stored(path: Path, key: str, record: str) -> tuple[np.ndarray, dict[str, Any] | None] | None:
    """Read embeddings that an `.h5ad` file has, without its counts, and the record of how they were made.

    Args:
        path: Path of the file.
        key: Key of the embeddings in obsm.
        record: Key of the record in uns.

    Returns:
        The embeddings, shape `(cells, width)` float32, and the record, None where there is none; or None if obsm lacks
        the key.

    Raises:
        ValueError: If the file cannot be read.
    """
    import h5py
    from anndata.io import read_elem

    with _checked(path), h5py.File(path, "r") as file:
        if key not in file.get("obsm", {}):
            return None
        made_by = read_elem(file["uns"][record]) if record in file.get("uns", {}) else None
        return np.asarray(read_elem(file["obsm"][key]), dtype=np.float32), made_by


def read_slot(path: Path, key: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an array of `obsm` or `varm` of an `.h5ad` file, without its counts.

    Args:
        path: Path of the file.
        key: Key of the array.
        axis: `obs` for cells, `var` for genes.

    Returns:
        Names of the cells or genes, shape `(rows,)`, and the array.

    Raises:
        ValueError: If there is no such array; the message names those that are there.
    """
    from anndata import read_h5ad

    with _checked(path):
        adata = read_h5ad(path, backed="r")
        try:
            slots, names = (adata.obsm, adata.obs_names) if axis == "obs" else (adata.varm, adata.var_names)
            if key not in slots:
                raise ValueError(f"{path} has no {axis}m[{key!r}]; there is {', '.join(slots) or 'none'}.")
            return names.to_numpy().astype(str), np.asarray(slots[key])
        finally:
            adata.file.close()
