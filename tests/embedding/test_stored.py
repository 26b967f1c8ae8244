"""Embeddings are read as they were written, from any cell on; files that cannot be compared are refused."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embeddings import KEY, RECORD, clouds, columns_of, write_embeddings

from tahoex1_hf.embedding import stored
from tahoex1_hf.embedding.stored import check_alike, open_embeddings


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE_VALUES", 16 * 7)


@pytest.mark.parametrize(
    ("name", "wide"), [("a.parquet", False), ("a.parquet", True), ("a.h5ad", False), ("a.zarr", False)]
)
def test_what_was_written_is_read_from_any_cell_on(tmp_path: Path, name: str, wide: bool) -> None:
    values, cloud = clouds(50)
    obs = columns_of(cloud)
    path = write_embeddings(tmp_path / name, values, obs, wide=wide)
    found = open_embeddings(path, KEY)
    assert (found.num_cells, found.width, found.record) == (50, 16, RECORD)
    assert list(found.columns) == list(obs.columns)
    for start in (0, 7, 20, 49):
        pieces = list(found.pieces(start))
        assert max(len(piece.names) for piece in pieces) <= 7
        np.testing.assert_array_equal(np.concatenate([piece.embeddings for piece in pieces]), values[start:])
        assert [each for piece in pieces for each in piece.names.to_pylist()] == [f"c{i}" for i in range(start, 50)]
        columns = pa.concat_tables([piece.columns for piece in pieces])
        assert columns["tissue"].to_pylist() == obs["tissue"].tolist()[start:]
        assert columns["n.genes"].to_pylist() == obs["n.genes"].tolist()[start:]
        assert columns["cell type"].to_pylist() == [None if kind == 5 else f"type {kind}" for kind in cloud[start:]]
        assert columns["healthy"].to_pylist() == obs["healthy"].tolist()[start:]


def test_slips_are_told(tmp_path: Path) -> None:
    values = clouds(12)[0]
    path = write_embeddings(tmp_path / "a.parquet", values)
    with pytest.raises(
        ValueError, match=r"a.parquet: it has no column X_other or X_other_0; there are cell, X_tahoe_x1"
    ):
        open_embeddings(path, "X_other")
    with pytest.raises(FileNotFoundError, match=r"none.parquet does not exist"):
        open_embeddings(tmp_path / "none.parquet", KEY)
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"embeddings are read from .parquet, .h5ad and .zarr"):
        open_embeddings(tmp_path / "a.npy", KEY)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), tmp_path / "bare.parquet")
    with pytest.raises(
        ValueError, match=r"bare.parquet: it does not say in its metadata tahoe_x1 how its embeddings were"
    ):
        open_embeddings(tmp_path / "bare.parquet", KEY)
    adata = anndata.AnnData(np.ones((3, 2), dtype=np.float32))
    adata.write_h5ad(tmp_path / "raw.h5ad")
    with pytest.raises(ValueError, match=r'raw.h5ad: it has no obsm."X_tahoe_x1".; there is none'):
        open_embeddings(tmp_path / "raw.h5ad", KEY)
    values[5, 3] = np.nan
    strange = open_embeddings(write_embeddings(tmp_path / "nan.h5ad", values), KEY)
    with pytest.raises(ValueError, match=r"nan.h5ad: X_tahoe_x1 of cell 'c5' has NaN"):
        list(strange.pieces())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "another"}, "model another where the others have owner/model"),
        ({"hidden_layer": 3}, "hidden_layer 3 where the others have 4"),
    ],
)
def test_embeddings_of_another_model_are_not_alike(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"b.parquet was made otherwise .{said}.*mean nothing"):
        check_alike("b.parquet", {**RECORD, **change}, 16, RECORD, 16)
    with pytest.raises(ValueError, match=r"b.parquet has 8 dimensions, and the others have 16"):
        check_alike("b.parquet", RECORD, 8, RECORD, 16)


def test_another_seed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check_alike("b.parquet", {**RECORD, "seed": np.int64(1), "model": b"owner/model"}, 16, RECORD, 16)
    assert "moves cells slightly: seed 1 where the others have 0" in caplog.text
