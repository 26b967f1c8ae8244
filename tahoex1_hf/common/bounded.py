# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Gzipped files that cannot fill the memory: a bound for what a few bytes unfold into."""

import gzip
import os
from pathlib import Path

# Tables of counts and names compress to a tenth. Zeros, of which bombs are made, compress to a thousandth.
_MOST_TIMES, _ALWAYS_BYTES = 200, 2**26


class BoundedGzip(gzip.GzipFile):
    """A gzipped file, read as bytes, that ends in an error where it unfolds into far more than files do.

    Args:
        path: path of the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, "rb")
        self._path, self._left = str(path), max(_ALWAYS_BYTES, _MOST_TIMES * os.path.getsize(path))

    def read(self, size: int | None = -1) -> bytes:
        """Read bytes, piece by piece where all are asked for."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read1(2**20), b""))
        return self._counted(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        """Read what one step gives."""
        return self._counted(super().read1(size))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"{self._path} unfolds into more than {_MOST_TIMES} times its size: if it is no bomb, unpack it."
            )
        return data
