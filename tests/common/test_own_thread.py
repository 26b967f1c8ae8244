"""What numba does to OpenMP's number of threads stays in the thread that called it."""

import sys

import forked
import pytest

DRAWN = """
import numba
import numpy as np
import torch

from tahoex1_hf.benchmarking.clusters import leiden
from tahoex1_hf.common.plots import umap_places

number = numba.config.NUMBA_NUM_THREADS + 1  # what numba would set is another one on every machine
torch.set_num_threads(number)
assert torch.get_num_threads() == number  # as in a process that has computed; the first call would set it again
cells = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
for work, shape in ((umap_places, (60, 2)), (leiden, (60,))):
    assert work(cells, 0).shape == shape
    assert torch.get_num_threads() == number, torch.get_num_threads()
"""


def test_umaps_and_clusters_leave_torchs_threads_alone() -> None:
    """A run that draws a UMAP between its steps would otherwise go on with other threads, and other bits."""
    pytest.importorskip("umap")
    pytest.importorskip("igraph")
    done = forked.run([sys.executable, "-c", DRAWN])
    assert done.returncode == 0, done.stderr
