"""One run at a time writes to a place."""

from pathlib import Path

import pytest
from filelock import FileLock

from tahoex1_hf.common.locks import RunLock


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    with RunLock(path, "out.npy", "output"):
        assert path.exists()
        second = RunLock(path, "out.npy", "output")
        with pytest.raises(ValueError, match=r"^out\.npy: another run is writing there; .* another output\.$"):
            second.acquire()
        second.release()  # it holds nothing
        assert path.exists()
    assert not path.exists()
    with second:
        assert path.exists()


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    with pytest.raises(KeyError), RunLock(path, "out", "output"):
        raise KeyError
    with RunLock(path, "out", "output"):
        pass


def test_the_file_of_another_run_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may take the lock as soon as it is free, so the file goes before that."""
    path, seen = tmp_path / "out.lock", []
    release = FileLock.release

    def watched(self: FileLock, force: bool = False) -> None:
        seen.append(path.exists())
        release(self, force)

    monkeypatch.setattr(FileLock, "release", watched)
    with RunLock(path, "out", "output"):
        pass
    assert seen[:1] == [False]


def test_no_lock_does_nothing() -> None:
    with RunLock(None, "s3://bucket/out", "output"), RunLock(None, "s3://bucket/out", "output"):
        pass
