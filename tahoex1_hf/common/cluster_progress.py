# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Progress of work on a cluster: a bar, and a line of JSON in the log every minute."""

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Self

from tahoex1_hf.common.progress import PROGRESS, progress_bar

logger = logging.getLogger(PROGRESS)

_SECONDS = 60.0  # between two lines


class ClusterProgress:
    """Progress of a run, shown in a bar and logged as JSON.

    The lines come whether or not anything was done since the last, so that one can see in the log that a run waits.

    Args:
        run: Name of the run: its output.
        unit: What is counted beside pieces, such as `cell`.
        total: Number of these that are to be done.
        pieces: Number of pieces that are to be done.
        machines: Function that returns the present number of machines.
        shown: Whether to show the bar; None shows it only on a terminal.
        stage: What is done, beside the bar and in the lines.
    """

    def __init__(
        self,
        run: str,
        unit: str,
        total: int,
        pieces: int,
        machines: Callable[[], int],
        shown: bool | None = None,
        stage: str = "embedding",
    ):
        self.run, self.unit, self.total, self.pieces, self._machines = run, unit, total, pieces, machines
        self.stage = stage
        self.done = self.pieces_done = self._before = 0
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._bar = progress_bar(shown, total=total, unit=unit, desc=f"{stage} on Ray", smoothing=0.05)
        self._thread = threading.Thread(target=self._log, name="cluster-progress", daemon=True)

    def update(self, number: int) -> None:
        """Count a piece that is done, with its number of units."""
        self.done += number
        self.pieces_done += 1
        self._bar.update(number)

    def skip(self, number: int) -> None:
        """Count pieces of one unit each that were done before this run."""
        self.done = self.pieces_done = self._before = number
        self._bar.update(number)

    def line(self) -> dict[str, Any]:
        """Return the present state, as one line of the log."""
        seconds, machines = time.monotonic() - self._began, 0
        with suppress(Exception):  # a cluster that is lost ends the run elsewhere, with its own error
            machines = self._machines()
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": self.run,
            "stage": self.stage,
            "pieces_done": self.pieces_done,
            "pieces": self.pieces,
            f"{self.unit}s_done": self.done,
            f"{self.unit}s": self.total,
            f"{self.unit}s_per_second": round((self.done - self._before) / max(seconds, 1e-9), 1),
            "seconds": round(seconds, 1),
            "machines": machines,
        }

    def _log(self) -> None:
        while not self._ended.wait(_SECONDS):
            logger.info("%s", json.dumps(self.line()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()
        logger.info("%s", json.dumps(self.line()))
