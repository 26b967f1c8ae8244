# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Write the shards of a checkpoint while the training goes on.

A step waits only until the shards are copied into the main memory. torch's distributed checkpoints (DCP) write them in
threads, whose messages travel in groups of their own, apart from those of the training.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp


class BackgroundSaves:
    """The writing of one checkpoint at a time; every process calls the same methods in the same order."""

    def __init__(self) -> None:
        self._groups: list[Any] = []
        self._writes: list[Any] = []
        self._last: Future[None] | None = None

    def begin(self, states: Mapping[Path, dict[str, Any]]) -> None:
        """Copy states into the main memory, and begin to write them; returns when the copies are made.

        Args:
            states: State of the weights, of the optimizer and so on, by the folder that each is written into.
        """
        while len(self._groups) < len(states):  # concurrent messages in one group would be taken for one another
            self._groups.append(dist.new_group(backend="gloo"))
        for group, (folder, state) in zip(self._groups, states.items(), strict=False):
            folder.mkdir(parents=True, exist_ok=True)
            self._writes.append(
                dcp.async_save(state, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
            )

    def then(self, work: Callable[[], None]) -> None:
        """Do work when all processes have written all that was begun: at once where nothing was.

        It is done in a thread of the first process, which in DCP collects what the others have written.
        """
        if not self._writes:
            work()
            return
        writes = list(self._writes)

        def follow() -> None:
            for write in writes:
                write.result()
            work()

        thread = ThreadPoolExecutor(1)
        self._last = thread.submit(follow)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until this process has written all, and done what follows; raise the error that kept it from it."""
        writes, self._writes = self._writes, []
        last, self._last = self._last, None
        for write in writes:
            write.result()
        if last is not None:
            last.result()
