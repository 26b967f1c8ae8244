# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Make errors name the file that they are about, whichever library raises them."""

from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path

from tahoex1_hf.common.disguises import disguise

# Longest text of another library's error that is repeated in ours.
_LONGEST = 300


def in_short(error: BaseException) -> str:
    """Return the kind of an error and the first line of its text; two lines if the first ends with a colon."""
    if isinstance(error, MemoryError):
        return "what it declares does not fit into memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    name = type(error).__name__
    return f"{name}: {text[:_LONGEST]}" if text else name


def is_foreseen(error: BaseException) -> bool:
    """Return whether an error's text is meant for the user; others show where a program failed on bad content."""
    if isinstance(error, ImportError):
        return True
    if type(error) is OSError or isinstance(error, BadGzipFile):  # h5py and pyarrow raise it for damaged content, too
        return error.errno is not None
    # Other libraries' subclasses of ValueError name a position in the content, not what is wrong.
    own = type(error) is ValueError or type(error).__module__.startswith("tahoex1_hf")
    return isinstance(error, OSError) or (isinstance(error, ValueError) and own)


def named(error: Exception, *paths: str | Path) -> Exception:
    """Return an error that names the file that it is about, or all files if that is not known.

    Args:
        error: Error that was raised while the files were read.
        *paths: Files or folders.

    Returns:
        A `ValueError` if one of the files is not what its name says, such as a Git LFS pointer, or if its content is
        damaged. Otherwise `error` itself if it names a file already, or one of its kind that does.
    """
    for path in paths:
        if told := disguise(path):
            return ValueError(f"{path} {told}")
    where = ", ".join(str(path) for path in paths)
    if not is_foreseen(error):
        return ValueError(f"{where} cannot be read ({in_short(error)}): it is damaged, or not what its name says.")
    if isinstance(error, ImportError) or any(Path(path).name in str(error) for path in paths):
        return error
    # Not the error's own class: those of other libraries may need more arguments than a text.
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return kind(f"{where}: {error}") if isinstance(error, OSError) else ValueError(f"{where}: {error}")


@contextmanager
def reading(*paths: str | Path) -> Iterator[None]:
    """Make every error of the block name these files, and those that are not meant for the user say "damaged".

    Raises:
        ValueError: If the content cannot be read.
        OSError: If the system cannot open or read a file.
    """
    try:
        yield
    except Exception as error:
        better = named(error, *paths)
        if better is error:
            raise
        raise better from error
