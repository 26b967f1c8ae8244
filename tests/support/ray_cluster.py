"""A Ray cluster of this machine, on the loopback interface; and a stand-in that needs no Ray."""

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import forked
import pytest

from tahoex1_hf.common.cluster import Cluster, ClusterOptions, Shared, Stage


@contextmanager
def small_cluster() -> Iterator[None]:
    """Start a cluster with two CPUs, and connect this process to it.

    Its workers are forks of the fork server: by themselves, those that run our code import torch for 4 CPU seconds.
    """
    pytest.importorskip("ray")
    from tahoex1_hf.common.cluster import import_ray, start_ray

    ray = import_ray()
    workers = {"py_executable": str(forked.server().python), "env_vars": forked.environment(**forked.stand_in())}
    try:
        start_ray(
            ray,
            "local",
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _system_config={"num_workers_soft_limit": 8},
            runtime_env=workers,
        )
    except (OSError, RuntimeError) as error:  # no shared memory, no room for its processes: not what these tests test
        pytest.skip(f"Ray does not start on this machine: {error}")
    try:
        assert "PYTHONBREAKPOINT" not in os.environ  # other tests' processes would inherit it
        yield
    finally:
        ray.shutdown()


class SharedHere(Shared):
    """A value that is copied as if it had been sent."""

    def get(self) -> Any:
        """Return the copy."""
        return self.reference[0]


class ClusterThatRepeats(Cluster):
    """A stand-in that does the work in this process, and all of it twice, as Ray may do with any piece."""

    num_gpus, num_cpus = 0, 2.0

    def num_machines(self) -> int:
        """Return the number of machines."""
        return 1

    def share(self, run: str, name: str, value: Any) -> Shared:
        """Copy a value."""
        return SharedHere(run, name, [pickle.loads(pickle.dumps(value))], "")

    def run(
        self, rows: Sequence[dict[str, Any]], stages: Sequence[Stage], together: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Run rows through the stages, the last piece first; each stage's second result is what goes on."""
        workers = [stage.work(**stage.arguments) if isinstance(stage.work, type) else stage.work for stage in stages]
        for row in reversed(rows):
            for stage, work in zip(stages, workers, strict=True):
                more = {} if isinstance(stage.work, type) else stage.arguments
                before = pickle.dumps(row)
                work(pickle.loads(before), **more)
                row = work(pickle.loads(before), **more)
            yield row


@contextmanager
def repeating(options: ClusterOptions) -> Iterator[Cluster]:
    """Stand in for `connected`."""
    yield ClusterThatRepeats(None, options)
