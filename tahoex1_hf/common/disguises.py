# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Recognise files that are not what their names say, such as those of a clone without Git LFS or a broken download."""

from contextlib import suppress
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_LONGEST = 512  # number of bytes to look at


def disguise(path: str | Path) -> str | None:
    """Describe a file that cannot be what its name says, and what to do about it.

    Args:
        path: Path of the file; for a folder, or a file that cannot be read, the result is None.

    Returns:
        The rest of a sentence that begins with the file's name; None if the file may be what its name says.
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
