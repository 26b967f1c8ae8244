"""Fingerprints by content, of small and large files and folders, and those of earlier versions."""

import os
from pathlib import Path
from typing import Any

import pytest
from cells import NUM_GENES, make_cells, write_cells, write_vocab
from helpers import tiny_config, tiny_model

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer
from tahoex1_hf.cells import fingerprint
from tahoex1_hf.cells.fingerprint import agrees, content_fingerprint
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.embedding import files as embed_files
from tahoex1_hf.embedding.shards import ShardFolder


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
    for place in (0, 31 * 1000, size - 1):
        content = bytearray(size)
        content[place : place + 16] = b"x" * min(16, size - place)
        assert not agrees(first, write(tmp_path / "a", bytes(content))), place


@pytest.mark.parametrize("whole", [True, False])
def test_folders(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(fingerprint, "_WHOLE_FILES", 0)
        monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 16)
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


# A file that is replaced while it is embedded ----------------------------------------------------------


Parts = tuple[TahoeX1Model, TahoeX1Tokenizer]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    tokenizer = TahoeX1Tokenizer(str(write_vocab(tmp_path)))
    return tiny_model(tiny_config(vocab_size=NUM_GENES + 3), TahoeX1Model), tokenizer


@pytest.mark.parametrize("ending", [".h5ad", ".npy"])
def test_a_file_that_is_replaced_during_the_run_is_an_error(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Also one of the same size and time: its counts are not copied beside the other's embeddings."""
    source = write_cells(make_cells(40), tmp_path / "cells", "dense")
    other = write_cells(make_cells(40, seed=1), tmp_path / "other", "dense")
    assert source.stat().st_size == other.stat().st_size
    os.utime(other, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    embedded = embed_files._Run.embed

    def embed_and_replace(*arguments: Any) -> None:
        embedded(*arguments)
        os.replace(other, source)

    monkeypatch.setattr(embed_files._Run, "embed", embed_and_replace)
    with pytest.raises(ValueError, match=r"cells\.h5ad has changed since it was opened.*nothing is written"):
        embed_files.embed_files(source, tmp_path / f"out{ending}", *parts, progress=False)
    assert not (tmp_path / f"out{ending}").exists()


def test_a_run_that_an_earlier_version_began_is_resumed(tmp_path: Path, parts: Parts) -> None:
    source = write_cells(make_cells(10), tmp_path / "cells", "csr")
    now = open_cells(source, parts[1]).fingerprint
    folder = ShardFolder(str(tmp_path / "shards"))
    folder.claim({"cells": [["a", now.partition(", whole")[0], 10]]}, restart=False, formerly={})
    folder.claim({"cells": [["a", now, 10]]}, restart=False, formerly={})
    with pytest.raises(ValueError, match=r"other settings \(cells\)"):
        folder.claim(
            {"cells": [["a", now.replace("bytes, changed 1", "bytes, changed 2"), 10]]}, restart=False, formerly={}
        )
