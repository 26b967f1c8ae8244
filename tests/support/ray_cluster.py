"""A Ray cluster of this machine, on the loopback interface, for the tests of a file."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def small_cluster() -> Iterator[None]:
    """Start a cluster with two CPUs, and connect this process to it."""
    pytest.importorskip("ray")
    from tahoex1_hf.common.cluster import import_ray

    ray = import_ray()
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _system_config={"num_workers_soft_limit": 8},
    )
    try:
        yield
    finally:
        ray.shutdown()
