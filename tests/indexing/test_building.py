"""An index holds every cell once, however often its making was stopped; what cannot be compared is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from embeddings import clouds, columns_of, write_embeddings

from tahoex1_hf.embedding import stored
from tahoex1_hf.indexing import building, searching
from tahoex1_hf.indexing.building import build_index
from tahoex1_hf.indexing.searching import find_probes, indexed_neighbours
from tahoex1_hf.indexing.store import CellIndex


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 40 cells, additions of 80, parts of 50."""
    monkeypatch.setattr(stored, "PIECE_VALUES", 16 * 40)
    monkeypatch.setattr(building, "_ADDED", 80)
    monkeypatch.setattr(building, "_LEAST", 150)
    monkeypatch.setattr(building, "_PART", 50)
    monkeypatch.setattr(building, "SAMPLE", 20)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for number, name in enumerate(("a.parquet", "b.h5ad")):
        values, cloud = clouds(150 - 50 * number, seed=number)
        paths.append(write_embeddings(tmp_path / name, values, columns_of(cloud), prefix=f"{name[0]}-"))
    return paths


def contents(folder: Path) -> list[tuple[int, int, str]]:
    """Return file, row and name of all cells."""
    table = CellIndex.open(folder).table.search().select(["index_file", "index_row", "cell"]).to_arrow()
    return sorted(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))


def expected() -> list[tuple[int, int, str]]:
    return [(0, row, f"a-{row}") for row in range(150)] + [(1, row, f"b-{row}") for row in range(100)]


def stopped_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Stop at a numbered call: a piece, the search for what is done, or the making of the search index."""
    calls = 0

    def counted(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Stop
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(building._Batches, "_batch", counted(building._Batches._batch))
    monkeypatch.setattr(building, "_make_searchable", counted(building._make_searchable))
    monkeypatch.setattr(CellIndex, "write_manifest", counted(CellIndex.write_manifest))
    monkeypatch.setattr(CellIndex, "make_table", counted(CellIndex.make_table))


def test_no_cell_is_lost_or_added_twice_wherever_it_is_stopped(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_LEAST", 10**6)  # a search index costs most of the time
    added = []
    for call in range(1, 20):
        output = tmp_path / f"index{call}"
        with pytest.MonkeyPatch.context() as patch:
            stopped_at(patch, call)
            try:
                build_index(files, output, progress=False)
                break
            except Stop:
                pass
        if (output / "index.json").exists():
            with pytest.raises(
                ValueError, match=r"is unfinished, .* run the tahoex1 index build that was stopped again"
            ):
                CellIndex.open(output).check_complete()
        built = build_index(files, output, progress=False)
        added.append(built.added)
        assert contents(output) == expected(), call
        CellIndex.open(output).check_complete()
    assert call > 10  # two manifests, the table, the pieces, the search index; then a run that nothing stops
    assert sorted(added, reverse=True) == added  # the later it was stopped, the less is added again
    assert added[0] == 250
    assert added[-1] == 0


def test_more_cells_are_added_and_the_same_file_is_not(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "index"
    first = build_index(files[0], output, progress=False)
    assert (first.num_cells, first.added) == (150, 150)
    copied = tmp_path / "copy.parquet"
    copied.write_bytes(files[0].read_bytes())
    second = build_index([files[0], copied, files[1]], output, progress=False)
    assert (second.num_cells, second.added) == (250, 100)
    assert contents(output) == expected()
    third = build_index(files, output, progress=False)
    assert (third.num_cells, third.added, third.recall) == (250, 0, second.recall)
    table = CellIndex.open(output).table.to_arrow()
    assert table["n_genes"].to_pylist() == [5 + 100 * c for n in (0, 1) for c in clouds(150 - 50 * n, seed=n)[1]]


def test_columns_may_differ_between_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values, cloud = clouds(30)
    obs = columns_of(cloud)
    one = write_embeddings(tmp_path / "one.parquet", values, obs[["tissue"]].rename(columns={"tissue": "rank"}))
    other = write_embeddings(tmp_path / "other.h5ad", values, obs[["healthy"]], seed=1)
    build_index([one, other], tmp_path / "index", progress=False)
    table = CellIndex.open(tmp_path / "index").table.to_arrow()
    assert table["obs_rank"].to_pylist() == [*obs["tissue"], *[None] * 30]  # a query's table has its own rank
    assert table["healthy"].to_pylist() == [*[None] * 30, *obs["healthy"]]
    more = write_embeddings(tmp_path / "more.parquet", values[:9], obs[["cell type"]][:9])
    build_index(more, tmp_path / "index", progress=False)
    assert "more.parquet: the index has no column cell type, which is left out" in caplog.text
    assert CellIndex.open(tmp_path / "index").table.count_rows() == 69


def test_as_many_parts_are_read_as_the_recall_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE_VALUES", 16 * 500)
    monkeypatch.setattr(building, "_ADDED", 1000)
    values = np.random.default_rng(0).normal(size=(1500, 16)).astype(np.float32)  # no clouds: the hardest case
    built = build_index(write_embeddings(tmp_path / "a.parquet", values), tmp_path / "index", progress=False)
    assert built.partitions == 30
    assert built.recall >= 0.98
    assert f"{built.probes} of 30 parts read; measured against exact search on 20 cells" in str(built)
    index, asked = CellIndex.open(tmp_path / "index"), values[:25]
    truth = np.argsort(np.linalg.norm(values - asked[:, None], axis=2), axis=1)[:, :10]
    found = []
    for least in (0.2, 0.6, 0.95):
        probes, recall = find_probes(index, asked, 10, least)
        rows = index.rows(indexed_neighbours(index, asked, 10, probes).ids.ravel(), ["index_row"])["index_row"]
        mine = rows.to_numpy().reshape(25, 10)
        right = np.mean([len({*one} & {*other}) / 10 for one, other in zip(mine, truth, strict=True)])
        assert recall == pytest.approx(right, abs=0.05)  # searches differ a little
        assert recall >= least
        found.append(probes)
    assert found == sorted(set(found))  # more for more


def test_a_recall_that_may_be_chance_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4 parts 4 of 100 cells find half of their neighbours; with 8 each cell lacks 2 of 100."""

    def found(index: Any, queries: np.ndarray, k: int, probes: int, where: str | None) -> searching.Neighbours:
        missed = np.zeros((100, 100), dtype=bool)
        missed[:, :2] = True
        if probes < 8:
            missed[:, :2], missed[::25, 50:] = False, True
        return searching.Neighbours(np.zeros((100, 100), dtype=np.uint64), np.where(missed, np.inf, 0.5))

    truth = searching.Neighbours(np.zeros((100, 100), dtype=np.uint64), np.full((100, 100), 0.5))
    monkeypatch.setattr(searching, "exact_neighbours", lambda *given: truth)
    monkeypatch.setattr(searching, "indexed_neighbours", found)
    index: Any = SimpleNamespace(manifest=SimpleNamespace(partitions=64))
    assert find_probes(index, np.zeros((100, 4)), 100, 0.97, start=4) == (
        8,
        pytest.approx(0.98),
    )  # 0.980 -+ 0.016 is not enough
    assert find_probes(index, np.zeros((100, 4)), 100, 0.96, start=4) == (4, pytest.approx(0.98))
    assert find_probes(index, np.zeros((100, 4)), 100, 0.99, start=4) == (64, pytest.approx(0.98))


