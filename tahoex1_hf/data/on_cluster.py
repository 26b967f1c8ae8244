# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Run the tasks of `prepare` on a Ray cluster, whose machines must all see the inputs and the output folder.

A task writes files that appear whole or not at all, under names and with bytes that depend on the task alone. A task
that Ray runs twice therefore changes nothing.
"""

import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tahoex1_hf.common.cluster import Cluster, Shared, Stage
from tahoex1_hf.common.cluster_progress import ClusterProgress
from tahoex1_hf.data.workers import Result, Task, Workers


class ClusterWorkers(Workers):
    """The workers of a cluster.

    Args:
        cluster: Connection to the cluster.
        output: Name of the run, for the log.
        begin: Function that a worker calls before its first task of a list.
    """

    def __init__(self, cluster: Cluster, output: str, begin: Callable[[], object]):
        self.cluster, self.output, self.begin = cluster, output, begin

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        description: str,
        done: int = 0,
        together: int = 1,
    ) -> Iterator[tuple[Task, Result]]:
        """Call a function on every task, and yield each task with its result; see `Workers.run`."""
        if not tasks:
            return
        shared = self.cluster.share(uuid.uuid4().hex, "tasks", tasks)
        given = {"tasks": shared, "function": function, "begin": self.begin}
        stage = Stage(do_task, given, most=self.cluster.options.max_workers)
        total = len(tasks) + done
        watch = ClusterProgress(self.output, "piece", total, total, self.cluster.num_machines, stage=description)
        with watch:
            watch.skip(done)
            for row in self.cluster.run(_Numbers(len(tasks)), [stage], together):
                watch.update(1)
                yield tasks[row["number"]], pickle.loads(row["result"])


class _Numbers(Sequence[dict[str, Any]]):
    """The rows of tasks, made when they are asked for: an index alone, of which workers have the list."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        return {"number": range(self.size)[place]}


_begun: set[str] = set()  # the list of tasks that this worker is at


def do_task(
    row: dict[str, Any], tasks: Shared, function: Callable[[Any], Any], begin: Callable[[], object]
) -> dict[str, Any]:
    """Do one of the tasks, on a worker."""
    if tasks.run not in _begun:
        _begun.clear()
        _begun.add(tasks.run)
        begin()
    return {**row, "result": pickle.dumps(function(tasks.get()[row["number"]]))}
