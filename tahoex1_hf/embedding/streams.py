# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Writing of a file piece by piece, locally or in an object store, so that it appears complete or not at all."""

from contextlib import suppress
from typing import IO, Any

from tahoex1_hf.common.files import WholeFile


class WholeStream:
    """A stream to a file that appears only when it is finished.

    As a context manager, it finishes the file when the block ends, and abandons the file if an error occurs.

    Args:
        location: Path in an existing folder, or a URL that fsspec can open.

    Attributes:
        file: Binary file to write to.
    """

    def __init__(self, location: str):
        self.location = location
        self.whole = None if "://" in location else WholeFile(location)
        if self.whole is None:
            import fsspec

            self.file: IO[bytes] = fsspec.open(location, "wb").open()  # the object appears when it is closed
        else:
            self.file = self.whole.partial.open("wb")

    def finish(self) -> None:
        """Close the file, and move it into place."""
        self.file.close()
        if self.whole is not None:
            self.whole.finish()

    def abandon(self) -> None:
        """Remove the unfinished file."""
        with suppress(Exception):  # the error that matters is being raised already
            self.file.close()
        if self.whole is not None:
            self.whole.discard()
            return
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(self.location)
        with suppress(Exception):
            filesystem.rm_file(path)

    def __enter__(self) -> IO[bytes]:
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()