def test_slips_are_told_before_anything_is_written(files: list[Path], tmp_path: Path) -> None:
    values, cloud = clouds(20)
    odd = write_embeddings(tmp_path / "odd.parquet", values, columns_of(cloud), model="another/model")
    narrow = write_embeddings(tmp_path / "narrow.h5ad", values[:, :8])
    output = tmp_path / "index"
    for given, said in (
        ([files[0], odd], "odd.parquet was made otherwise .model another/model where the others have owner/model"),
        ([files[0], narrow], "narrow.h5ad has 8 dimensions, and the others have 16"),
        ([tmp_path / "none.parquet"], "none.parquet does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            build_index(given, output, progress=False)
        assert not output.exists()
    with pytest.raises(ValueError, match=r"recall=0 .--recall.: pass a share above 0"):
        build_index(files, output, recall=0, progress=False)
    with pytest.raises(ValueError, match=r"is a folder that holds other files: name a new one"):
        build_index(files, tmp_path, progress=False)
    build_index(files[0], output, progress=False)
    before = contents(output)
    with pytest.raises(ValueError, match=r"odd.parquet was made otherwise"):
        build_index(odd, output, progress=False)
    write_embeddings(files[0], values, columns_of(cloud))
    with pytest.raises(ValueError, match=r"a.parquet has changed since its cells went into the index"):
        build_index(files[0], output, progress=False)
    assert contents(output) == before


def test_a_file_that_was_begun_must_be_named_again(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "index"
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 5)
        with pytest.raises(Stop):
            build_index(files[0], output, progress=False)
    with pytest.raises(ValueError, match=r"stopped after (50|80) of the 150 cells of .*a.parquet: name it as well"):
        build_index(files[1], output, progress=False)
    assert build_index(files, output, progress=False).num_cells == 250
    assert contents(output) == expected()


def test_values_that_are_not_numbers_stop_the_run(tmp_path: Path) -> None:
    values = clouds(90)[0]
    values[70, 2] = np.inf
    with pytest.raises(ValueError, match=r"a.parquet: X_tahoe_x1 of cell 'c70' has NaN or infinite values"):
        build_index(write_embeddings(tmp_path / "a.parquet", values), tmp_path / "index", progress=False)
