# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The journal of a run: finished perturbations on disk, from which a run that was stopped resumes."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from tahoex1_hf.common.files import sync
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.perturbation.plan import Task

# Settings that runs of earlier versions did not record; they are taken to be the same, or what these runs did.
_ADDED = ("weights", "most_null_genes", "pairs", "compiled_attention")
_FORMERLY = {"compiled_attention": False}


def recorded(path: str | Path | None) -> dict[str, Any] | None:
    """Return the settings of the run whose results a file keeps; None if there is none."""
    if path is None or not Path(path).exists():
        return None
    with Path(path).open(encoding="utf-8") as file:
        line = file.readline()
    return json.loads(line) if line.endswith("\n") else None


class Journal:
    """A file with one line of JSON for the settings of the run, and one for each finished perturbation.

    It is used as a context manager, which keeps a second run away from the file.

    Args:
        path: Path of the file, which is made if it does not exist; None keeps everything in memory.
        settings: Everything that decides the result.
        restart: Whether to discard results of a run with other settings.

    Raises:
        ValueError: On entering, if the file belongs to a run with other settings (the message names them), or another
            run is using it.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], restart: bool = False):
        self.path = None if path is None else Path(path)
        self.finished: dict[Task, dict[str, Any]] = {}
        self._settings: dict[str, Any] = json.loads(
            json.dumps(settings)
        )  # makes lists of tuples, as reading the file does
        self._restart = restart
        self._lock = RunLock(None if path is None else f"{path}.lock", path, "file")

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        self._lock.acquire()
        try:
            if self.path.exists():
                self._read(self.path)
            if not self.path.exists():
                self._write(self.path, [self._settings])
                sync(self.path.parent)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def _read(self, path: Path) -> None:
        complete = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
        before = json.loads(complete[0]) if complete else {}
        if complete:
            added = {key: _FORMERLY.get(key, value) for key, value in self._settings.items() if key in _ADDED}
            before = {**added, **before}
        if before != self._settings:
            if complete and not self._restart:
                other = sorted(key for key in {*before, *self._settings} if before.get(key) != self._settings.get(key))
                raise ValueError(
                    f"{path} belongs to an unfinished run with another {', '.join(other)}: pass the same arguments to "
                    "resume it, or restart=True (--restart) to discard it."
                )
            path.unlink()
            return
        for line in complete[1:]:
            record = json.loads(line)
            self.finished[Task(record.pop("group"), tuple(record.pop("genes")), record.pop("control"))] = record
        os.truncate(path, len("".join(complete).encode()))  # removes a line that a kill cut short

    @staticmethod
    def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(record)}\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def add(self, records: Mapping[Task, Mapping[str, Any]]) -> None:
        """Add finished perturbations."""
        self.finished.update({task: dict(record) for task, record in records.items()})
        if self.path is not None:
            lines = (
                {"group": task.group, "genes": task.genes, "control": task.control, **record}
                for task, record in records.items()
            )
            self._write(self.path, lines)
