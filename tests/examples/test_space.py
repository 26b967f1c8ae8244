"""What a Space does without its page: limits before reading, errors as sentences, results, and nothing kept."""

import json
import multiprocessing
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import yaml
from cells import make_cells, write_cells
from helpers import REPO_ROOT
from tahoex1_space import jobs, page, service
from tahoex1_space.limits import Extent, Limits, check_file, check_time

import tahoex1_hf

pytest.importorskip("matplotlib")
pytest.importorskip("umap")
pytest.importorskip("sklearn")

EXAMPLES = REPO_ROOT / "examples"

FORK = multiprocessing.get_context("fork")  # the real Space forks a process of its own; here everything is imported
CHECKPOINT = str(EXAMPLES / "demo_checkpoint")


def vocabulary() -> list[str]:
    tokens = json.loads((EXAMPLES / "demo_checkpoint" / "vocab.json").read_text())
    return [token for token in tokens if token.startswith("ENSG")][:60]


def write(path: Path, num_cells: int, kind: str = "csr", seed: int = 0) -> Path:
    """Write cells whose genes the demo checkpoint knows; their types differ."""
    cells = make_cells(num_cells, seed, vocabulary())
    dense = cells.X.toarray()
    for number, name in enumerate(("B", "NK", "T")):
        dense[np.ix_(cells.obs["cell_type"] == name, np.arange(number * 20, number * 20 + 20))] += 40
    cells.X = sp.csr_matrix(dense)
    return write_cells(cells, path, kind)


# Limits


def test_limits_come_from_the_environment() -> None:
    found = Limits.from_environment({"TAHOEX1_SPACE_CELLS": "12", "TAHOEX1_SPACE_MINUTES": "3", "OTHER": "x"})
    assert found == Limits(cells=12, minutes=3)
    for text in ("0", "-1", "many", "1.5"):
        with pytest.raises(ValueError, match=r"TAHOEX1_SPACE_CELLS='.*' must be a whole number"):
            Limits.from_environment({"TAHOEX1_SPACE_CELLS": text})


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_the_extent_of_a_file_is_known_before_it_is_read(kind: str, tmp_path: Path) -> None:
    path = write_cells(make_cells(20), tmp_path / "cells", kind)
    extent = check_file(path, Limits(), context_length=1000)
    assert (extent.cells, extent.genes) == (20, 60)
    stored = ad.read_h5ad(path).X
    values = 20 * 60 if kind == "dense" else stored.nnz
    assert values <= extent.tokens <= values + 20
    assert check_file(path, Limits(), context_length=10).tokens == 200


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: h5py.Dataset, *arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", read)
    monkeypatch.setattr(h5py.Dataset, "__array__", read)


@pytest.mark.parametrize(
    ("allowed", "sentence"),
    [
        ({"cells": 19}, r"cells\.h5ad has 20 cells, and 19 are allowed here: adata\[:19\]"),
        ({"genes": 59}, r"cells\.h5ad has 60 genes, and 59 are allowed here"),
        ({"megabytes": 0}, r"cells\.h5ad has 0 MB, and 0 are allowed here"),
        ({"unpacked_megabytes": 0}, r"cells\.h5ad unpacks to 0 MB, and 0 are allowed here"),
    ],
)
def test_limits_are_held_without_reading_any_values(
    allowed: dict[str, int], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_cells(make_cells(20), tmp_path / "cells", "csr")
    no_reading(monkeypatch)
    check_file(path, Limits(), 1000)
    with pytest.raises(ValueError, match=sentence):
        check_file(path, Limits(**allowed), 1000)


def test_the_time_is_estimated_before_the_work() -> None:
    assert check_time(Extent(1000, 60, 50_000), Limits(minutes=2), 1000.0, 10.0) == 60
    with pytest.raises(ValueError, match=r"about 10 minutes here, and 2 are allowed: upload about 1,8\d\d cells"):
        check_time(Extent(10_000, 60, 590_000), Limits(minutes=2), 1000.0, 10.0)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(Trap.marker),)

    marker = ""


