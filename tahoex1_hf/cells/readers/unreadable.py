# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversion of the errors that other libraries raise about a damaged file into `BadInput`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.common.reading import in_short, is_foreseen

_Item = TypeVar("_Item")


@contextmanager
def as_bad_input() -> Iterator[None]:
    """Replace errors that come from the content of a file by BadInput.

    Errors of the system, such as a disk or a network, and missing packages are passed on unchanged.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if not is_foreseen(error):
            raise BadInput(
                f"it cannot be read ({in_short(error)}): it is damaged, or not the kind of file that its name says."
            ) from error
        if isinstance(error, ValueError):
            raise BadInput(str(error)) from error
        raise


def guarded(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield the items read from a file; errors while reading become BadInput, errors of the caller do not."""
    with as_bad_input():
        yield from items
