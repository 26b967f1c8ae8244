"""HDF5 files and zarr stores that name content elsewhere, or declare far more than they hold."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from cells import make_cells, write_cells, write_vocab

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.opening import open_cells, read_var


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path)))


def put(file: h5py.File, how: str, name: str, outside: Path) -> None:
    """Put counts in their place that lie in another file."""
    size = file[name].shape
    del file[name]
    if how == "link":
        file[name] = h5py.ExternalLink(str(outside), "/values")
    elif how == "storage":
        file.create_dataset(name, shape=size, dtype="f4", external=[(str(outside), 0, h5py.h5f.UNLIMITED)])
    else:
        layout = h5py.VirtualLayout(shape=size, dtype="f4")
        layout[...] = h5py.VirtualSource(str(outside), "values", shape=size)
        file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("how", ["link", "storage", "virtual"])
@pytest.mark.parametrize("kind", ["h5ad", "10x"])
def test_content_of_other_files_is_not_followed(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, how: str, kind: str
) -> None:
    cells = make_cells(6)
    path = write_cells(cells, tmp_path / "cells", "csr" if kind == "h5ad" else "10x_h5")
    open_cells(path, tokenizer)
    with h5py.File(tmp_path / "outside", "w") as file:
        file["values"] = np.ones(cells.X.nnz, dtype=np.float32)
    name = "X/data" if kind == "h5ad" else "matrix/data"
    with h5py.File(path, "r+") as file:
        put(file, how, name, tmp_path / "outside")
    with pytest.raises(ValueError, match=rf"{path.name}: /{name} lies in another file"):
        open_cells(path, tokenizer)
    if kind == "h5ad":
        with pytest.raises(ValueError, match="lies in another file"):
            read_var(path)


def test_links_within_the_file_are_followed(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    path = write_cells(make_cells(6), tmp_path / "cells", "csr")
    with h5py.File(path, "r+") as file:
        file["elsewhere"] = file["X"]
        file["cycle/back"] = file["X"]
        file["cycle/again"] = file["cycle"]
        del file["X"]
        file["X"] = h5py.SoftLink("/elsewhere")
    assert open_cells(path, tokenizer).num_cells == 6


@pytest.mark.parametrize("name", ["obs/_index", "X/indptr", "var/_index"])
def test_arrays_that_would_fill_the_memory(tmp_path: Path, tokenizer: TahoeX1Tokenizer, name: str) -> None:
    path = write_cells(make_cells(6), tmp_path / "cells", "csr")
    with h5py.File(path, "r+") as file:
        if isinstance(file[name], h5py.Group):  # anndata 0.13 writes nullable strings
            name += "/values"
        attributes: dict[str, Any] = dict(file[name].attrs)
        dtype = file[name].dtype
        del file[name]
        made = file.create_dataset(name, shape=(10**11,), dtype=dtype, chunks=(1000,), compression="gzip")
        made.attrs.update(attributes)
    with pytest.raises(ValueError, match=rf"cells\.h5ad: /{name} declares \d+ bytes, and stores"):
        open_cells(path, tokenizer)


def test_arrays_of_zarr_that_would_fill_the_memory(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    path = write_cells(make_cells(6), tmp_path / "cells", "zarr")
    store = zarr.open_group(path, mode="r+", use_consolidated=False)
    del store["X"]["indptr"]
    store["X"].create_array("indptr", shape=(10**11,), dtype="int64", chunks=(10**6,))
    zarr.consolidate_metadata(path)
    with pytest.raises(ValueError, match=r"cells\.zarr: /X/indptr declares \d+ bytes, and stores"):
        open_cells(path, tokenizer)