def test_files_that_are_none_are_refused_and_nothing_in_them_runs(tmp_path: Path) -> None:
    Trap.marker = str(tmp_path / "ran")
    bad = tmp_path / "bad.h5ad"
    bad.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"bad\.h5ad is not an \.h5ad file, which is what AnnData"):
        check_file(bad, Limits(), 1000)
    with h5py.File(bad, "w") as file:
        file["values"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"bad\.h5ad.*not a complete AnnData: it lacks obs, var"):
        check_file(bad, Limits(), 1000)
    good = write_cells(make_cells(20), tmp_path / "good", "csr")
    with h5py.File(good, "r+") as file:
        file["uns/trap"] = np.frombuffer(pickle.dumps(Trap()), dtype=np.uint8)
        file["uns/elsewhere"] = h5py.ExternalLink(str(bad), "values")
    with pytest.raises(ValueError, match=r"/uns/elsewhere lies in another file"):
        check_file(good, Limits(), 1000)
    renamed = good.rename(tmp_path / "cells.txt")
    with pytest.raises(ValueError, match=r"cells\.txt is not an \.h5ad file"):
        check_file(renamed, Limits(), 1000)
    assert not (tmp_path / "ran").exists()


# Processes


def told(tell: jobs.Tell, values: list[int]) -> dict[str, Any]:
    tell("Adding", 1, 2)
    tell("Adding", 2, 2)
    return {"sum": sum(values)}


def failing(tell: jobs.Tell, how: str) -> dict[str, Any]:
    if how == "foreseen":
        raise ValueError("The cells are no cells.")
    if how == "unforeseen":
        raise KeyError("secret place")
    if how == "memory":
        raise MemoryError
    if how == "killed":
        os._exit(9)
    threading.Event().wait()
    return {}


def test_a_job_tells_of_its_progress_and_gives_its_result() -> None:
    news = [each for each in jobs.run_job(FORK, told, {"values": [1, 2]}, 60) if each is not None]
    assert news == [("Adding", 1, 2), ("Adding", 2, 2), {"sum": 3}]


@pytest.mark.parametrize(
    ("how", "seconds", "sentence"),
    [
        ("foreseen", 60, r"^The cells are no cells\.$"),
        ("unforeseen", 60, r"^Something failed here that no message foresees"),
        ("memory", 60, r"^The work needs more memory than there is here"),
        ("killed", 60, r"^The work ended without a result, most often because memory ran out"),
        ("forever", 0, r"^The work was ended after 0 minutes, which is the longest time here"),
    ],
)
def test_a_job_that_fails_says_so_in_a_sentence(how: str, seconds: float, sentence: str) -> None:
    with pytest.raises(jobs.JobError, match=sentence):
        list(jobs.run_job(FORK, failing, {"how": how}, seconds))
    assert not multiprocessing.active_children()


def test_a_job_that_nobody_waits_for_is_ended() -> None:
    running = jobs.run_job(FORK, failing, {"how": "forever"}, 600)
    assert next(running) is None
    running.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_work_waits_for_its_turn() -> None:
    line = service.Line(Limits(jobs=2, waiting=1))
    first, second, third = (line.join() for _ in range(3))
    assert [line.ahead(each) for each in (first, second, third)] == [0, 0, 1]
    with pytest.raises(ValueError, match="1 pieces of work are waiting already"):
        line.join()
    line.leave(first)
    assert line.ahead(third) == 0


# The whole way, in this process


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write(folder / "reference", 60, seed=1)
    write(folder / "cells", 30, seed=2)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run jobs in this process, and place the cells of a UMAP by their first dimensions: UMAP compiles for seconds."""

    def run_job(context: Any, work: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> Iterator[Any]:
        news: list[Any] = []
        try:
            result = work(lambda *each: news.append(each), **json.loads(json.dumps(arguments)))
        except ValueError as error:
            raise jobs.JobError(str(error)) from error
        yield from news
        yield json.loads(json.dumps(result))

    monkeypatch.setattr(service, "run_job", run_job)
    monkeypatch.setattr("tahoex1_hf.common.plots.umap_places", lambda embeddings, seed: embeddings[:, :2])


@pytest.fixture
def space(files: Path, in_process: None, tmp_path: Path) -> service.Space:
    settings = service.Settings(CHECKPOINT, None, files / "reference.h5ad", example=files / "cells.h5ad")
    return service.Space(settings, Limits(waiting=1), tmp_path / "root", FORK)


def upload(space: service.Space, file: Path) -> Path:
    """Put a copy of a file where a browser's upload lies."""
    place = space.root / "uploads" / file.name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(file.read_bytes())
    return place


