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
            from fsspec.core import url_to_fs

            self.filesystem, self.path = url_to_fs(location)
            # The object appears, and replaces an earlier one, when it is committed; until then there are only parts.
            self.file: Any = self.filesystem.open(self.path, "wb", autocommit=False)
        else:
            self.file = self.whole.partial.open("wb")

    def finish(self) -> None:
        """Close the file, and move it into place."""
        self.file.close()
        if self.whole is not None:
            self.whole.finish()
        else:
            self.file.commit()

    def abandon(self) -> None:
        """Remove the unfinished file; an earlier one stays."""
        if self.whole is not None:
            with suppress(Exception):  # the error that matters is being raised already
                self.file.close()
            self.whole.discard()
            return
        from fsspec.spec import AbstractBufferedFile

        if isinstance(self.file, AbstractBufferedFile):
            with suppress(Exception):
                self.file.discard()
            self.file.closed = True  # or the rest would be sent when the file is collected as garbage
            return
        with suppress(Exception):  # one that is there as soon as it is opened, such as in memory
            self.file.close()
            self.filesystem.rm_file(self.path)

    def __enter__(self) -> IO[bytes]:
        file: IO[bytes] = self.file
        return file

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()
