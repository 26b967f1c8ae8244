"""The check of a machine with a GPU works, in tiny sizes on a CPU; nothing is said about speed."""

import json
import sys
from pathlib import Path

import forked
import pytest
import torch

from benchmarks import child, gpu_cost, gpu_right
from benchmarks.gpu_measuring import Check, RandomCells, relative_error


@pytest.fixture
def run(tmp_path: Path) -> Check:
    return Check(torch.device("cpu"), tiny=True, path=tmp_path / "rows.jsonl", seconds=600)


def kept(run: Check) -> list[dict]:
    return [json.loads(line) for line in run.path.read_text().splitlines()]


def test_what_is_right(run: Check) -> None:
    gpu_right.training(run, "observed_or_self", 4, [70, 33, 9])
    gpu_right.embeddings(run)
    rows = kept(run)
    assert len(rows) == 3 + 2
    for row in rows:
        if "failed" in row:
            raise RuntimeError(row["failed"])
    assert all(row["ok"] for row in rows), rows


def test_what_is_wrong_is_found(run: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = RandomCells.packed

    def with_other_targets(cells: RandomCells, device: torch.device) -> dict[str, torch.Tensor]:
        row = packed(cells, device)
        return row | {"target_mask": row["target_mask"].roll(1, dims=1)}

    monkeypatch.setattr(RandomCells, "packed", with_other_targets)
    gpu_right.training(run, "observed_or_self", 4, [20, 12])
    assert [(row["ok"], "failed" in row) for row in kept(run)] == [(False, False)] * 3
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


def test_every_cost_is_measured(run: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command runs as a process of its own, the second as a fork, which need not import everything again."""
    whole, commands = child.python, []

    def first_whole(*arguments: str) -> child.Run:
        commands.append(arguments)
        if len(commands) == 1:
            return whole(*arguments)
        done = forked.run([sys.executable, *arguments], cwd=child.ROOT)
        return child.Run(done.returncode, 0, 0, 0, done.stdout + done.stderr)

    monkeypatch.setattr(child, "python", first_whole)
    gpu_cost.check(run)
    assert len(commands) == 2
    rows = kept(run)
    assert not [row for row in rows if row.get("ok") is False or "skipped" in row], rows
    rates = [row["what"] for row in rows if row.get("cells_per_s", 0) > 0]
    assert len(rates) == 1 + 4 + 7 + 2


def test_an_interrupted_check_begins_nothing_more(run: Check) -> None:
    run.seconds = 0
    gpu_cost.train(run, "70M", "full", [30])
    assert [row.get("skipped") for row in kept(run)] == ["no time left"]
    with run.attempt("this"):
        raise RuntimeError("out of memory")
    assert kept(run)[-1] == {"what": "this", "ok": False, "failed": "RuntimeError: out of memory"}
