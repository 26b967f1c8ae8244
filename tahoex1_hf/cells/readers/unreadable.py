# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Bad input in place of whatever error other libraries raise over a damaged file."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.common.reading import in_short, is_foreseen

_Item = TypeVar("_Item")


@contextmanager
def as_bad_input() -> Iterator[None]:
    """Raise BadInput for errors that come from the content of a file.

    Those of the system, as of a disk or a network, pass, and so do packages that are missing.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if not is_foreseen(error):
            raise BadInput(
                f"it cannot be read ({in_short(error)}): it is damaged, or not what its name says."
            ) from error
        if isinstance(error, ValueError):
            raise BadInput(str(error)) from error
        raise


def guarded(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield what is read from a file, with its errors as bad input; those of whoever reads on are not touched."""
    with as_bad_input():
        yield from items
