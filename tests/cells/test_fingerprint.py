"""Fingerprints by content, of small and large files and folders, and those of earlier versions."""

import os
from pathlib import Path

import pytest

from tahoex1_hf.cells import fingerprint
from tahoex1_hf.cells.fingerprint import agrees, content_fingerprint


def write(path: Path, content: bytes, time: int = 10**18) -> str:
    path.write_bytes(content)
    os.utime(path, ns=(time, time))
    return content_fingerprint(path)


@pytest.mark.parametrize("whole", [True, False])
def test_another_content_of_the_same_size_and_time(
    tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 0)
    first = write(tmp_path / "a", b"0" * 1000)
    assert agrees(first, write(tmp_path / "a", b"0" * 1000))
    assert not agrees(first, write(tmp_path / "a", b"0" * 999 + b"1"))
    assert not agrees(first, write(tmp_path / "a", b"0" * 1001))
    assert agrees(first, write(tmp_path / "a", b"0" * 1000, time=2 * 10**18)) == whole


def test_a_sample_reads_all_parts_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 16)
    size = 64 * 1000
    first = write(tmp_path / "a", bytes(size))
    for place in (0, size // 63 * 31, size - 1):
        content = bytearray(size)
        content[place : place + 16] = b"x" * min(16, size - place)
        assert not agrees(first, write(tmp_path / "a", bytes(content))), place


@pytest.mark.parametrize("whole", [True, False])
def test_folders(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(fingerprint, "_WHOLE_FILES", 0)
    for name in "abc":
        write(tmp_path / name, name.encode() * 100)
    first = content_fingerprint(tmp_path)
    write(tmp_path / "b", b"b" * 99 + b"c")
    assert not agrees(first, content_fingerprint(tmp_path))
    write(tmp_path / "b", b"b" * 100)
    assert agrees(first, content_fingerprint(tmp_path))
    (tmp_path / "c").rename(tmp_path / "d")
    assert agrees(first, content_fingerprint(tmp_path)) == (not whole)


def test_fingerprints_of_earlier_versions(tmp_path: Path) -> None:
    now = write(tmp_path / "a", b"0" * 1000)
    for before in (f"1 files, 1000 bytes, changed {10**18}", f"1000-{10**18}"):
        assert agrees(before, now)
        assert not agrees(before.replace("1000", "1001", 1), now)
    assert agrees("etag", "etag")
    assert not agrees("etag", now)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        content_fingerprint(tmp_path / "a")
