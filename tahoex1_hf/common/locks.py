# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Keep a second run away from a file or folder that a run is writing."""

from contextlib import suppress
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout


class RunLock:
    """A lock that one run at a time can hold; on many file systems only the runs of one machine see each other's.

    As a context manager, it is held until the block ends.

    Args:
        path: File of the lock, which exists while the lock is held; None makes a lock that does nothing.
        where: What the run writes, for the error: `out.h5ad`, `output='folder'`.
        what: Noun for it: `output`, `folder`.
    """

    def __init__(self, path: str | Path | None, where: object, what: str):
        self._lock = None if path is None else FileLock(path)
        self._problem = f"{where}: another run is writing there; wait for it to end, or choose another {what}."

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ValueError: If another run holds it.
        """
        if self._lock is not None:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(self._problem) from None

    def release(self) -> None:
        """Give the lock back, and remove its file; do nothing if the lock is not held."""
        if self._lock is not None and self._lock.is_locked:
            # Before the release, after which the file may be that of another run.
            with suppress(PermissionError):  # Windows does not remove open files
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
