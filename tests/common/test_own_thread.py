"""What numba does to OpenMP's number of threads stays in the thread that called it."""

import sys

import forked
import pytest

DRAWN = """
import numpy as np
import torch

from tahoex1_hf.benchmarking.clusters import leiden
from tahoex1_hf.common.own_thread import in_own_thread
from tahoex1_hf.common.plots import umap_places

torch.set_num_threads(3)
assert torch.get_num_threads() == 3  # as in a process that has computed; the first call would set it again
cells = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
assert umap_places(cells, 0).shape == (60, 2)
assert torch.get_num_threads() == 3, torch.get_num_threads()
assert len(leiden(cells, 0)) == 60
assert torch.get_num_threads() == 3, torch.get_num_threads()
# Without it, the number is that of numba's threads: 3 only on a machine with three cores.
import numba

@numba.njit(parallel=True)
def count(values):
    total = 0
    for i in numba.prange(len(values)):
        total += 1
    return total

assert in_own_thread(count, np.zeros(5)) == 5
assert torch.get_num_threads() == 3, torch.get_num_threads()
"""


def test_umaps_and_clusters_leave_torchs_threads_alone() -> None:
    """A run that draws a UMAP between its steps would otherwise go on with other threads, and other bits."""
    pytest.importorskip("umap")
    pytest.importorskip("igraph")
    done = forked.run([sys.executable, "-c", DRAWN])
    assert done.returncode == 0, done.stderr
