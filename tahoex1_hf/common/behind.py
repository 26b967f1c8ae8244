# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Do things in a thread behind the work, so that a GPU does not wait while results are written."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self


class Behind:
    """A context manager in which another thread does things, one after the other and in order.

    At most one is unfinished while the caller goes on. An exception is raised by the next call of `do`, or on leaving.
    Leaving waits for what has begun, also after an exception of the caller, which is then the one that is raised.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._begun: Future[object] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown()

    def do(self, work: Callable[[], object]) -> None:
        """Begin something, once what was begun before is done."""
        self._finish()
        self._begun = self._pool.submit(work)

    def _finish(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()
