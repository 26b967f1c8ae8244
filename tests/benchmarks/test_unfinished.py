"""A run of the benchmarks that was stopped goes on with the parts that are missing, on the same machine and code."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as suite
from benchmarks.measuring import Row, Series, Suite
from benchmarks.unfinished import NAME, Measured, Unfinished

PARTS = ("tokenizing", "embedding", "feeding")
IDENTITY = {"machine": {"cores": 2}, "code": "a"}


def row(part: str, value: float) -> Row:
    ours = Series([value, value], [5.0, 6.0], {"copy": [0.5, 0.25]})
    return Row(part, f"row of {part}", "cells/s", ours, Series([2.0, 2.0]), "remark", details={"n": 1})


class Measuring:
    """Stands for the parts; one of them fails as often as is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.done: list[str] = []
        self.fails = ""
        found = {suite.Part(part): lambda given, part=part: self.measure(given, part) for part in PARTS}
        monkeypatch.setattr(suite, "PARTS", found)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a quick run sets these for its whole process
        monkeypatch.setattr(suite.torch, "set_num_threads", lambda number: None)

    def measure(self, given: Suite, part: str) -> list[Row]:
        if part == self.fails:
            raise KeyboardInterrupt
        self.done.append(part)
        given.limits["copy 1"].seen.append(float(len(part)))
        return [row(part, float(len(self.done)))]


def run(folder: Path, *arguments: Any) -> Any:
    return CliRunner().invoke(suite.app, ["--quick", "--output", str(folder), *arguments])


def rows_of(folder: Path) -> list[Any]:
    return json.loads((folder / "results.json").read_text())["rows"]


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Measuring(monkeypatch)
    whole = run(tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert parts.done == [*PARTS]
    parts.done, parts.fails = [], "feeding"
    assert run(tmp_path / "stopped").exit_code
    assert parts.done == ["tokenizing", "embedding"]
    assert not (tmp_path / "stopped" / "results.json").exists()
    parts.fails = ""
    assert run(tmp_path / "stopped").exit_code == 0
    assert parts.done == [*PARTS]
    assert not (tmp_path / "stopped" / NAME).exists()
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    report = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert list(report["cpu_seconds_of_parts"]) == [*PARTS]


def test_what_was_measured_otherwise_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Measuring(monkeypatch)
    parts.fails = "embedding"
    run(tmp_path)
    parts.fails = ""
    refused = run(tmp_path, "--rounds", "5")
    assert refused.exit_code == 2
    assert "another rounds" in " ".join(refused.output.replace("│", "").split())
    assert parts.done == ["tokenizing"]
    assert run(tmp_path, "--rounds", "5", "--restart").exit_code == 0
    assert parts.done == ["tokenizing", *PARTS]
    Unfinished(tmp_path, IDENTITY, restart=True)
    with pytest.raises(ValueError, match="another code: pass --restart"):
        Unfinished(tmp_path, {**IDENTITY, "code": "b"}, restart=False)


def test_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    alone = Row("embedding", "bfloat16", not_measured="no instructions")
    measured = Measured([row("embedding", 3.5), alone], {"copy 1": [1.0]}, 2.5, 4.5)
    Unfinished(tmp_path, IDENTITY, restart=False).add("embedding", measured)
    assert Unfinished(tmp_path, IDENTITY, restart=False).parts == {"embedding": measured}
