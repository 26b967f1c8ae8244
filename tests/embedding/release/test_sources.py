"""Cells and public embeddings are found, joined by key, and read no farther than needed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tahoex1_hf.embedding.release import sources
from tahoex1_hf.embedding.release.sources import PublicData, choose_cells, find_public_data, read_chosen

COLUMN = "model"


def write_cells(path: Path, keys: list[str], rows: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    number = len(keys)
    table = {
        "genes": pa.array([[1, 3 + n % 5, 9] for n in range(number)], pa.list_(pa.int64())),
        "expressions": pa.array([[-2.0, 1.0 + n, 2.0] for n in range(number)], pa.list_(pa.float32())),
        "drug": [f"drug of {key}" for key in keys],
        "plate": ["p"] * number,
        "BARCODE_SUB_LIB_ID": keys,
    }
    pq.write_table(pa.table(table), path, row_group_size=rows)


def embedding(key: str) -> np.ndarray:
    return np.random.default_rng(int(key[1:])).standard_normal(6).astype(np.float32)


def write_embeddings(path: Path, keys: list[str], rows: int = 10, kind: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pa.array([embedding(key) for key in keys], kind or pa.list_(pa.float32()))
    pq.write_table(pa.table({COLUMN: values, "BARCODE_SUB_LIB_ID": keys}), path, row_group_size=rows)


def public_data(folder: Path) -> PublicData:
    genes = folder / "genes.parquet"
    pq.write_table(pa.table({"token_id": [3], "ensembl_id": ["ENSG00000000003"]}), genes)
    return PublicData(str(folder / "cells"), str(folder / "embeddings"), COLUMN, gene_metadata=str(genes))


def joined(folder: Path, num_cells: int, seed: int = 0) -> tuple[pa.Table, np.ndarray, Any]:
    data = public_data(folder)
    found = find_public_data(data, folder / "spool")
    chosen = choose_cells(found, data, num_cells, seed, folder / "spool", False)
    return *read_chosen(chosen, data, folder / "spool", False), chosen


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float32(), 6)])
def test_cells_meet_their_embeddings_whatever_the_order(tmp_path: Path, kind: Any) -> None:
    keys = [f"c{n}" for n in range(90)]
    for file in range(3):
        write_cells(tmp_path / "cells" / f"{file}.parquet", keys[file::3])
    others = [f"x{n}" for n in range(100, 140)]
    mixed = np.random.default_rng(0).permutation([*keys[:80], *others]).tolist()
    write_embeddings(tmp_path / "embeddings" / "a.parquet", mixed[:70], kind=kind)
    write_embeddings(tmp_path / "embeddings" / "b" / "b.parquet", mixed[70:], kind=kind)
    cells, public, chosen = joined(tmp_path, 50)
    names = cells["BARCODE_SUB_LIB_ID"].to_pylist()
    assert len(set(names)) == len(chosen) == 50
    assert set(names) <= set(keys[:80])
    np.testing.assert_array_equal(public, np.stack([embedding(name) for name in names]))
    assert cells["drug"].to_pylist() == [f"drug of {name}" for name in names]
    assert cells["expressions"].to_pylist()[0][0] == -2
    assert "plate" in cells.column_names
    again, _, _ = joined(tmp_path, 50)
    assert again.equals(cells)
    other, _, _ = joined(tmp_path, 50, seed=1)
    assert set(other["BARCODE_SUB_LIB_ID"].to_pylist()) != set(names)
    everything, _, _ = joined(tmp_path, 500)
    assert everything.num_rows == 80


def test_arrow_files_as_datasets_writes_them_will_do(tmp_path: Path) -> None:
    keys = [f"c{n}" for n in range(30)]
    for what, write in (("cells", write_cells), ("embeddings", write_embeddings)):
        write(tmp_path / "a.parquet", keys)
        table = pq.read_table(tmp_path / "a.parquet")
        (tmp_path / what).mkdir()
        with pa.ipc.new_stream(str(tmp_path / what / "data-00000-of-00001.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    cells, public, _ = joined(tmp_path, 12)
    names = cells["BARCODE_SUB_LIB_ID"].to_pylist()
    np.testing.assert_array_equal(public, [embedding(name) for name in names])
    assert cells["drug"].to_pylist() == [f"drug of {name}" for name in names]


def test_only_the_row_groups_of_chosen_cells_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"c{n}" for n in range(100)]
    write_cells(tmp_path / "cells" / "a.parquet", keys)
    write_embeddings(tmp_path / "embeddings" / "a.parquet", keys)
    monkeypatch.setattr(sources, "_ROW_GROUPS", 2)
    read: list[tuple[list[int], list[str]]] = []
    real = pq.ParquetFile.iter_batches

    def spy(self: Any, batch_size: int, row_groups: list[int], columns: list[str]) -> Any:
        read.append((row_groups, columns))
        return real(self, batch_size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    cells, public, _ = joined(tmp_path, 15)
    groups = [groups for groups, columns in read if COLUMN in columns and len(columns) == 1]
    # The first look is at a row's length. Fifteen cells need two groups of ten.
    assert len(groups) == 3
    assert all(len(some) == 1 for some in groups)
    assert groups[1] != groups[2]
    np.testing.assert_array_equal(public, [embedding(key) for key in cells["BARCODE_SUB_LIB_ID"].to_pylist()])


def test_cells_with_one_key_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_cells(tmp_path / "cells" / "a.parquet", ["c1", "c2", "c2", "c3"])
    write_embeddings(tmp_path / "embeddings" / "a.parquet", ["c1", "c2", "c3", "c3", "c4"])
    cells, _, _ = joined(tmp_path, 10)
    assert cells["BARCODE_SUB_LIB_ID"].to_pylist() == ["c1"]
    assert "4 cells share their key" in caplog.text


def test_further_files_of_cells_are_looked_at_until_there_are_enough(tmp_path: Path) -> None:
    for file in range(20):
        write_cells(tmp_path / "cells" / f"{file:02d}.parquet", [f"c{10 * file + n}" for n in range(10)])
    write_embeddings(tmp_path / "embeddings" / "a.parquet", [f"c{n}" for n in range(120, 180)])
    cells, _, _ = joined(tmp_path, 60)
    assert cells.num_rows == 60


def test_what_is_missing_is_said_with_what_to_download(tmp_path: Path, hub_cache: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        find_public_data(PublicData(), tmp_path, ["the model: it is not there"])
    text = str(caught.value)
    for part in (
        "the model: it is not there",
        "the cells (hf://datasets/tahoebio/Tahoe-100M/data)",
        "the embeddings (hf://datasets/tahoebio/Tahoe-x1-embeddings)",
        "the gene table",
        "hf download --repo-type dataset tahoebio/Tahoe-x1-embeddings",
        "--embeddings",
    ):
        assert part in text
    with pytest.raises(FileNotFoundError, match=r"the cells \(.*nothing\): there is no file that ends in .parquet"):
        find_public_data(PublicData(cells=str(tmp_path / "nothing")), tmp_path)


def test_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path) -> None:
    write_cells(tmp_path / "cells" / "a.parquet", ["c1", "c2"])
    write_embeddings(tmp_path / "embeddings" / "a.parquet", ["c7", "c8"])
    with pytest.raises(ValueError, match="No cell is in both: the BARCODE_SUB_LIB_ID of 1 files"):
        joined(tmp_path, 2)
    pq.write_table(pa.table({"BARCODE_SUB_LIB_ID": ["c1"], "x": [1.0]}), tmp_path / "embeddings" / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: the embeddings have no column 'model', only \['BARCODE"):
        joined(tmp_path, 2)
    pq.write_table(pa.table({"BARCODE_SUB_LIB_ID": ["c1"], COLUMN: [1.0]}), tmp_path / "embeddings" / "a.parquet")
    with pytest.raises(ValueError, match="the column 'model' is double, not a list of numbers"):
        joined(tmp_path, 2)
    for values, said in (
        ([[1.0, 2.0], None], "no embedding for 1 cells"),
        ([[1.0, 2.0], [1.0]], "lists of different lengths"),
        ([[1.0, 2.0], [1.0, float("nan")]], "values that are not finite"),
    ):
        table = pa.table({"BARCODE_SUB_LIB_ID": ["c1", "c2"], COLUMN: values})
        pq.write_table(table, tmp_path / "embeddings" / "a.parquet")
        with pytest.raises(ValueError, match=said):
            joined(tmp_path, 2)
