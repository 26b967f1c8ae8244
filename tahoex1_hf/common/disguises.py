# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tell what a file is when it is not what its name says: what a clone without Git LFS or a broken download leaves."""

from contextlib import suppress
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_LONGEST = 512  # bytes that are looked at


def disguise(path: str | Path) -> str | None:
    """Say what a file is, and what to do about it, where it cannot be the file that anybody wanted.

    Args:
        path: path of a file; of any other path nothing is known.

    Returns:
        The rest of a sentence that begins with the file's name; None for a file that may be what its name says.
    """
    beginning = None
    with suppress(OSError, ValueError):
        if Path(path).is_file():
            with open(path, "rb") as file:
                beginning = file.read(_LONGEST)
    if beginning is None:
        return None
    if beginning.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself: fetch it with git lfs pull, or download it again."
    if beginning.lstrip().lower().startswith(_PAGES):
        return "is a web page, not the file itself, perhaps an error that a server sent: download it again."
    if not beginning:
        return "is empty: copy or download it again."
    if len(beginning) == _LONGEST and not any(beginning):
        return "begins with zeros, as files do whose download or copy was stopped: copy or download it again."
    return None
