# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read gzipped files with a limit on how far they expand, so that a crafted file cannot fill the memory."""

import gzip
import os
from pathlib import Path

# Tables of counts and names compress to about a tenth of their size; zeros, as in decompression bombs, to a
# thousandth.
_MOST_TIMES, _ALWAYS_BYTES = 200, 2**26


class BoundedGzip(gzip.GzipFile):
    """A gzipped file, read as bytes, which raises ValueError if it expands far more than real files do.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, "rb")
        self._path, self._left = str(path), max(_ALWAYS_BYTES, _MOST_TIMES * os.path.getsize(path))

    def read(self, size: int | None = -1) -> bytes:
        """Read `size` bytes; a negative size or None reads all of them, piece by piece."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read1(2**20), b""))
        return self._counted(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        """Read as many bytes as one step of decompression gives, at most `size`."""
        return self._counted(super().read1(size))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"{self._path} expands to more than {_MOST_TIMES} times its size, as a decompression bomb does: if "
                "you trust it, unpack it first."
            )
        return data
