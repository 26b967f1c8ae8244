# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Finished perturbations of a run, kept on disk: a run that was stopped goes on where it was."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tahoex1_hf.perturbation_plan import Task


class Journal:
    """A file with a line of JSON for the settings of the run, and one for each finished perturbation.

    Args:
        path: of the file, made where it does not exist; None keeps all in memory.
        settings: all that decides the result.
        restart: throw away what a run with other settings left.

    Raises:
        ValueError: where the file is of a run with other settings, which the message names.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], restart: bool = False):
        self.path = None if path is None else Path(path)
        self.finished: dict[Task, dict[str, Any]] = {}
        if self.path is None:
            return
        plain: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists, as they come back
        if self.path.exists():
            self._read(plain, restart)
        if not self.path.exists():
            self._write([plain])

    def _read(self, settings: dict[str, Any], restart: bool) -> None:
        if self.path is None:
            return
        complete = [
            line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
        ]
        before = json.loads(complete[0]) if complete else {}
        if before != settings:
            if complete and not restart:
                other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
                raise ValueError(
                    f"{self.path} is of an unfinished run with another {', '.join(other)}: give the same arguments to "
                    "go on, or restart=True (--restart) to throw it away."
                )
            self.path.unlink()
            return
        for line in complete[1:]:
            record = json.loads(line)
            self.finished[Task(record.pop("group"), tuple(record.pop("genes")), record.pop("control"))] = record
        self.path.write_text("".join(complete), encoding="utf-8")  # without a line that a kill cut off

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(record)}\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def add(self, records: Mapping[Task, Mapping[str, Any]]) -> None:
        """Keep finished perturbations."""
        self.finished.update({task: dict(record) for task, record in records.items()})
        self._write(
            {"group": task.group, "genes": task.genes, "control": task.control, **record}
            for task, record in records.items()
        )

    def remove(self) -> None:
        """Take the file away: the run is over, and its output written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
