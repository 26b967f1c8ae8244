"""Files appear whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tahoex1_hf.common.files import WholeFile, WholeFolder, put_back, whole_folder, write_json


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_names_the_file(tmp_path: Path, number: int) -> None:
    target = tmp_path / "out.txt"
    with pytest.raises(OSError, match=rf"^\[Errno {number}\] .*out\.txt'$") as caught, WholeFile(target):
        raise OSError(number, "written by a library")
    assert ("make room, and give the command again" in str(caught.value)) == (number == errno.ENOSPC)
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match=r"^\[Errno 104\] reset$"), WholeFile(target):
        raise OSError(errno.ECONNRESET, "reset")  # of what is read there, not of the file
    with pytest.raises(OSError, match=r"^\[Errno 28\] full: 'another'$"), WholeFile(target):
        raise OSError(errno.ENOSPC, "full", "another")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is done to the disk, in order: names of synced files and folders, and `replace`."""
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def watched_fsync(handle: int) -> None:
        done.append(os.path.realpath(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def watched_replace(source: Path, target: Path) -> None:
        done.append("replace")
        replace(source, target)

    def watched_rename(source: Path, target: Path) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(os, "rename", watched_rename)
    return done


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with WholeFile(path) as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path  # so that moving it is not copying
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the names of open files in /proc")
def test_file_and_folder_are_synced_around_the_move(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "out.txt"
    file = WholeFile(path)
    with file as partial:
        partial.write_text("new")
    assert synced == [str(file.partial), "replace", str(tmp_path)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")

    def write_half() -> None:
        with WholeFile(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_move_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), WholeFile(tmp_path / "folder") as partial:
        partial.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_before_the_first_byte_is_the_one_that_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing yet"), WholeFile(tmp_path / "out.txt"):
        raise ValueError("nothing yet")


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"value": "old"})
    script = f"""
        import os, signal
        from pathlib import Path
        from tahoex1_hf.common import files
        real = os.fsync
        def killed(handle):
            real(handle)
            os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = killed
        files.write_json(Path({str(path)!r}), {{"value": "new" * 10_000}})
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"value": "old"}
    write_json(path, {"value": "newer"})  # the killed process left nothing that gets in the way
    assert json.loads(path.read_text()) == {"value": "newer"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_a_plain_write(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "out.json", {})
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    for name in ("out.json", "plain"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with WholeFile(path) as first:
        with WholeFile(path) as second:
            assert first != second
            second.write_text("second")
        first.write_text("first")
    assert path.read_text() == "first"


def test_json_keeps_its_form(tmp_path: Path) -> None:
    write_json(tmp_path / "out.json", {"b": [1], "a": "é"})
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == '{\n "b": [\n  1\n ],\n "a": "\\u00e9"\n}'


# Folders --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the names of open files in /proc")
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "new" / "folder"
    with whole_folder(path) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("content")
        assert not path.exists()
    assert (path / "sub" / "file").read_text() == "content"
    assert list(path.parent.iterdir()) == [path]
    assert {f"{partial}/sub/file", f"{partial}/sub", str(partial)} == set(synced[: synced.index("rename")])
    assert synced[-1] == str(path.parent)


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_folder(tmp_path / "folder") as partial:
            (partial / "file").write_text("half")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        write_half()
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "file").write_text("first")
    with pytest.raises(OSError, match="folder"), whole_folder(path) as partial:
        (partial / "file").write_text("second")
    assert (path / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "store"
    place.mkdir()
    (place / "old").write_text("1")
    abandoned = WholeFolder(place, replace=True)
    (abandoned.partial / "half").write_text("2")
    abandoned.discard()
    assert [path.name for path in place.iterdir()] == ["old"]
    folder = WholeFolder(place, replace=True)
    (folder.partial / "new").write_text("3")
    folder.finish()
    assert [path.name for path in place.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    other = WholeFolder(place)
    with pytest.raises(OSError, match="not empty"):
        other.finish()
    other.discard()
    assert [path.name for path in place.iterdir()] == ["new"]


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "store"
    place.mkdir()
    (place / "old").write_text("1")
    real = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return real(self, target)

    folder = WholeFolder(place, replace=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):  # as a kill, after which nothing is tidied up
            folder.finish()
    assert not place.exists()
    put_back(place)
    assert [path.name for path in place.iterdir()] == ["old"]
    folder.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    # A kill while the old one is removed leaves a part of it.
    (tmp_path / ".store.replaced" / "rest").mkdir(parents=True)
    put_back(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    put_back(tmp_path / "nothing")


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "store"
    place.mkdir()
    (place / "old").write_text("1")
    folder, real = WholeFolder(place, replace=True), Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self == folder.partial:
            raise PermissionError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError, match="no"):
        folder.finish()
    folder.discard()
    assert [path.name for path in place.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
