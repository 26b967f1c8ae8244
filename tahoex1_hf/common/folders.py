# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders on this machine, on a shared file system or in an object store, whose files appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tahoex1_hf.common.files import WholeFile, sync
from tahoex1_hf.common.patience import patiently


@dataclass(frozen=True)
class Folder:
    """A folder. What fails since an object store cannot be reached is tried again for some minutes.

    Attributes:
        location: Local folder, or a URL that fsspec can open.
    """

    location: str

    @property
    def is_local(self) -> bool:
        """Whether the folder is on this machine or on a shared file system, not in an object store."""
        return "://" not in self.location

    def _filesystem(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        filesystem, root = url_to_fs(self.location)
        return filesystem, root.rstrip("/")

    def child(self, name: str) -> "Folder":
        """Return a folder in this one."""
        return Folder(f"{self.location.rstrip('/')}/{name}")

    def make(self) -> None:
        """Make a local folder if it does not exist; an object store has no folders apart from what is in them."""
        if self.is_local:
            os.makedirs(self.location, exist_ok=True)

    def place(self, name: str) -> str:
        """Return the path or URL of a file in the folder; a local folder is made if it does not exist."""
        self.make()
        return f"{self.location}/{name}"

    # What is there ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the names of all files and folders in the folder, sorted."""
        return sorted(path.rpartition("/")[2] for path in self._entries(detail=False))

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the files in the folder, by their names."""
        found = self._entries(detail=True)
        return {each["name"].rpartition("/")[2]: int(each["size"]) for each in found if each["type"] == "file"}

    def _entries(self, detail: bool) -> list[Any]:
        def entries() -> list[Any]:
            filesystem, root = self._filesystem()
            filesystem.invalidate_cache()
            try:  # and not isdir or exists, which take a store that cannot be reached for one without the folder
                found = filesystem.ls(root, detail=detail)
            except (FileNotFoundError, NotADirectoryError):
                return []
            # Some stores' consoles make an object of the folder's own name.
            return [each for each in found if (each["name"] if detail else each).rstrip("/") != root]

        return patiently(entries, self.location)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is none."""

        def size() -> int | None:
            filesystem, root = self._filesystem()
            filesystem.invalidate_cache()
            try:
                entry = filesystem.info(f"{root}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(entry["size"]) if entry["type"] == "file" else None

        return patiently(size, self.location)

    # Reading ---------------------------------------------------------------------------------------

    def open(self, name: str) -> Any:
        """Open a file in the folder for reading."""
        filesystem, root = self._filesystem()
        return filesystem.open(f"{root}/{name}", "rb")

    def read_file(self, name: str) -> bytes:
        """Return the content of a file."""
        filesystem, root = self._filesystem()
        content: bytes = patiently(lambda: filesystem.cat_file(f"{root}/{name}"), self.location)
        return content

    def read_files(self, names: Sequence[str]) -> list[bytes]:
        """Return the contents of small files, many of which are fetched from a store at the same time."""
        return self.read_ranges([(name, 0, None) for name in names])

    def read_ranges(self, ranges: Sequence[tuple[str, int, int | None]]) -> list[bytes]:
        """Return bytes of files, many of which are fetched from a store at the same time.

        Args:
            ranges: Name, first byte, and byte after the last, of each; None for all to the end.
        """
        filesystem, root = self._filesystem()
        paths = [f"{root}/{name}" for name, _, _ in ranges]
        starts, stops = [start or None for _, start, _ in ranges], [stop for _, _, stop in ranges]

        def read() -> list[bytes]:
            found: list[Any] = filesystem.cat_ranges(paths, starts, stops) if paths else []
            for each in found:
                if isinstance(each, Exception):
                    raise each
            return found

        return patiently(read, self.location)

    # Writing ---------------------------------------------------------------------------------------

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file of the folder, which appears whole or not at all."""
        filesystem, root = self._filesystem()
        if not self.is_local:  # an object appears in an object store when it is complete
            self._send(lambda: filesystem.pipe_file(f"{root}/{name}", content))
            return
        os.makedirs(root, exist_ok=True)
        with WholeFile(f"{root}/{name}") as partial:
            partial.write_bytes(content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give a local path to write a large file to, which is in the folder when the block ends without an error.

        To an object store it is sent then, from this machine's temporary folder. A large one goes in parts; the store
        shows the object when it has all of them.
        """
        if self.is_local:
            with WholeFile(f"{self.location}/{name}") as partial:
                yield partial
            return
        with tempfile.TemporaryDirectory(prefix="tahoex1-") as temporary:
            written = Path(temporary) / name
            yield written
            filesystem, root = self._filesystem()
            self._send(lambda: filesystem.put_file(str(written), f"{root}/{name}"))

    def _send(self, call: Callable[[], object]) -> None:
        """Send a file to a store; an error, such as that there is no such bucket, names the folder."""
        try:
            patiently(call, self.location)
        except OSError as error:
            if self.location in str(error):
                raise
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
            raise kind(f"{self.location}: {error}") from error

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.is_local:
            Path(self.location, name).unlink(missing_ok=True)
            return

        def delete() -> None:
            filesystem, root = self._filesystem()
            with suppress(FileNotFoundError):
                filesystem.rm_file(f"{root}/{name}")

        patiently(delete, self.location)

    def remove(self) -> None:
        """Remove the folder and everything in it, if it is there."""
        if self.is_local:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.location)
            return

        def remove() -> None:
            filesystem, root = self._filesystem()
            filesystem.invalidate_cache()
            with suppress(FileNotFoundError):
                filesystem.rm(root, recursive=True)

        patiently(remove, self.location)

    def sync(self) -> None:
        """Wait until the disk has the entries of a local folder."""
        if self.is_local:
            sync(Path(self.location))
