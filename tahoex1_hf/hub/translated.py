# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cache the translations of checkpoints of the original, and renew those whose checkpoints have changed.

An entry lists in `translated.json` the files that it was made from and the files that it consists of, with the digest
of each, and is used only while all of them are the same. Entries are beside the Hub's cache, where those of other
users are read, too; if nothing may be written there, new ones go into the user's own cache.
"""

import atexit
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants

from tahoex1_hf.common.files import WholeFolder, write_json
from tahoex1_hf.original.convert import translate_folder
from tahoex1_hf.original.files import (
    COLLATOR_CONFIG,
    DRUG_FINGERPRINTS,
    DRUG_TABLE,
    MODEL_CONFIG,
    PICKLE,
    SAFETENSORS,
    VOCAB,
)

logger = logging.getLogger(__name__)

VERSION = 2  # raised when the content of entries changes; version 1 wrote converted copies
_RECORD = "translated.json"
_SETTINGS = (MODEL_CONFIG, COLLATOR_CONFIG, VOCAB, DRUG_TABLE, DRUG_FINGERPRINTS)
_temporary: list[Path] = []  # the temporary folder of this process, if it has made one
_LARGE = 2**25  # number of bytes from which a file is not read again while its times and inode are the same


def translated(folder: Path, name: Path | None = None) -> Path:
    """Return the folder with the translation of a checkpoint of the original, which is made once for all processes.

    Args:
        folder: Folder in the original's layout.
        name: Path in the cache; by default made from the folder's name and the state of its files.

    Raises:
        FileNotFoundError, ValueError: As for `open_original`.
    """
    name = _name_of(folder) if name is None else name
    for root in (*_roots(), *_temporary):
        if _is_current(root / name, folder):
            return root / name
    root = next((root for root in _roots() if _can_make(root / name)), None) or _temporary_root()
    if root != _shared_root():
        logger.info("%s cannot be written: translating into %s instead.", _shared_root(), root)
    return _make(root / name, folder)


def _name_of(folder: Path) -> Path:
    files = [folder / each for each in sorted((*_SETTINGS, SAFETENSORS, PICKLE)) if (folder / each).is_file()]
    stats = [(path.resolve(), path.stat()) for path in files]
    text = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    key = hashlib.sha256(f"{VERSION}\n{text}".encode()).hexdigest()[:16]
    return Path(f"{folder.resolve().name}-{key}")


# Places -------------------------------------------------------------------------------------------------


def _shared_root() -> Path:
    return Path(constants.HF_HOME) / "tahoex1_hf" / "translated"


def _roots() -> Iterator[Path]:
    yield _shared_root()
    with suppress(RuntimeError):  # for a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tahoex1_hf" / "translated"


def _temporary_root() -> Path:
    """Return a folder that lasts as long as this process, for a user who may write nowhere else."""
    if not _temporary:
        _temporary.append(Path(tempfile.mkdtemp(prefix="tahoex1_hf-")))
        atexit.register(shutil.rmtree, _temporary[0], ignore_errors=True)
    return _temporary[0]


def _can_make(entry: Path) -> bool:
    """Return whether an entry, and the lock beside it, can be written or replaced."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=entry.parent):
            pass
        lock = _lock_of(entry)
        ours = not entry.exists() or not hasattr(os, "geteuid") or os.geteuid() in (0, entry.stat().st_uid)
        effective = os.access in os.supports_effective_ids
        return ours and (not lock.exists() or os.access(lock, os.W_OK, effective_ids=effective))
    except OSError:
        return False


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


# Entries ------------------------------------------------------------------------------------------------


def _make(entry: Path, source: Path) -> Path:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(entry)):
        if _is_current(entry, source):  # another process made it while this one waited
            return entry
        logger.info("Translating the settings of %s into %s", source, entry)
        made = WholeFolder(entry, replace=True)
        try:
            read = translate_folder(source, made.partial)
            write_json(made.partial / _RECORD, _record(source, read, made.partial))
            made.finish()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} It cannot be loaded without that file.") from error
        finally:
            made.discard()
    return entry


def _record(source: Path, read: dict[str, Path], entry: Path) -> dict[str, Any]:
    """Return the record of the files that an entry was made from, and of those that it consists of."""
    linked = (entry / SAFETENSORS).is_symlink()
    # What is made of linked weights follows from their header: names, shapes and types.
    made_from = {
        path.relative_to(source).as_posix(): _described(path, header=linked and path.name == SAFETENSORS)
        for path in read.values()
    }
    files = {path.name: _described(path) for path in entry.iterdir() if not path.is_symlink()}
    present = _present(source)
    return {"version": VERSION, "is_linked": linked, "present": present, "made_from": made_from, "files": files}


def _present(source: Path) -> list[str]:
    """Return the names of a checkpoint's optional files that exist."""
    return [name for name in (*_SETTINGS, SAFETENSORS) if (source / name).is_file()]


def _is_current(entry: Path, source: Path) -> bool:
    """Return whether an entry is complete, and was made from the present files of a checkpoint."""
    try:
        record = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
        made_from, files = record["made_from"], record["files"]
        return (
            record["version"] == VERSION
            and record["present"] == _present(source)
            and (not record["is_linked"] or (entry / SAFETENSORS).samefile(source / SAFETENSORS))
            and all(_is_same(source / name, described) for name, described in made_from.items())
            and all(_is_same(entry / name, described) for name, described in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # the entry does not exist, is damaged, or may not be read


def _described(path: Path, header: bool = False) -> dict[str, Any]:
    """Return the state of a file, and the digest of its content, or of the header of a safetensors file alone."""
    return {"sha256": _digest(path, header), "header": header, "state": _state(path)}


def _state(path: Path) -> list[int]:
    """Return numbers that change with a file's content; nobody can set the third, the time of change, back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _is_same(path: Path, described: dict[str, Any]) -> bool:
    state, header = _state(path), bool(described["header"])
    if not header and state[0] >= _LARGE and state == described["state"]:
        return True
    return state[0] == described["state"][0] and _digest(path, header) == described["sha256"]


def _digest(path: Path, header: bool) -> str:
    with path.open("rb") as file:
        if not header:
            return hashlib.file_digest(file, "sha256").hexdigest()
        length = file.read(8)
        return hashlib.sha256(length + file.read(struct.unpack("<Q", length)[0])).hexdigest()
