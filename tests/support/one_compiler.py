"""Have one process of the tests compile a function of numba's, while the others wait for it and load it from disk.

Where nothing has been compiled yet, the processes of pytest-xdist, and the commands that they run, come to the same
loops within seconds of each other. Each of them would compile for up to 10 CPU seconds.
"""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

from numba.core.caching import Cache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher

_PLACE = Path(tempfile.gettempdir()) / f"tahoex1_tests_{os.getuid()}_numba.lock"
_load, _compile = Cache.load_overload, Dispatcher.compile
_held: dict[int, int] = {}
"""The open file by the process that has the lock: a fork does not have its parent's."""


def _load_or_lock(self: Any, signature: Any, target: Any) -> Any:
    """Load what was compiled; where there is nothing, take the lock, and look again once another has given it back."""
    found = _load(self, signature, target)
    if found is None and self._enabled and os.getpid() not in _held:
        _held[os.getpid()] = os.open(_PLACE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(_held[os.getpid()], fcntl.LOCK_EX)
        found = _load(self, signature, target)
    return found


def _compile_and_unlock(self: Any, signature: Any) -> Any:
    """Load or compile; the call for which the lock was taken gives it back, and not those that it makes within."""
    with global_compiler_lock:  # as the original does
        had_it = os.getpid() in _held
        try:
            return _compile(self, signature)
        finally:
            if not had_it and os.getpid() in _held:
                os.close(_held.pop(os.getpid()))


def install() -> None:
    Cache.load_overload, Dispatcher.compile = _load_or_lock, _compile_and_unlock
