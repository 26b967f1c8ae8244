# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Marker genes of clusters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.own_thread import in_own_thread

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

FEWEST = 3  # cells of a cluster that has markers


@dataclass(frozen=True)
class Marker:
    """A gene that is higher in a cluster than in the other cells.

    Attributes:
        gene: Name.
        fold: Log2 of the ratio of the mean expression in the cluster to that in the other cells.
        inside: Share of the cluster's cells that express it.
        outside: Share of the other cells that do.
    """

    gene: str
    fold: float
    inside: float
    outside: float


def find_markers(values: "csr_matrix", names: Sequence[str], clusters: np.ndarray, number: int) -> list[list[Marker]]:
    """Find the marker genes of each cluster by Wilcoxon's rank sum test.

    The test's p values are left out: the clusters were made of the very cells, so that they would mean nothing.

    Args:
        values: `(cells, genes)` log-normalised counts.
        names: Names of the genes.
        clusters: `(cells,)` cluster numbers.
        number: Most markers of a cluster.

    Returns:
        For each cluster its markers, the strongest first; none for clusters of fewer than three cells, and where there
        is no second cluster.
    """
    import pandas as pd
    import scanpy
    from anndata import AnnData

    sizes = np.bincount(clusters)
    large = np.flatnonzero(sizes >= FEWEST)
    found: list[list[Marker]] = [[] for _ in sizes]
    if len(sizes) < 2 or not len(large):
        return found
    adata = AnnData(values)
    adata.uns["log1p"] = {"base": None}
    adata.obs["cluster"] = pd.Categorical(clusters.astype(str))
    groups, options = [str(each) for each in large], {"method": "wilcoxon", "n_genes": 4 * number, "pts": True}
    in_own_thread(scanpy.tl.rank_genes_groups, adata, "cluster", groups=groups, **options)
    ranked: Any = adata.uns["rank_genes_groups"]
    for cluster in large.tolist():
        key = str(cluster)
        for gene, score, fold in zip(
            *(ranked[each][key] for each in ("names", "scores", "logfoldchanges")), strict=True
        ):
            inside, outside = (float(ranked[each].loc[gene, key]) for each in ("pts", "pts_rest"))
            if score > 0 and fold > 0 and len(found[cluster]) < number:
                found[cluster].append(Marker(str(names[int(gene)]), float(fold), inside, outside))
    return found
