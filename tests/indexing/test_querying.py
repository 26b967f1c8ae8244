"""Queries find the nearest cells, with and without a filter, and refuse what cannot be compared with the index."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from embeddings import clouds, columns_of, write_embeddings
from finetuning_runs import labelled_cells, write_base
from typer.testing import CliRunner

from tahoex1_hf import embed_files
from tahoex1_hf.cli.app import app
from tahoex1_hf.embedding import stored
from tahoex1_hf.indexing import building, querying, searching
from tahoex1_hf.indexing.building import build_index
from tahoex1_hf.indexing.querying import query_index
from tahoex1_hf.indexing.store import CellIndex

CELLS, ASKED = 600, 40


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search index for few cells, several pieces, and few queries at a time."""
    monkeypatch.setattr(stored, "PIECE_VALUES", 16 * 64)
    monkeypatch.setattr(building, "_LEAST", 100)
    monkeypatch.setattr(building, "_PART", 30)
    monkeypatch.setattr(searching, "_FEW", 50)
    monkeypatch.setattr(searching, "_FEW_EACH", 0)
    monkeypatch.setattr(searching, "_SCANNED", 100)
    monkeypatch.setattr(querying, "QUERIES", 16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an index of two files, and cells to look for."""
    place = tmp_path_factory.mktemp("world")
    values, cloud = clouds(CELLS)
    obs = columns_of(cloud)
    half = CELLS // 2
    first = write_embeddings(place / "first.parquet", values[:half], obs[:half].reset_index(drop=True))
    second = write_embeddings(place / "second.h5ad", values[half:], obs[half:].reset_index(drop=True), prefix="d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_LEAST", 100)
        patch.setattr(building, "_PART", 30)
        assert build_index([first, second], place / "index", progress=False).partitions == 20
    asked, cloud = clouds(ASKED, seed=7)
    write_embeddings(place / "asked.h5ad", asked, columns_of(cloud), prefix="q")
    return place


def nearest(kept: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the true neighbours among some cells, and their distances."""
    far = np.linalg.norm(clouds(ASKED, seed=7)[0][:, None].astype(np.float64) - clouds(CELLS)[0][kept], axis=2)
    order = np.argsort(far, axis=1)[:, :k]
    return np.flatnonzero(kept)[order], np.take_along_axis(far, order, axis=1)


FILTERS = {
    None: lambda obs: np.ones(len(obs), dtype=bool),
    "tissue = 'lung'": lambda obs: (obs["tissue"] == "lung").to_numpy(),
    "`cell type` = 'type 2' AND n_genes < 300": lambda obs: (obs["cell type"] == "type 2").to_numpy(),
    "index_row < 5": lambda obs: np.arange(CELLS) % (CELLS // 2) < 5,
}


@pytest.mark.parametrize("where", FILTERS)
@pytest.mark.parametrize("exact", [True, False])
def test_the_nearest_cells_are_found(world: Path, tmp_path: Path, where: str | None, exact: bool) -> None:
    obs = columns_of(clouds(CELLS)[1])
    kept = FILTERS[where](obs)
    output = tmp_path / "out.parquet"
    found = query_index(world / "asked.h5ad", world / "index", output, k=12, where=where, exact=exact, progress=False)
    assert (found.num_cells, found.passing) == (ASKED, kept.sum())
    table = pq.read_table(output).to_pandas()
    k = min(12, int(kept.sum()))
    assert table["query"].tolist() == [f"q{row}" for row in range(ASKED) for _ in range(k)]
    assert table["rank"].tolist() == [rank for _ in range(ASKED) for rank in range(1, k + 1)]
    truth, distances = nearest(kept, k)
    rows = table["row"] + (table["file"] == "second.h5ad") * (CELLS // 2)
    mine = rows.to_numpy().reshape(ASKED, k)
    right = np.mean([len({*one} & {*other}) / k for one, other in zip(mine, truth, strict=True)])
    assert right == 1 if exact or kept.sum() < 50 else right >= 0.95
    assert found.recall == 1 if exact or kept.sum() < 50 else found.recall >= 0.98
    same = mine == truth
    np.testing.assert_allclose(table["distance"].to_numpy().reshape(ASKED, k)[same], distances[same], atol=1e-5)
    assert table["tissue"].tolist() == obs["tissue"].iloc[rows].tolist()
    prefix = np.where(rows < CELLS // 2, "c", "d").astype(object)
    assert table["neighbour"].tolist() == (prefix + table["row"].astype(str)).tolist()


def test_cells_that_pass_are_compared_one_by_one_where_many_are_looked_for(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_FEW_EACH", 10)
    index = CellIndex.open(world / "index")
    for where, number, one_by_one in ((None, 1000, False), ("n_genes >= 0", 59, False), ("n_genes >= 0", 60, True)):
        search = searching.Search(index, 12, where, exact=False, least=0.98)
        search.expect(number)
        assert (search.probes == 0) == one_by_one, (where, number, search.passing)


def test_cells_beside_the_parts_that_are_read_are_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too few cells pass the filter in the parts that are read, the others are looked through."""
    index = CellIndex.open(world / "index")
    search = searching.Search(index, 12, "tissue = 'lung'", exact=False, least=0.98)
    monkeypatch.setattr(search, "_measured", True)
    search.probes = 1
    there = search(clouds(ASKED, seed=7)[0])
    assert np.isfinite(there.distances).all()


def test_the_summary_says_what_the_neighbours_are(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    arguments = [str(world / "asked.h5ad"), "--index", str(world / "index"), "--output", str(output), "-k", "5"]
    result = CliRunner().invoke(app, ["index", "query", *arguments])
    assert result.exit_code == 0, result.output
    table = pq.read_table(output).to_pandas()
    shares = table["tissue"].value_counts(normalize=True)
    whole = columns_of(clouds(CELLS)[1])["tissue"].value_counts(normalize=True)
    agree = table.groupby("query")["tissue"].agg(lambda mine: mine.value_counts().iloc[0] / 5).mean()
    lines = {
        line.split(" | ")[0].strip("| "): line for line in output.with_name("out.parquet.md").read_text().splitlines()
    }
    for name, share in shares.items():
        assert f"{name} {share:.1%}" in lines["tissue"]
        assert f"{whole[name]:.1%}" in lines["tissue"]
    assert f"{agree:.1%}" in lines["tissue"]
    assert f"| {table['n_genes'].median():.4g} [" in lines["n_genes"]
    assert "healthy" in lines
    assert "missing" in lines["cell type"]
    assert "40 cells, 5 neighbours each among the 600 cells" in result.output


def test_raw_cells_are_embedded_by_the_indexs_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(searching, "_FEW", 10**6)
    base = write_base(tmp_path / "base")
    cells = labelled_cells(90, noise=0.0)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    embed_files(tmp_path / "cells.h5ad", tmp_path / "cells.parquet", base, obs="kind", dtype="float32", progress=False)
    build_index(tmp_path / "cells.parquet", tmp_path / "index", progress=False)
    given: Any = (tmp_path / "cells.h5ad", tmp_path / "index", tmp_path / "out.parquet")
    with pytest.raises(ValueError, match=r"cells.h5ad: it has no obsm.* name the index's own model .--model"):
        query_index(*given, progress=False)
    options: dict[str, Any] = {"k": 3, "dtype": "float32", "progress": False}
    found = query_index(*given, model=base, **options)
    table = pq.read_table(given[2]).to_pandas()
    first = table[table["rank"] == 1]
    assert first["query"].tolist() == first["neighbour"].tolist()
    assert first["distance"].max() < 1e-4
    assert (table["kind"] == cells.obs["kind"].loc[table["query"]].to_numpy()).mean() > 0.9
    assert "90 of the cells are in the index themselves" in found.text
    assert not list(tmp_path.glob("*embeddings*"))

    def computing(*_: Any, **__: Any) -> None:
        raise AssertionError("embedded before the slip was told")

    monkeypatch.setattr(querying, "embed_files", computing)
    write_base(tmp_path / "other", num_hidden_layers=3).rename(tmp_path / "another")
    with pytest.raises(
        ValueError, match=r"another \(--model\) is not that of .*model another where the index has base"
    ):
        query_index(*given, model=tmp_path / "another", **options)


def test_slips_are_told_before_any_search(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: Any, **__: Any) -> None:
        raise AssertionError("searched before the slip was told")

    monkeypatch.setattr(searching, "exact_neighbours", searched)
    monkeypatch.setattr(searching, "indexed_neighbours", searched)
    asked, index, output = world / "asked.h5ad", world / "index", tmp_path / "out.parquet"
    values = clouds(5)[0]
    odd = write_embeddings(tmp_path / "odd.h5ad", values, model="another/model")
    narrow = write_embeddings(tmp_path / "narrow.parquet", values[:, :8])
    for given, options, said in (
        ((odd, index, output), {}, "odd.h5ad was made otherwise .model another/model where the others"),
        ((narrow, index, output), {}, "narrow.parquet has 8 dimensions, and the others have 16"),
        ((tmp_path / "no.h5ad", index, output), {}, "no.h5ad does not exist"),
        ((asked, tmp_path / "no", output), {}, "no does not exist: make it by tahoex1 index build"),
        ((asked, tmp_path, output), {}, "holds no index of ours .no index.json."),
        ((asked, index, tmp_path / "out.csv"), {}, "out.csv must end in .parquet"),
        ((asked, index, output), {"k": 0}, "k=0: pass at least 1"),
        ((asked, index, output), {"where": "tisue = 'lung'"}, "No field named tisue.*are cell, tissue, n_genes"),
        ((asked, index, output), {"where": "tissue ="}, r"where=tissue = .--where."),
        ((asked, index, output), {"where": "tissue = 'bone'"}, "no cell of .* passes it"),
        ((asked, index, output), {"key": "X_pca"}, 'has no obsm."X_pca".; there is X_tahoe_x1'),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            query_index(*given, progress=False, **options)  # type: ignore[arg-type]
    assert not output.exists()


def test_damaged_indexes_and_searches_that_take_too_long_are_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LanceDB's errors become sentences that name argument, folder and way out; a sound filter is not blamed."""
    asked, output = world / "asked.h5ad", tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(searching, "_PATIENCE", timedelta(microseconds=1))
        with pytest.raises(OSError, match=r"index=.*index .--index.: LanceDB failed: .*timeout.* with .*--exact"):
            query_index(asked, world / "index", output, progress=False)
    damaged = tmp_path / "index"
    shutil.copytree(world / "index", damaged)
    for path in (damaged / "cells.lance" / "data").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    for where in (None, "tissue = 'lung'"):
        with pytest.raises(OSError, match=r"index=.*index .--index.: LanceDB failed: .*missing or damaged") as caught:
            query_index(asked, damaged, output, where=where, progress=False)
        assert ".rs" not in str(caught.value)
    with pytest.raises(OSError, match=r"output=.*index .--output.: LanceDB failed: .*same command goes on"):
        build_index([world / "first.parquet", asked], damaged, progress=False)
    arguments = ["index", "query", str(asked), "--index", str(damaged), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "not foreseen" not in result.output
    assert not output.exists()
