# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Finding local files that folders and globs stand for."""

import glob
import os
from collections.abc import Callable, Iterable
from pathlib import Path

ZARR_MARKS = (".zgroup", "zarr.json", ".zattrs")


def is_zarr_store(path: Path) -> bool:
    """Return whether a folder is a zarr store."""
    return path.is_dir() and any((path / mark).is_file() for mark in ZARR_MARKS)


def expand_paths(paths: Iterable[str], is_wanted: Callable[[Path], bool], what: str) -> list[str]:
    """Return the files and folders that `is_wanted` accepts: named, matched by a glob, or in a folder.

    Args:
        paths: files, folders (searched at any depth) and globs.
        is_wanted: function that tells the files, or folders that count as one file, of the kind that is wanted.
        what: name of this kind, for the message.

    Returns:
        The paths, sorted, each once.

    Raises:
        FileNotFoundError: where a path stands for none.
    """
    found: set[str] = set()
    for text in paths:
        named = [text] if os.path.exists(text) else glob.glob(text, recursive=True)
        here = [hit for name in named for hit in _search(Path(name), is_wanted)]
        if not here:
            missing = "does not exist" if not named else f"holds no {what}"
            raise FileNotFoundError(f"{text} {missing}: name {what}, a folder with them or a glob.")
        found.update(here)
    return sorted(found)


def _search(path: Path, is_wanted: Callable[[Path], bool]) -> list[str]:
    if is_wanted(path):
        return [str(path)]
    if not path.is_dir() or is_zarr_store(path):
        return []
    return [hit for entry in sorted(path.iterdir()) if entry.name[0] != "." for hit in _search(entry, is_wanted)]


def local_fingerprint(path: str | Path) -> str:
    """Return the size and time of change of a file, or of all files of a folder."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = [file.stat() for file in files]
    size, changed = sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)
    return f"{len(files)} files, {size} bytes, changed {changed}"
