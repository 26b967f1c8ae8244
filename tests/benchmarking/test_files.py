"""Embeddings in files of other programs."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from tahoex1_hf.benchmarking.files import aligned, read_embeddings
from tahoex1_hf.benchmarking.sources import Source

NAMES = ["b", "a", "c"]
VALUES = np.arange(6, dtype=np.float32).reshape(3, 2)


def write(folder: Path, kind: str) -> Source:
    path = folder / f"e.{kind.split()[0]}"
    if kind == "h5ad":
        cells = anndata.AnnData(np.zeros((3, 1), dtype=np.float32), obsm={"X_e": VALUES})
        cells.obs_names = NAMES
        cells.write_h5ad(path)
    elif kind == "npz":
        np.savez(path, names=np.array(NAMES), embeddings=VALUES)
    elif kind == "parquet of lists":
        pd.DataFrame({"cell": NAMES, "X_e": list(VALUES)}).to_parquet(path)
    else:
        pd.DataFrame(VALUES, index=pd.Index(NAMES, name="cell"), columns=["0", "1"]).to_parquet(path)
    return Source("e", "file", str(path), "X_e" if kind == "h5ad" else "")


@pytest.mark.parametrize("kind", ["h5ad", "npz", "parquet of lists", "parquet of numbers"])
def test_every_kind_of_file_gives_names_and_embeddings(tmp_path: Path, kind: str) -> None:
    names, values = read_embeddings(write(tmp_path, kind), "obs")
    assert names.tolist() == NAMES
    assert np.array_equal(values, VALUES)


def test_rows_are_put_into_the_order_of_the_cells() -> None:
    found = aligned(np.array(NAMES), VALUES, ["a", "x", "b"])
    assert np.array_equal(found[[0, 2]], VALUES[[1, 0]])
    assert np.isnan(found[1]).all()


def test_faults_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no varm\['X_e'\]; there is none"):
        read_embeddings(write(tmp_path, "h5ad"), "var")
    np.savez(tmp_path / "e.npz", names=np.array(["a", "a"]), embeddings=VALUES[:2])
    with pytest.raises(ValueError, match="a name is there twice"):
        read_embeddings(Source("e", "file", str(tmp_path / "e.npz")), "obs")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_embeddings(Source("e", "file", str(tmp_path / "none.npz")), "obs")
