"""Stores of which not all chunks were copied are refused, since zarr takes what is missing for zeros."""

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import zarr
from cells import GENES, make_cells, write_vocab
from scipy.sparse import csc_matrix, csr_matrix

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.cells.readers.missing_chunks import check_sparse_chunks, missing_chunks

QUIET = pytest.mark.filterwarnings("ignore:Writing zarr v2", "ignore:Consolidated metadata", "ignore:zarr v3")


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(write_vocab(tmp_path / "vocab", drug_token=True))


def write(adata: anndata.AnnData, path: Path, zarr_format: int) -> Path:
    with anndata.settings.override(zarr_write_format=zarr_format):
        adata.write_zarr(path)
    return path


def chunks_of(place: Path) -> list[Path]:
    found = [
        path for path in place.rglob("*") if path.is_file() and path.name[:2] != ".z" and path.name != "zarr.json"
    ]
    assert found
    return sorted(found)


@QUIET
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("element", ["X/data", "X/indices", "obs/_index", "var/_index", "layers/counts/data"])
def test_a_store_that_lacks_a_chunk_is_refused(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, zarr_format: int, element: str
) -> None:
    adata = make_cells(60)
    layer = "counts" if element.startswith("layers") else None
    if layer:
        adata.layers[layer], adata.X = csc_matrix(adata.X), adata.X * 0.5
    path = write(adata, tmp_path / "cells.zarr", zarr_format)
    assert open_cells(path, tokenizer).num_cells == 60
    if (path / element / "values").is_dir():  # anndata 0.13 writes names as nullable strings
        element += "/values"
    chunks_of(path / element)[0].unlink()
    with pytest.raises(ValueError, match=rf"cells.zarr: 1 chunks of {element} are missing, the first .*copy it again"):
        open_cells(path, tokenizer)


@QUIET
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_chunks_of_zeros_that_were_never_written_are_no_fault(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, zarr_format: int
) -> None:
    """zarr leaves them out: indices of cells that express the first gene alone, and dense counts."""
    counts = csr_matrix((np.full(40, 3, np.float32), (np.arange(40), np.zeros(40, int))), shape=(40, len(GENES)))
    adata = make_cells(40)
    for name, matrix in (("sparse", counts), ("dense", counts.toarray() * (np.arange(40) < 2)[:, None])):
        adata.X = matrix
        path = write(adata, tmp_path / f"{name}.zarr", zarr_format)
        assert open_cells(path, tokenizer).num_cells == 40
    group = zarr.open_group(tmp_path / "sparse.zarr", mode="r")["X"]
    assert missing_chunks(group["indices"], str(tmp_path / "sparse.zarr")) == [(0, 40)]


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("kind", ["chunks", "shards", "h5"])
def test_which_chunks_are_missing(tmp_path: Path, kind: str) -> None:
    values = np.arange(1, 24, dtype=np.int32)
    if kind == "h5":
        with h5py.File(tmp_path / "a.h5", "w") as file:
            array: Any = file.create_dataset("X/data", shape=(23,), chunks=(5,), dtype="i4")
            array[5:15], array[20:] = 1, 1
            assert missing_chunks(array, str(tmp_path / "a.h5")) == [(0, 5), (15, 20)]
        return
    shards = {"shards": (10,)} if kind == "shards" else {}
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    for name in ("data", "indices"):
        array = group.require_group("X").create_array(name, shape=(23,), chunks=(5,), dtype="i4", **shards)
        array[:] = values if name == "data" else values % 7
    group["X"].create_array("indptr", data=np.array([0, 10, 23]))
    path = str(tmp_path / "a.zarr")
    check_sparse_chunks(group["X"], path)
    chunks_of(tmp_path / "a.zarr" / "X" / "indices")[1].unlink()
    expected = [(10, 20)] if kind == "shards" else [(5, 10)]
    assert missing_chunks(group["X"]["indices"], path) == expected
    with pytest.raises(BadInput, match=f"X/indices are missing, the first with the entries {expected[0][0]} to"):
        check_sparse_chunks(group["X"], path)
