"""Run a command of `tahoex1`, which kills itself (SIGKILL) when KILL_AFTER pieces of finished work are on disk."""

import os
import signal
from collections.abc import Callable
from typing import Any

from tahoex1_hf.cli.app import app
from tahoex1_hf.embedding.shards import ShardFolder

written = []


def dying(write: Callable[..., None]) -> Callable[..., None]:
    def write_and_die(self: ShardFolder, name: Any, *content: Any) -> None:
        write(self, name, *content)
        if name != "run.json":  # the run's settings, which are no work
            written.append(name)
        if len(written) == int(os.environ["KILL_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)

    return write_and_die


ShardFolder.write = dying(ShardFolder.write)  # type: ignore[method-assign]
ShardFolder.write_file = dying(ShardFolder.write_file)  # type: ignore[method-assign]
app()
