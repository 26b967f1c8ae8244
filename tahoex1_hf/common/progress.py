# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Progress bars that can be switched off from outside, and watched by a program that shows progress in its own way."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm.auto import tqdm

PROGRESS = "tahoex1_hf.progress"
"""Name of the logger whose messages are lines of JSON about the progress of a run."""

# A function that is told the title of a bar, how much is done, and of how much.
Watcher = Callable[[str, int, int], object]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watch_progress(watcher: Watcher) -> Iterator[None]:
    """Call a function with the progress of everything that is computed in the block, shown as a bar or not.

    Args:
        watcher: Function of a title such as "Embedding", the number of units done, and that of all units; it is called
            in the thread that computes, after each batch.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def progress_bar(shown: bool | None, **options: Any) -> "tqdm":
    """Return a tqdm bar, which is silent where TQDM_DISABLE is set, as `--quiet` does.

    Args:
        shown: Whether to show the bar; None shows it only on a terminal.
        **options: Other options of tqdm.
    """
    from tqdm.auto import tqdm  # reads the variable when it is imported, for all libraries, so not before it is set

    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        shown = False  # in tqdm itself, the argument overrides the variable
    disable = None if shown is None else not shown
    watcher = _watcher.get()
    if watcher is None:
        return tqdm(disable=disable, **options)
    return _watched_bar()(watcher, disable=disable, **options)


@cache
def _watched_bar() -> type["tqdm"]:
    """Return the kind of bar that tells a function of its progress, also where it is not shown."""
    from tqdm.auto import tqdm

    class WatchedBar(tqdm):
        def __init__(self, watcher: Watcher, **options: Any):
            super().__init__(**options)
            self._watcher, self._title = watcher, str(options.get("desc", ""))
            self._done, self._all = int(options.get("initial", 0)), int(options["total"])
            watcher(self._title, self._done, self._all)

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            self._watcher(self._title, self._done, self._all)
            shown: bool | None = super().update(n)
            return shown

    return WatchedBar
