"""Marker genes are those that were planted, in order, for clusters that are large enough."""

import numpy as np
from scipy.sparse import csr_matrix

from tahoex1_hf.reporting.markers import find_markers


def test_planted_genes_are_found() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat([0, 1, 2], [40, 30, 2])
    values = rng.poisson(1.0, (72, 12)).astype(np.float32)
    values[:40, 3] += 9
    values[:40, 4] += 3
    values[40:70, 7] += 5
    found = find_markers(csr_matrix(np.log1p(values)), [f"gene {place}" for place in range(12)], clusters, 2)
    assert [marker.gene for marker in found[0]] == ["gene 3", "gene 4"]
    assert found[1][0].gene == "gene 7"
    assert found[2] == []  # two cells
    assert found[0][0].inside == 1
    assert 0.4 < found[0][0].outside < 0.9
    assert found[0][0].fold > found[0][1].fold > 1


def test_one_cluster_has_nothing_to_compare_with() -> None:
    values = csr_matrix(np.random.default_rng(0).random((20, 5), dtype=np.float32))
    assert find_markers(values, list("abcde"), np.zeros(20, dtype=int), 3) == [[]]
