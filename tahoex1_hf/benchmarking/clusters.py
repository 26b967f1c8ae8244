# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Clusters of cells."""

from typing import Any

import numpy as np

from tahoex1_hf.common.own_thread import in_own_thread
from tahoex1_hf.common.plots import import_umap

NEIGHBOURS = 15


def leiden(features: Any, seed: int) -> np.ndarray:
    """Return the Leiden clusters of a graph of 15 neighbours, by scanpy at resolution 1."""
    import scanpy
    from anndata import AnnData

    import_umap()  # with which scanpy weighs neighbours: so that what it compiles is kept for other processes
    graph = AnnData(features)
    in_own_thread(scanpy.pp.neighbors, graph, use_rep="X", n_neighbors=NEIGHBOURS, random_state=seed)
    scanpy.tl.leiden(graph, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    return np.asarray(graph.obs["leiden"].cat.codes)
