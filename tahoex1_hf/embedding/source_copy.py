# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A copy of the source, made while its cells are embedded, to which the embeddings are then added."""

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

from tahoex1_hf.common.files import WholeFile, WholeFolder, naming, sync
from tahoex1_hf.common.reading import reading

_PIECE_BYTES = 2**23


class SourceCopy:
    """A copy of a source, at the output's place, that a thread makes.

    A GPU embeds a large file in little more time than it takes to copy it and to wait until the disk has the copy.

    Args:
        source: Path of an `.h5ad` file, or of a `.zarr` store.
        output: Path of the output, of the same kind. What is there stays until the output is finished.
        place: Path of the copy until then, in a folder of this run: whoever goes on with a run that was killed, on
            whatever machine, writes over what is left of it. If that folder is on another disk, the copy is a hidden
            one beside the output.
    """

    def __init__(self, source: str, output: str, place: Path):
        self.source, self.output, self.place = Path(source), Path(output), place
        self._whole: WholeFile | WholeFolder | None = None
        self._stopped = Event()
        self._done: Future[None] = Future()

    def begin(self) -> None:
        """Begin to copy, in a thread."""
        self.place.parent.mkdir(exist_ok=True)
        same_disk = self.place.parent.stat().st_dev == self.output.parent.stat().st_dev  # not through a link elsewhere
        place = self.place if same_disk else None
        whole = WholeFolder(self.output, True, place) if self.source.is_dir() else WholeFile(self.output, place)
        thread = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._done, self._whole = thread.submit(self._copy, whole), whole
        thread.shutdown(wait=False)  # it ends with the copy

    def check(self) -> None:
        """Raise the error with which copying has ended, if it has: OSError or ValueError, naming the file."""
        if self._done.done():
            self._done.result()

    def wait(self) -> WholeFile | WholeFolder:
        """Wait until all is copied, and return the output, which can then be added to.

        Raises:
            OSError: If the source cannot be read, or the copy not be written.
        """
        if self._whole is None:
            self.begin()
        self._done.result()
        assert self._whole is not None
        return self._whole

    def abandon(self) -> None:
        """Stop copying, and remove what was copied; a finished output stays."""
        if self._whole is not None:
            self._stopped.set()
            self._done.exception()  # waits for the thread
            self._whole.discard()

    def _copy(self, whole: WholeFile | WholeFolder) -> None:
        piece = memoryview(bytearray(_PIECE_BYTES))
        try:
            if self.source.is_file():
                self._copy_file(self.source, whole.partial, piece)
                return
            # With the rights of new files: a store that may only be read gives one that can be added to.
            for folder, _, names in os.walk(self.source, onerror=_raise, followlinks=True):
                to = whole.partial / Path(folder).relative_to(self.source)
                to.mkdir(exist_ok=True)
                for name in names:
                    if self._stopped.is_set():
                        return
                    self._copy_file(Path(folder, name), to / name, piece)
        except BaseException:
            whole.discard()  # a disk that is full must have room for the shards
            raise

    def _copy_file(self, source: Path, to: Path, piece: memoryview) -> None:
        with source.open("rb", buffering=0) as given, to.open("wb", buffering=0) as copied:
            while not self._stopped.is_set():
                with reading(source):
                    size = given.readinto(piece)
                if not size:
                    break
                with naming(self.output):
                    _write(copied, piece[:size])
        if not self._stopped.is_set():
            with naming(self.output):
                sync(to)


def _write(file: io.FileIO, piece: memoryview) -> None:
    """Write all of a piece, of which the system may take a part at a time."""
    while len(piece):
        piece = piece[file.write(piece) :]


def _raise(error: OSError) -> None:
    raise error
