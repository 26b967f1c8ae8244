# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Fingerprints of the content of files, which show whether a file has changed since a run began.

Small files are read completely. Of large files only parts are read, and their size and the time of their last change
must agree, too.
"""

import hashlib
import re
from pathlib import Path

# Files are read completely, in about a tenth of a second, up to this total size and this number of files.
_WHOLE_BYTES, _WHOLE_FILES = 2**25, 1000
# Otherwise, this many evenly spaced pieces of this size are read, and one at the end.
_PIECES, _PIECE_BYTES = 64, 2**16

_TEXT = re.compile(
    r"(?P<files>\d+) files, (?P<size>\d+) bytes, changed (?P<time>\d+)(?:, (?P<how>\w+) (?P<digest>\w+))?"
)
_OLD_TABLE = re.compile(r"(\d+)-(\d+)")


def content_fingerprint(*paths: str | Path) -> str:
    """Return a text that changes when one of these files, or a file in one of these folders, changes.

    Raises:
        FileNotFoundError: If a path does not exist.
    """
    named: dict[Path, str] = {}  # file -> its path inside its folder
    for path in map(Path, paths):
        inside = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else ()
        named |= {file: str(file.relative_to(path)) for file in sorted(inside)} if path.is_dir() else {path: ""}
    files = list(named)
    states = [file.stat() for file in files]
    size, changed = sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)
    digest = hashlib.blake2b(digest_size=16)
    whole = size <= _WHOLE_BYTES and len(files) <= _WHOLE_FILES
    if whole:
        for file in files:
            digest.update(f"{named[file]}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
    else:
        _add_sample(digest, files, [state.st_size for state in states])
    how = "whole" if whole else "sample"
    return f"{len(files)} files, {size} bytes, changed {changed}, {how} {digest.hexdigest()}"


def _add_sample(digest: "hashlib.blake2b", files: list[Path], sizes: list[int]) -> None:
    """Add pieces of the files to the digest, at evenly spaced places of the files joined end to end."""
    total, at, before = sum(sizes), 0, 0
    places = sorted({number * total // _PIECES for number in range(_PIECES)} | {max(total - _PIECE_BYTES, 0)})
    for file, size in zip(files, sizes, strict=True):
        stop = at
        while stop < len(places) and places[stop] < before + size:
            stop += 1
        if stop > at:
            with file.open("rb") as stream:
                for place in places[at:stop]:
                    stream.seek(place - before)
                    digest.update(stream.read(_PIECE_BYTES))
        at, before = stop, before + size


def agrees(before: str, now: str) -> bool:
    """Return whether two fingerprints belong to the same content.

    Args:
        before: Fingerprint that was recorded; that of an earlier version may hold only size and time of change.
        now: Fingerprint of the present files.
    """
    old, new = _TEXT.fullmatch(before), _TEXT.fullmatch(now)
    table = _OLD_TABLE.fullmatch(before)
    if table is not None and new is not None:
        return table.groups() == (new["size"], new["time"])
    if old is None or new is None:
        return before == now
    if old["how"] is None:
        return now.startswith(f"{before}, ")
    if old["how"] == new["how"] == "whole":  # copied or touched: the content is the same
        return (old["files"], old["size"], old["digest"]) == (new["files"], new["size"], new["digest"])
    return before == now
