"""Whole checkpoints are recognised, and old ones removed."""

from pathlib import Path

import pytest

from tahoex1_hf.runs.checkpoints import checkpoints, is_whole, last_whole, remove_old, seal


def write(folder: Path, step: int, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "optimizer").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(step))
    (path / "optimizer" / "state").write_bytes(bytes(step))
    if whole:
        seal(path)
    return path


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        write(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("damage", ["weights", "optimizer/state", "complete.json"])
def test_a_checkpoint_cut_short_is_skipped(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = write(tmp_path, 2), write(tmp_path, 9)
    assert last_whole(tmp_path) == newer
    (newer / damage).write_bytes(b"?")
    assert not is_whole(newer)
    assert last_whole(tmp_path) == older
    assert "checkpoint-9 was cut short" in caplog.text
    (older / damage).unlink()
    assert last_whole(tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(1, None, [9]), (2, None, [6, 9]), (9, None, [2, 4, 6, 9]), (2, 2, [2, 9]), (2, 9, [6, 9]), (1, 2, [2, 9])],
)
def test_old_checkpoints_are_removed(limit: int, best: int | None, kept: list[int], tmp_path: Path) -> None:
    for step in (2, 4, 6, 9):
        write(tmp_path, step)
    write(tmp_path, 10, whole=False)
    remove_old(tmp_path, limit, None if best is None else tmp_path / f"checkpoint-{best}")
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
