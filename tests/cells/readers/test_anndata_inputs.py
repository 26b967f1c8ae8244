"""AnnDatas as other programs and versions leave them: old files, views of files, lazy ones, matrices of dask."""

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from cells import GENES, make_cells, read_dataset, write_vocab
from preparing import run, source
from scipy.sparse import csr_matrix

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import check_writable, open_cells
from tahoex1_hf.cells.readers.base import INDEX
from tahoex1_hf.cells.readers.stores import writable_group


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path)), context_length=None)


def rows(cells: Any) -> list[np.ndarray]:
    return [np.asarray(part) for part in cells.rows_at(np.arange(cells.num_cells))]


def same_rows(cells: Any, adata: anndata.AnnData, tokenizer: TahoeX1Tokenizer) -> bool:
    """Whether cells are those of an AnnData, read a few at a time as well as by number."""
    expected = rows(open_cells(adata, tokenizer))
    in_order = np.concatenate([part.counts for part in cells.rows(0, cells.num_cells, elements=100)])
    by_number = all(np.array_equal(*pair) for pair in zip(rows(cells), expected, strict=True))
    return by_number and np.array_equal(in_order, expected[1])


def write_legacy(adata: anndata.AnnData, path: Path, raw: bool = False) -> None:
    """Write what anndata 0.6 did: frames and obsm are tables, categories lie in uns, `raw` lies beside X."""
    text = {"obs": adata.obs_names, "var": adata.var_names}
    names = {frame: np.array([name.encode() for name in index]) for frame, index in text.items()}
    with h5py.File(path, "w") as file:
        for place in ("X", "raw.X") if raw else ("X",):
            group = file.create_group(place)
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", np.array(adata.shape)
            values = adata.X.data if place != "X" or not raw else np.log1p(adata.X.data)
            group["data"], group["indices"], group["indptr"] = values, adata.X.indices, adata.X.indptr
        obs = np.zeros(adata.n_obs, dtype=[("index", names["obs"].dtype), ("cell_type", "i1"), ("number", "i4")])
        obs["index"], obs["cell_type"], obs["number"] = names["obs"], adata.obs["cell_type"].cat.codes, 7
        obs["cell_type"][3] = -1  # missing
        var = np.zeros(adata.n_vars, dtype=[("index", names["var"].dtype)])
        var["index"] = names["var"]
        file["obs"], file["var"] = obs, var
        if raw:
            file["raw.var"] = var
        file["uns/cell_type_categories"] = np.array([name.encode() for name in adata.obs["cell_type"].cat.categories])
        table = np.zeros(adata.n_obs, dtype=[("X_pca", "f4", (3,)), ("X_umap", "f4", (2,))])
        table["X_pca"] = np.arange(3 * adata.n_obs).reshape(-1, 3)
        file["obsm"] = table


def test_files_of_anndata_0_6_have_their_labels(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    adata, path = make_cells(20), tmp_path / "old.h5ad"
    write_legacy(adata, path)
    cells = open_cells(path, tokenizer)
    assert same_rows(cells, adata, tokenizer)
    labels = adata.obs["cell_type"].astype(object).to_numpy(copy=True)
    labels[3] = np.nan
    assert [str(label) for label in cells.column("cell_type")] == [str(label) for label in labels]
    assert cells.column("number").tolist() == [7] * 20
    assert cells.column(INDEX).tolist() == adata.obs_names.tolist()
    prepared = run(tmp_path, [source(path, metadata={"cell": "_index", "kind": "cell_type"})])
    table = read_dataset(prepared)
    kinds = dict(zip(table["cell"], table["kind"].astype(str), strict=True))
    assert {name: str(kind) for name, kind in kinds.items()} == dict(
        zip(adata.obs_names, map(str, labels), strict=True)
    )


def test_raw_of_anndata_0_6_is_found(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    adata, path = make_cells(20), tmp_path / "old.h5ad"
    write_legacy(adata, path, raw=True)
    for options in (None, GeneOptions(layer="raw")):
        cells = open_cells(path, tokenizer, options)
        assert cells.counts_from == "raw/X"
        assert cells.var.index.tolist() == GENES
        assert same_rows(cells, adata, tokenizer)


def test_tables_in_old_files_become_groups_before_new_slots_are_written(tmp_path: Path) -> None:
    path = tmp_path / "old.h5ad"
    write_legacy(make_cells(20), path)
    with h5py.File(path, "r+") as file:
        writable_group(file, "obsm")["X_new"] = np.ones((20, 4))
        writable_group(file, "varm")["X_new"] = np.ones((60, 4))
    read = anndata.read_h5ad(path)
    assert read.obsm["X_pca"][:, 1].tolist() == [3 * i + 1 for i in range(20)]
    assert read.obsm["X_umap"].shape == (20, 2)
    assert read.obsm["X_new"].shape == (20, 4)


def test_frames_without_encoding_are_read(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    adata, path = make_cells(20), tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for frame in ("obs", "var"):
            for name in [*file[frame].attrs]:
                del file[frame].attrs[name]
    cells = open_cells(path, tokenizer)
    assert same_rows(cells, adata, tokenizer)
    assert cells.column("cell_type").tolist() == adata.obs["cell_type"].tolist()


def test_views_of_files_are_read_and_not_written_to(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    adata, path = make_cells(20), tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    view = anndata.read_h5ad(path, backed="r")[[1, 4, 7]]
    assert same_rows(open_cells(view, tokenizer), adata[[1, 4, 7]].copy(), tokenizer)
    with pytest.raises(ValueError, match=r"view of a backed AnnData.*to_memory\(\)"):
        check_writable(view)
    check_writable(adata[[1, 4]])
    check_writable(anndata.read_h5ad(path, backed="r"))


class Lazy:
    """A matrix or a frame that is computed when it is asked for, as those of dask and of anndata's `read_lazy` are."""

    def __init__(self, value: Any) -> None:
        self.value, self.shape = value, value.shape

    def __getitem__(self, rows: Any) -> "Lazy":
        return Lazy(self.value[rows])

    def compute(self) -> Any:
        return self.value

    def to_memory(self) -> Any:
        return self.value

    @property
    def columns(self) -> Any:
        return self.value.columns


@pytest.mark.parametrize("form", [csr_matrix, lambda matrix: matrix.toarray()])
def test_lazy_matrices_and_frames_are_computed_piece_by_piece(tokenizer: TahoeX1Tokenizer, form: Any) -> None:
    class LazyAnnData:
        def __init__(self, adata: anndata.AnnData) -> None:
            self.X, self.layers, self.raw = Lazy(form(adata.X)), {}, None
            self.obs, self.var = Lazy(adata.obs), Lazy(adata.var)
            self.obs_names, self.var_names, self.n_obs = adata.obs_names, adata.var_names, adata.n_obs

    adata = make_cells(300)
    cells = open_cells(LazyAnnData(adata), tokenizer)
    assert same_rows(cells, adata, tokenizer)
    pd.testing.assert_series_equal(cells.column("score"), adata.obs["score"].reset_index(drop=True), check_names=False)
