# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What a run has measured of each drug, kept in files beside the output until the run ends.

What is measured of a drug depends on its cells and the seed alone, not on the drugs before it. So a call that resumes
a run takes the finished drugs from their files, and gives what an uninterrupted one gives, bit for bit.
"""

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.embedding.shards import ShardFolder

logger = logging.getLogger(__name__)

_DRUG = "drug-"


class Unfinished:
    """The folder `OUTPUT.parts` of a run; as a context manager it is removed when the run has ended.

    Args:
        output: Folder that the run will write.
        files: Files that are read.
        settings: All else that decides the result, as JSON.
        restart: Whether to discard the files of a run with other settings.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: On entering, if the folder is that of a run with other settings (the message names them), or
            another run is using it.
    """

    def __init__(self, output: Path, files: Sequence[Path], settings: Mapping[str, Any], restart: bool):
        for path in files:
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist.")
        self._parts = ShardFolder(str(output.with_name(f"{output.name}.parts")))
        self._identity = {"cells": [[str(path), content_fingerprint(path)] for path in files], **settings}
        self._restart = restart
        self._lock = RunLock(f"{self._parts.location}.lock", output, "output")
        self._done: set[str] = set()

    @property
    def folder(self) -> Path:
        """Folder for what a run needs on disk; it is not kept as finished work."""
        return Path(self._parts.location)

    def __enter__(self) -> Self:
        self._lock.acquire()
        try:
            self._parts.claim(self._identity, self._restart, {})
            self._done = {name for name in self._parts.names() if name.startswith(_DRUG)}
        except BaseException:
            self._lock.release()
            raise
        if self._done:
            logger.info("Resuming %s: %d drugs are done.", self.folder, len(self._done))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None or not self._done:
                self._parts.remove()
        finally:
            self._lock.release()

    def kept(
        self, space: str, number: int, measure: Callable[..., dict[str, np.ndarray]], *arguments: Any
    ) -> dict[str, np.ndarray]:
        """Return what an earlier call has measured of a drug; otherwise measure it, and keep that.

        Args:
            space: Space in which it is measured.
            number: Number of the drug.
            measure: Function that returns named arrays.
            *arguments: Its arguments.
        """
        name = f"{_DRUG}{space}-{number:06d}.npz"
        if name in self._done:
            with self._parts.open(name) as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        found, buffer = measure(*arguments), io.BytesIO()
        arrays: dict[str, Any] = found
        np.savez(buffer, **arrays)
        self._parts.write_file(name, buffer.getvalue())
        self._done.add(name)
        return found
