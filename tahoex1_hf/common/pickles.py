# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Refuse pickles that would fill the memory with a list of what they noted."""

import io
import pickle
import pickletools
import re

import numpy as np

_LONG_PUT = ord("r")
_TEXT_PUT = re.compile(rb"p\d{4,}\r?\n")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def may_note_far(data: bytes) -> bool:
    """Return whether bytes look like a note under a number above their length, as those of an array may by chance."""
    content = np.frombuffer(data, dtype=np.uint8)
    places = np.flatnonzero(content[:-4] == _LONG_PUT)
    numbers = content[places[:, None] + np.arange(1, 5)].astype(np.int64) @ (256 ** np.arange(4))
    return bool((numbers > len(data)).any()) or _TEXT_PUT.search(data) is not None


def check_notes(file: io.BytesIO, longest: int) -> None:
    """Refuse the next pickle of a file where it notes a value under a number above `longest`.

    For a number, a list of that length is made. A pickle counts what it notes, so that no number is above its length.

    Raises:
        pickle.UnpicklingError: for such a pickle.
    """
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in _PUTS and int(argument or 0) > longest:
            raise pickle.UnpicklingError(f"it notes a value under the number {argument}")
    file.seek(start)
