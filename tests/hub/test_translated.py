"""Translations of the original's checkpoints are checked by digests, and shared with users who may only read them."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Variant
from safetensors.torch import load_file

from tahoex1_hf import TahoeX1Model
from tahoex1_hf.hub import translated as translations
from tahoex1_hf.hub.translated import translated

SMALL = Variant("a_70m_like", "flash")
NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a folder that every user may read, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="tahoex1-shared-"))
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def checkpoint(place: Path) -> Path:
    shutil.copytree(SMALL.checkpoint, place / "checkpoint")
    return place / "checkpoint"


@pytest.fixture
def home(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(place / "hf_home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "mine"))
    return place / "hf_home"


@contextmanager
def other_user(home: Path) -> Iterator[None]:
    """Be a user who may read a folder, and write nothing there; root, who may write anywhere, becomes nobody."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    folders = [path for path in (home, *home.rglob("*")) if path.is_dir() and not path.is_symlink()]
    for path in folders:
        path.chmod(0o555)
    yield
    for path in folders:
        path.chmod(0o755)


@pytest.fixture
def as_other_user(home: Path, place: Path) -> Callable[[], AbstractContextManager[None]]:
    if not hasattr(os, "geteuid"):
        pytest.skip("needs users as POSIX has them")
    home.mkdir()
    (place / "mine").mkdir()
    if os.geteuid() == 0:
        os.chown(place / "mine", NOBODY, -1)
    return lambda: other_user(home)


def embed(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return TahoeX1Model.from_pretrained(folder).eval()(**SMALL.batch("collate_bin")).pooler_output


def test_another_user_reads_what_is_there(checkpoint: Path, home: Path, as_other_user: Any) -> None:
    entry = translated(checkpoint)
    assert entry.is_relative_to(home)
    expected = embed(entry)
    with as_other_user():
        assert translated(checkpoint) == entry
        assert torch.equal(embed(checkpoint), expected)


def test_another_user_has_an_own_place(
    checkpoint: Path,
    home: Path,
    place: Path,
    as_other_user: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with as_other_user(), caplog.at_level(logging.INFO, logger="tahoex1_hf"):
        entry = translated(checkpoint)
        assert entry.is_relative_to(place / "mine")
        assert translated(checkpoint) == entry
        result = embed(checkpoint)
    assert not list(home.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "another"))
    assert any("cannot be written: translating into" in record.message for record in caplog.records)
    shared = translated(checkpoint)
    assert shared.is_relative_to(home)
    assert torch.equal(embed(shared), result)


def test_a_damaged_entry_that_another_user_owns_is_made_elsewhere(
    checkpoint: Path, home: Path, place: Path, as_other_user: Any
) -> None:
    entry = translated(checkpoint)
    (entry / "config.json").write_text("{}")
    for folder in (home, home / "tahoex1_hf", home / "tahoex1_hf" / "translated"):
        folder.chmod(0o777)  # the entry can be neither moved away nor locked by others, all the same
    with as_other_user():
        assert translated(checkpoint).is_relative_to(place / "mine")


def test_a_user_who_may_write_nowhere(
    checkpoint: Path, home: Path, place: Path, as_other_user: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setattr(translations, "_temporary", [])
    (place / "temporary").mkdir()
    (place / "temporary").chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(place / "temporary"))
    with as_other_user():
        entry = translated(checkpoint)
        assert entry.is_relative_to(place / "temporary")
        assert translated(checkpoint) == entry
        embed(checkpoint)
    shutil.rmtree(translations._temporary[0])


# Digests --------------------------------------------------------------------------------------------------


def change_quietly(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file so that its size and its time of change stay as they are."""
    before, content = path.stat(), path.read_bytes()
    new = change(content)
    assert new != content
    assert len(new) == len(content)
    path.write_bytes(new)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def as_pickle(checkpoint: Path) -> Path:
    tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    torch.save({"state": {"model": tensors}}, checkpoint / "best-model.pt")
    (checkpoint / "model.safetensors").unlink()
    return checkpoint


def swapped_genes(content: bytes) -> bytes:
    first, second, _ = (name.encode() for name in sorted(json.loads(content), reverse=True)[:3])
    return content.replace(first, b"?" * len(first)).replace(second, first).replace(b"?" * len(first), second)


def test_a_vocabulary_that_was_changed_quietly_is_read_anew(checkpoint: Path, home: Path) -> None:
    entry = translated(checkpoint)
    before = (entry / "vocab.json").read_text()
    assert translated(checkpoint) == entry
    change_quietly(checkpoint / "vocab.json", swapped_genes)
    assert translated(checkpoint) == entry
    assert (entry / "vocab.json").read_text() != before


def test_a_pickle_that_was_changed_quietly_is_converted_anew(checkpoint: Path, home: Path) -> None:
    source = as_pickle(checkpoint)
    entry = translated(source)
    before = load_file(entry / "model.safetensors")["tahoe.norm.weight"].clone()
    number = before.numpy().tobytes()
    change_quietly(source / "best-model.pt", lambda content: content.replace(number, number[4:] + number[:4]))
    assert translated(source) == entry
    assert not torch.equal(load_file(entry / "model.safetensors")["tahoe.norm.weight"], before)


def test_a_damaged_entry_is_made_anew(checkpoint: Path, home: Path) -> None:
    entry = translated(as_pickle(checkpoint))
    for name, damage in (
        ("config.json", lambda path: change_quietly(path, lambda content: content.replace(b"1", b"2", 1))),
        ("model.safetensors", lambda path: change_quietly(path, lambda content: content[:-2] + b"\x01\x02")),
        ("tokenizer_config.json", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("vocab.json", Path.unlink),
    ):
        good = (entry / name).read_bytes()
        damage(entry / name)
        assert translated(checkpoint) == entry
        assert (entry / name).read_bytes() == good


def test_what_appears_later_counts(checkpoint: Path, home: Path) -> None:
    """A Hub snapshot may be completed after a part of it was loaded; its place in the cache is the same."""
    name = Path("models--a--b") / "snapshots" / "0"
    source = as_pickle(checkpoint)
    entry = translated(source, name)
    stamp = entry.stat().st_ino
    (source / "drug_to_id_pad.json").write_text('{"<pad>": 0}')  # it has no drug encoder, and does not read it
    translated(source, name)
    assert entry.stat().st_ino != stamp
    stamp = entry.stat().st_ino
    translated(source, name)
    assert entry.stat().st_ino == stamp


def test_large_files_are_not_read_again_while_they_are_the_same(
    checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = as_pickle(checkpoint)
    entry = translated(source)
    read: list[str] = []
    digest = translations._digest
    monkeypatch.setattr(translations, "_digest", lambda path, header: read.append(path.name) or digest(path, header))
    monkeypatch.setattr(translations, "_LARGE", 100_000)
    assert translated(source) == entry
    assert "vocab.json" in read
    assert not {"best-model.pt", "model.safetensors"} & set(read)
    shutil.copy2(source / "best-model.pt", source / "copy")
    os.replace(source / "copy", source / "best-model.pt")  # the same content, size and time, in another place
    assert translated(source) == entry
    assert "best-model.pt" in read
