"""The tables of README.md and docs/speed.md are those that what was measured makes, and one run writes all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import REPO_ROOT
from typer.testing import CliRunner

from benchmarks import __main__ as suite
from benchmarks import pages
from benchmarks.measuring import Row, Series


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_shows_what_was_measured(name: str) -> None:
    text = (REPO_ROOT / name).read_text(encoding="utf-8")
    assert pages.with_tables(name, text) == text, "run `python -m benchmarks`, or change no figure by hand"


def test_every_line_of_a_table_was_measured() -> None:
    rows, gpu = pages.read_rows(), pages.read_gpu()
    for line in (*pages.README, *pages.ALL, *pages.TRAINING):
        assert rows[line.part, line.name]["ratio"] > 0
    assert set(gpu) >= {name for _, name in pages.GPU_LINES}


def rows(part: str, factor: float) -> list[Row]:
    """Return a row for each line of the tables that is of a part."""
    named = {line.name for line in (*pages.README, *pages.ALL, *pages.TRAINING) if line.part == part}
    return [Row(part, name, "cells/s", Series([3 * factor, 3 * factor]), Series([2.0, 2.0])) for name in sorted(named)]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository of pages alone, whose suite measures at once."""
    record = tmp_path / "docs" / "benchmarks"
    record.mkdir(parents=True)
    for name in pages.PAGES:
        (tmp_path / name).write_text((REPO_ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "RECORD", record)
    monkeypatch.setattr(pages.write_pages, "__defaults__", (tmp_path, record))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a quick run sets these for its whole process
    monkeypatch.setattr(suite.torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(suite, "PARTS", {part: lambda _, part=part: rows(part.value, 1.0) for part in suite.PARTS})
    return tmp_path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(suite.app, [str(each) for each in arguments])


def test_one_run_writes_figures_charts_and_pages(repository: Path) -> None:
    record = repository / "docs" / "benchmarks"
    (record / "memory.json").write_text("measured long ago")
    result = run("--rounds", 2)
    assert result.exit_code == 0, result.output
    assert {path.name for path in record.iterdir()} == {"results.json", "results.png"}
    assert "pages written anew: README.md, docs/speed.md" in result.output
    for name in pages.PAGES:
        text = (repository / name).read_text()
        assert text == pages.with_tables(name, text, record)
    assert (
        "| counts to tokens, cells of 2,500 genes, 1 CPU core | 3 cells/s | 1.5 × |"
        in (repository / "README.md").read_text()
    )


def test_a_part_that_is_run_alone_stands_for_itself(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--rounds", 2)
    monkeypatch.setitem(suite.PARTS, suite.Part.feeding, lambda _: rows("feeding", 5.0))
    result = run("--only", "feeding", "--only", "genes")
    assert result.exit_code == 0, result.output
    record = repository / "docs" / "benchmarks"
    assert {path.name for path in record.glob("*.json")} == {"results.json", "feeding.json", "genes.json"}
    assert {row["part"] for row in json.loads((record / "feeding.json").read_text())["rows"]} == {"feeding"}
    text = (repository / "README.md").read_text()
    assert "| training batches from disk, 2 CPU cores | 15 cells/s | 7.5 × |" in text
    assert "1 CPU core | 3 cells/s | 1.5 × |" in text


def test_a_quick_run_touches_no_page(repository: Path) -> None:
    before = (repository / "README.md").read_text()
    assert run("--quick", "--output", repository / "docs" / "benchmarks").exit_code == 2
    result = run("--quick", "--output", repository / "quick")
    assert result.exit_code == 0, result.output
    assert (repository / "quick" / "results.json").is_file()
    assert (repository / "README.md").read_text() == before


def test_what_was_not_measured_is_said() -> None:
    table = pages.readme_table({}, {})
    assert table.count("| not measured | not measured |") == len(pages.README)


def test_a_page_that_lost_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README.md must hold <!-- measured: speed -->"):
        pages.with_tables("README.md", "no table", pages.RECORD)
