# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Refuse pickles whose memo would fill the memory."""

import io
import pickle
import pickletools
import re

import numpy as np

_LONG_PUT = ord("r")
_TEXT_PUT = re.compile(rb"p\d{4,}\r?\n")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def may_fill_memo(data: bytes) -> bool:
    """Return whether bytes may number a memo entry above their own length; those of an array may do so by chance."""
    content = np.frombuffer(data, dtype=np.uint8)
    places = np.flatnonzero(content[:-4] == _LONG_PUT)
    numbers = content[places[:, None] + np.arange(1, 5)].astype(np.int64) @ (256 ** np.arange(4))
    return bool((numbers > len(data)).any()) or _TEXT_PUT.search(data) is not None


def check_memo(file: io.BytesIO, longest: int) -> None:
    """Refuse the next pickle of a file if it numbers an entry of its memo above `longest`.

    Python's unpickler makes a list as long as the highest number. A real pickle numbers its entries from 0 on, so that
    no number is above its length in bytes.

    Raises:
        pickle.UnpicklingError: For such a pickle.
    """
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in _PUTS and int(argument or 0) > longest:
            raise pickle.UnpicklingError(f"it numbers an entry of its memo {argument}")
    file.seek(start)
