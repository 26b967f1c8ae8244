# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors that name the file they come from, whichever library found something wrong with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path

from tahoex1_hf.common.disguises import disguise

# Longest text of another library's error that is repeated in ours.
_LONGEST = 300


def in_short(error: BaseException) -> str:
    """Return the kind of an error and the first line of its text, or two where the first announces the second."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for what it says to hold"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    name = type(error).__name__
    return f"{name}: {text[:_LONGEST]}" if text else name


def is_foreseen(error: BaseException) -> bool:
    """Return whether an error tells a user what is wrong, and not that a program stumbled over what it read."""
    if isinstance(error, ImportError):
        return True
    if type(error) is OSError or isinstance(error, BadGzipFile):  # so h5py and pyarrow, too, tell of damaged content
        return error.errno is not None
    # Other libraries' kinds of ValueError tell of the place in a text at which they stumbled.
    own = type(error) is ValueError or type(error).__module__.startswith("tahoex1_hf")
    return isinstance(error, OSError) or (isinstance(error, ValueError) and own)


def named(error: Exception, *paths: str | Path) -> Exception:
    """Return an error whose text names the file, or one of the files, that it comes from.

    Args:
        error: error that arose while they were read.
        *paths: files or folders.

    Returns:
        Where one of the files is something else, such as a Git LFS pointer, a `ValueError` that says so. Otherwise the
        error itself where it is foreseen and names one of them, or another `OSError`, or a `ValueError`.
    """
    for path in paths:
        if told := disguise(path):
            return ValueError(f"{path} {told}")
    where = ", ".join(str(path) for path in paths)
    if not is_foreseen(error):
        return ValueError(f"{where} cannot be read ({in_short(error)}): it is damaged, or not what its name says.")
    if isinstance(error, ImportError) or any(Path(path).name in str(error) for path in paths):
        return error
    # Errors of other libraries may not be made from a text alone.
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return kind(f"{where}: {error}") if isinstance(error, OSError) else ValueError(f"{where}: {error}")


@contextmanager
def reading(*paths: str | Path) -> Iterator[None]:
    """Have every error in the block name these files; what no one foresaw says that they are damaged.

    Raises:
        ValueError: for content that cannot be read.
        OSError: for a file that the system cannot give.
    """
    try:
        yield
    except Exception as error:
        better = named(error, *paths)
        if better is error:
            raise
        raise better from error