def left(space: service.Space) -> set[str]:
    """Return the names of the files that are still there, but for the Space's own."""
    return {path.name for path in space.root.rglob("*") if path.is_file() and "space" not in path.parts[-2]}


def test_cells_are_embedded_annotated_and_nothing_is_kept(space: service.Space, files: Path) -> None:
    extent, seconds = space.accept("one", "query", upload(space, files / "cells.h5ad"))
    assert extent.cells == 30
    assert seconds > service.SECONDS_BESIDES
    assert left(space) == {"cells.h5ad"}  # the upload was moved
    *news, result = space.analyse("one", "ignored")
    assert ("Embedding", 30, 30) in news
    assert news[-1] == ("Drawing the UMAP", 0, 0)
    assert left(space) == {"cells_tahoe_x1.h5ad", "cells_report.zip"}
    cells = ad.read_h5ad(result["cells"])
    assert cells.obsm["X_tahoe_x1"].shape == (30, 64)
    assert set(cells.obs["tahoex1_cell_type_nearest"]) <= {"B", "NK", "T"}
    assert result["labels"] == sorted(result["labels"], key=lambda row: -row[1])
    counted = cells.obs["tahoex1_cell_type"].value_counts()
    assert {label: number for label, number, _ in result["labels"]} == counted[counted > 0].to_dict()
    assert result["genes"] == 60
    assert {"report.md", "umap.png"} <= set(zipfile.ZipFile(result["report"]).namelist())
    assert not any(str(space.root) in note or "is replaced" in note for note in result["notes"])
    space.forget("one")
    assert not left(space)


def test_a_reference_of_the_users_own_is_taken_once(space: service.Space, files: Path, tmp_path: Path) -> None:
    other = ad.read_h5ad(files / "reference.h5ad")
    other.obs["kind"] = other.obs["cell_type"].astype(str).str.lower().astype("category")
    other.write_h5ad(tmp_path / "theirs.h5ad")
    space.accept_example("one")
    space.accept("one", "reference", upload(space, tmp_path / "theirs.h5ad"))
    with pytest.raises(ValueError, match="Name the column of the reference's obs"):
        list(space.analyse("one", " "))
    *_, result = space.analyse("one", "kind")
    assert {label for label, *_ in result["labels"]} <= {"b", "nk", "t", "unknown"}
    space.accept_example("one")
    space.accept("one", "reference", upload(space, tmp_path / "theirs.h5ad"))
    *_, result = space.analyse("one", "kinds")  # a column that is not there costs the labels, not the embeddings
    assert result["labels"] == []
    assert result["report"] is None
    told_of = next(note for note in result["notes"] if note.startswith("Not annotated"))
    assert "kinds" in told_of
    assert str(space.root) not in told_of
    assert "X_tahoe_x1" in ad.read_h5ad(result["cells"]).obsm


def test_cells_that_cannot_be_embedded_are_an_error_and_are_removed(space: service.Space, tmp_path: Path) -> None:
    bad = tmp_path / "strange.h5ad"
    make_cells(20, genes=[f"gene{number}" for number in range(60)]).write_h5ad(bad)
    space.accept("one", "query", upload(space, bad))
    with pytest.raises(ValueError, match="gene") as caught:
        list(space.analyse("one", ""))
    assert str(space.root) not in str(caught.value)
    assert not left(space)
    with pytest.raises(ValueError, match=r"There are no cells to work on: choose an \.h5ad file first"):
        list(space.analyse("one", ""))


def test_what_is_refused_is_removed_at_once(space: service.Space, tmp_path: Path) -> None:
    bad = tmp_path / "bad.h5ad"
    bad.write_text("no cells")
    place = upload(space, bad)
    with pytest.raises(ValueError, match=r"is not an \.h5ad file"):
        space.accept("one", "query", place)
    assert not left(space)
    with pytest.raises(ValueError, match="The upload is no longer here"):
        space.accept("one", "query", place)


