# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Fingerprints of files by their content, which tell whether a file is still the one that a run began with.

Small files are read whole. Of large ones a sample is read, and size and time of change tell the rest.
"""

import hashlib
import re
from pathlib import Path

# Files of this size together, or fewer than this many, are read whole: a tenth of a second.
_WHOLE_BYTES, _WHOLE_FILES = 2**25, 1000
# Of others, so many pieces of this size are read, evenly spaced, and one at the end.
_PIECES, _PIECE_BYTES = 64, 2**16

_TEXT = re.compile(
    r"(?P<files>\d+) files, (?P<size>\d+) bytes, changed (?P<time>\d+)(?:, (?P<how>\w+) (?P<digest>\w+))?"
)
_OLD_TABLE = re.compile(r"(\d+)-(\d+)")


def content_fingerprint(*paths: str | Path) -> str:
    """Return a text that changes when one of these files, or a file of one of these folders, does.

    Raises:
        FileNotFoundError: where there is nothing.
    """
    named: dict[Path, str] = {}  # the files, and what they are called in their folders
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
    """Add pieces at evenly spaced places of all files, taken as if one stood behind the other."""
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
    """Return whether two fingerprints are of the same content.

    Args:
        before: fingerprint that was noted, also by an earlier version, which knew size and time of change alone.
        now: fingerprint of what is there.
    """
    old, new = _TEXT.fullmatch(before), _TEXT.fullmatch(now)
    table = _OLD_TABLE.fullmatch(before)
    if table is not None and new is not None:
        return table.groups() == (new["size"], new["time"])
    if old is None or new is None:
        return before == now
    if old["how"] is None:
        return now.startswith(f"{before}, ")
    if old["how"] == new["how"] == "whole":  # copied, touched: it holds the same
        return (old["files"], old["size"], old["digest"]) == (new["files"], new["size"], new["digest"])
    return before == now
