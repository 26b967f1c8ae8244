# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Write a folder whole or not at all, and describe the files in it."""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"


def check_destination(destination: Path) -> None:
    """Raise FileExistsError where `destination` exists and is not an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already: choose another destination, or remove it.")


@contextmanager
def workspace(destination: Path) -> Iterator[Path]:
    """Make a folder beside `destination` to work in, and move its sub-folder `result` to `destination` at the end.

    Remains of killed processes are removed first.
    """
    check_destination(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(destination)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", suffix=".partial", dir=destination.parent))
    lock = FileLock(folder / _LOCK)
    try:
        with lock:
            result = folder / "result"
            result.mkdir(mode=0o755)
            yield folder
            check_destination(destination)
            if destination.exists():
                destination.rmdir()
            result.rename(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear_stale(destination: Path) -> None:
    for folder in destination.parent.glob(f".{destination.name}-*.partial"):
        if not (folder / _LOCK).exists() and time.time() - folder.stat().st_mtime < 60:
            continue  # another process has made it and is about to lock it
        try:
            with FileLock(folder / _LOCK, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:
            continue  # in use by a running process
        shutil.rmtree(folder, ignore_errors=True)


def describe_files(files: Mapping[str, Path]) -> dict[str, dict[str, object]]:
    """Return the size in bytes and the SHA-256 of each file, by its key in `files`."""
    described: dict[str, dict[str, object]] = {}
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described[name] = {"size": path.stat().st_size, "sha256": digest}
    return described


def link_or_copy(source: Path, destination: Path) -> None:
    """Make a symbolic link to a file, or a copy where the file system has no links."""
    try:
        destination.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, destination)
