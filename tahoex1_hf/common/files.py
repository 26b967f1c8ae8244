# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that appear whole or not at all, even if the process or the machine is stopped."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

# Partial files are named after the machine and the process that write them.
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_PARTIAL = re.compile(r"\..+\.(?:(?P<machine>[0-9a-f]{8})-)?(?P<process>\d{1,9})-[0-9a-f]{8}\.partial")
_LONG = 24 * 3600.0  # seconds without a change after which a partial file of an unknown machine counts as left over
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # errors of writing
_cleared: set[str] = set()  # folders from which this process has removed leftovers


class WholeFile:
    """A file that is written beside its place; `finish` moves it there and replaces an earlier file.

    As a context manager, it gives the path to write to, finishes when the block ends, and discards on an error:

        with WholeFile("table.csv") as partial:
            table.to_csv(partial)

    Several processes may write the same file: each has its own partial file, and the last one to finish stays.

    Args:
        path: Place of the file; its folder must exist.
        partial: Path to write to, on the same disk, which is the caller's own; None for a hidden file in the same
            folder.

    Attributes:
        path: Place of the file.
        partial: Path to write to.
    """

    def __init__(self, path: str | Path, partial: Path | None = None):
        self.path = Path(path)
        self.partial = partial_path(self.path) if partial is None else partial

    def finish(self) -> None:
        """Move the file, which must be closed, into place, and wait until the disk has it."""
        sync(self.partial)
        os.replace(self.partial, self.path)
        sync(self.path.parent)

    def discard(self) -> None:
        """Remove the partial file, if there is one; an earlier file stays."""
        self.partial.unlink(missing_ok=True)

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            with naming(self.path):
                if isinstance(error, OSError):
                    raise error
                if error is None:
                    self.finish()
        finally:
            self.discard()  # has no effect after a move


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Make errors of a disk that name no file, such as that it is full, name the file that the block writes.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_DISKS or error.filename is not None:
            raise
        way = ": make room, and give the command again" if error.errno != errno.EIO else ""
        raise OSError(error.errno, f"{os.strerror(error.errno)}{way}", str(path)) from error


class WholeFolder:
    """A folder that is written beside its place and moved there by `finish`.

    Args:
        path: Place of the folder; its parent must exist.
        replace: Whether to replace a folder that is there already; otherwise only an empty one is replaced.
        partial: Folder to write to, on the same disk, which is the caller's own and is emptied; None for a hidden one
            beside the place.

    Attributes:
        partial: Folder to write to.
    """

    def __init__(self, path: Path, replace: bool = False, partial: Path | None = None):
        self.path, self.replace = path, replace
        put_back(path)
        self.partial = partial_path(path) if partial is None else partial
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def finish(self) -> None:
        """Wait until the disk has all files, and move the folder into place.

        A kill between the two moves of a replacement leaves the old folder as a hidden one beside the place, which
        `put_back` moves there again.

        Raises:
            OSError: If something else is at the folder's place.
        """
        for folder, _, names in os.walk(self.partial):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        replaced, old = self.replace and self.path.exists(), _replaced(self.path)
        if replaced:
            self.path.rename(old)
        try:
            self.partial.rename(self.path)
        except OSError:
            if replaced:
                old.rename(self.path)
            raise
        sync(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the partial folder, if there is one; what is at the folder's place stays."""
        shutil.rmtree(self.partial, ignore_errors=True)


def put_back(path: Path) -> None:
    """Put back the folder that a killed process was about to replace; where the new one is in place, remove the old.

    Args:
        path: Place of the folder.
    """
    old = _replaced(path)
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):  # another process of the same run has put it back
            old.rename(path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Make a new folder to write to, and move it to `path` when the block ends without an error.

    Args:
        path: Place of the folder; when the block ends, nothing but an empty folder may be there.

    Raises:
        OSError: If something else is at the folder's place when the block ends.
    """
    folder = WholeFolder(path)
    try:
        yield folder.partial
        folder.finish()
    finally:
        folder.discard()


def partial_path(path: Path) -> Path:
    """Return a path beside `path` that no other process and no earlier run uses.

    The first call for a folder also removes the partial files that killed processes have left there.
    """
    if (folder := str(path.parent)) not in _cleared:
        _cleared.add(folder)
        clear_leftovers(path.parent)
    return path.with_name(f".{path.name}.{_MACHINE}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def clear_leftovers(folder: Path) -> None:
    """Remove the partial files and folders of processes of this machine that were killed."""
    if os.name != "posix" or not folder.is_dir():
        return
    for entry in folder.glob(".*.partial"):
        match = _PARTIAL.fullmatch(entry.name)
        with suppress(OSError):  # another process may remove it, or it is not ours to remove
            if match and not _is_running(int(match["process"])) and _is_left(entry, match["machine"]):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _is_left(entry: Path, machine: str | None) -> bool:
    """Return whether a partial file whose process does not run here was left by this machine."""
    if machine is None:  # by an earlier version, which did not name the machine
        return time.time() - entry.stat().st_mtime > _LONG
    return machine == _MACHINE


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        # Windows and some network file systems cannot sync a folder; then there is nothing to wait for.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any, **style: Any) -> None:
    """Write a JSON file that appears whole or not at all.

    Args:
        path: Place of the file.
        content: Value to write.
        **style: Arguments of `json.dumps`; by default `indent=1`.
    """
    with WholeFile(path) as partial:
        partial.write_text(json.dumps(content, **{"indent": 1, **style}), encoding="utf-8")