def test_two_users_have_their_own_files_and_one_waits(space: service.Space, files: Path) -> None:
    for name in ("one", "../../two"):
        space.accept(name, "query", upload(space, files / "cells.h5ad"))
    first, second = space.analyse("one", ""), space.analyse("../../two", "")
    assert next(first) == ("Loading the model", 0, 0)
    assert next(second) == 1  # piece of work ahead
    with pytest.raises(ValueError, match="Your last piece of work has not ended"):
        next(space.analyse("one", ""))
    space.accept("three", "query", upload(space, files / "cells.h5ad"))
    with pytest.raises(ValueError, match="are waiting already"):
        next(space.analyse("three", ""))
    *_, result = first
    *_, other = second
    assert result["cells"] != other["cells"]
    assert all((space.root / "sessions") in Path(each["cells"]).parents for each in (result, other))
    assert result["labels"] == other["labels"]


def test_work_that_is_stopped_leaves_nothing(space: service.Space) -> None:
    space.accept_example("one")
    running = space.analyse("one", "")
    next(running)
    space.forget("one")
    with pytest.raises(ValueError, match="The work was stopped, and your files are removed"):
        list(running)
    assert not left(space)


def test_files_of_users_who_left_without_a_word_are_removed(
    space: service.Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    space.accept_example("one")
    monkeypatch.setattr(service, "KEPT_SECONDS", -1)
    space.accept_example("two")
    assert len(list((space.root / "sessions").iterdir())) == 1


def test_a_space_without_a_reference_says_how_to_make_one(tmp_path: Path) -> None:
    settings = service.Settings(CHECKPOINT, None, tmp_path / "reference.h5ad")
    with pytest.raises(ValueError, match="`make space` makes one, or name another by TAHOEX1_SPACE_REFERENCE"):
        service.Space(settings, Limits(), tmp_path, FORK)


def test_settings_come_from_the_environment() -> None:
    assert service.Settings.from_environment({}) == service.Settings()
    own = service.Settings.from_environment({"TAHOEX1_SPACE_MODEL": "me/mine", "TAHOEX1_SPACE_LABEL": "type"})
    assert (own.model, own.size, own.label) == ("me/mine", None, "type")


# Texts


def test_nothing_that_comes_from_a_file_becomes_html() -> None:
    evil = "<script>alert(1)</script>"
    found = {
        "labels": [[evil, 3, 0.5], ["unknown", 1, 0.2]],
        "notes": [evil],
        "number": 4,
        "genes": 2,
        "picture": "AA",
    }
    texts = [page.result(found), page.problem(evil), page.progress(evil, 1, 2), page.progress(evil, 0, 0)]
    texts.append(page.accepted(evil, Extent(1, 1, 1), 1.0))
    for text in texts:
        assert "<script" not in text
        assert "&lt;script&gt;" in text
    assert "far from all cells of the reference" in texts[0]
    assert re.search(r'<img [^>]*alt="UMAP of the embeddings of 4 cells, coloured by', texts[0])


def test_results_without_labels_or_picture_say_so() -> None:
    text = page.result({"labels": [], "notes": [], "number": 2, "genes": 2, "picture": None})
    assert "too few cells for a UMAP" in text
    assert "<table" not in text


# What is published


def test_the_card_and_the_requirements_are_those_that_are_tested() -> None:
    folder = EXAMPLES / "space"
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    lines = (folder / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pinned = dict(
        line.split("==") for line in (REPO_ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert card["sdk_version"] == pins["gradio"]
    assert (folder / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60  # the Hub refuses longer ones
    assert {name: pinned[name] for name in pins} | {"pillow": pins["pillow"]} == pins
    assert any(line.endswith(f"tahoex1_hf@v{tahoex1_hf.__version__}") for line in lines)


def test_the_reference_and_the_example_are_cells_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from space_cells import space_cells

    reference, example = space_cells()
    assert (reference.shape, example.shape) == ((500, 744), (200, 744))
    assert not set(reference.obs_names) & set(example.obs_names)
    assert reference.obs["cell_type"].nunique() == 10
    assert list(example.obs.columns) == []
    assert reference.X.dtype == np.int32
