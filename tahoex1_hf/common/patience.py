# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Patience with object stores: what fails since a store cannot be reached is tried again for some minutes."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tahoex1_hf.common.reading import in_short

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

# Seconds from the first failure to the last try, and the longest wait between two tries.
_PATIENCE, _LONGEST_WAIT = 300.0, 30.0
# Libraries that speak to stores, whose own errors are about connections; what a store answers they raise as OSError.
_CLIENTS = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "httpcore", "httpx", "requests", "urllib3"}
# Answers of a store that another try does not change.
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, may go away by itself."""
    while error is not None:
        if isinstance(error, _FINAL) or (isinstance(error, OSError) and error.errno == errno.EINVAL):
            return False  # EINVAL: a name that no bucket can have
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS:
            return True
        error = error.__cause__
    return False


def patiently(call: Callable[[], Value], where: str) -> Value:
    """Return the result of a call, which is made again while a store cannot be reached.

    Args:
        call: Function without arguments, which may be called again after it failed.
        where: Path or URL that the call is about; calls about local paths are made once.

    Raises:
        ConnectionError: If the store cannot be reached for five minutes.
        Exception: An error of a call that is of another kind.
    """
    if "://" not in where:
        return call()
    wait, last = 1.0, time.monotonic() + _PATIENCE
    while True:
        try:
            return call()
        except Exception as error:
            left = last - time.monotonic()
            if not is_transient(error):
                raise
            if left <= 0:
                raise ConnectionError(
                    f"{where} was tried for {_PATIENCE / 60:.0f} minutes ({in_short(error)}). When the store can be "
                    "reached, the same command goes on with the run."
                ) from error
            logger.warning("%s (%s): trying again in %.0f s, for %.0f s more.", where, in_short(error), wait, left)
            time.sleep(min(wait, left))
            wait = min(2 * wait, _LONGEST_WAIT)
