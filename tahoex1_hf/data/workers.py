# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Run tasks in several processes, with a progress bar."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from tahoex1_hf.common.progress import progress_bar

Task = TypeVar("Task")
Result = TypeVar("Result")

_PRELOAD = ["tahoex1_hf.data.preparation"]


class Workers(ABC):
    """Whoever does the tasks of a run."""

    @abstractmethod
    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        description: str,
        done: int = 0,
        together: int = 1,
    ) -> Iterator[tuple[Task, Result]]:
        """Call a function on every task, and yield each task with its result when it is ready, in any order.

        Args:
            function: Function of a module, so that other processes can import it.
            tasks: Arguments of the calls.
            description: Text beside the progress bar.
            done: Number of tasks that were done before this run, for the progress bar.
            together: Number of tasks that a machine of a cluster is given at a time, since they are small.

        Raises:
            Exception: An exception of a task; tasks that have not started are then left undone.
        """


@dataclass(frozen=True)
class LocalWorkers(Workers):
    """Processes of this machine.

    Attributes:
        num_proc: Number of processes; 1 runs in this process.
    """

    num_proc: int

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        description: str,
        done: int = 0,
        together: int = 1,
    ) -> Iterator[tuple[Task, Result]]:
        """Call a function on every task, and yield each task with its result; see `Workers.run`.

        Raises:
            RuntimeError: If a process was ended from outside, for instance because memory ran out.
        """
        with progress_bar(None, total=len(tasks) + done, initial=done, desc=description, file=sys.stderr) as bar:
            if self.num_proc == 1 or len(tasks) <= 1:
                for task in tasks:
                    result = function(task)
                    bar.update()
                    yield task, result
                return
            for pair in _in_processes(function, tasks, self.num_proc):
                bar.update()
                yield pair


def _in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], num_proc: int
) -> Iterator[tuple[Task, Result]]:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOAD)  # torch is imported once, not by every process
    waiting = iter(tasks)
    pool = ProcessPoolExecutor(min(num_proc, len(tasks)), mp_context=context, initializer=_start_worker)
    try:
        running: dict[Future[Result], Task] = {}
        exhausted = False
        while running or not exhausted:
            # Only a few tasks are submitted ahead, so that an error or Ctrl-C does not wait for all of them.
            while not exhausted and len(running) < 2 * num_proc:
                try:
                    task = next(waiting)
                except StopIteration:
                    exhausted = True
                else:
                    running[pool.submit(function, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                task = running.pop(future)
                yield task, future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was ended from outside, perhaps because memory ran out. The same command resumes the "
            "run; fewer processes (--num-proc) or a smaller piece_cells need less memory."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Set up a worker process, which ends with this one."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    use_one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def use_one_thread() -> None:
    """Let a worker process compute with one thread, since the processes of a machine share its cores."""
    import pyarrow as pa
    import torch

    pa.set_cpu_count(1)
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this worker when its parent is killed, since it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
