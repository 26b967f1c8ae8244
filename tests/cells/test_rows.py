"""Cells are cut, joined and picked with all that belongs to them."""

import numpy as np
import pandas as pd
import pytest

from tahoex1_hf.cells.ragged import RowViews
from tahoex1_hf.cells.rows import cut_cells, join_cells, pick_cells
from tahoex1_hf.encoding_tahoe_x1 import GeneRows


@pytest.fixture
def rows() -> GeneRows:
    """Cells 100 to 105 of an input; the third expresses nothing."""
    offsets = np.array([0, 2, 5, 5, 6, 9])
    obs = pd.DataFrame({"name": list("abcde")})
    return GeneRows(np.arange(10, 19), np.arange(1, 10, dtype=np.float32), offsets, 100, obs, 7.0)


def cells_of(rows: GeneRows) -> list[tuple[list[int], list[float]]]:
    bounds = zip(rows.offsets, rows.offsets[1:], strict=False)
    return [(rows.tokens[a:b].tolist(), rows.counts[a:b].tolist()) for a, b in bounds]


@pytest.mark.parametrize("at", range(100, 106))
def test_cut_and_joined_again(rows: GeneRows, at: int) -> None:
    parts = [cut_cells(rows, 100, at), cut_cells(rows, at, 105)]
    assert cells_of(parts[0]) + cells_of(parts[1]) == cells_of(rows)
    assert [part.num_cells for part in parts] == [at - 100, 105 - at]
    assert [part.first_cell for part in parts] == [100, at]
    assert [len(part.obs) for part in parts] == [at - 100, 105 - at]
    whole = join_cells(parts)
    assert cells_of(whole) == cells_of(rows)
    assert (whole.first_cell, whole.obs["name"].tolist()) == (100, list("abcde"))


def test_unknown_counts_are_those_of_all_cells(rows: GeneRows) -> None:
    assert cut_cells(rows, 100, 105).unknown_counts == 7
    assert cut_cells(rows, 100, 104).unknown_counts == 0
    after = rows._replace(first_cell=105, unknown_counts=2.5)
    assert join_cells([rows, after]).unknown_counts == 9.5


def test_joined_without_columns_of_obs(rows: GeneRows) -> None:
    bare = rows._replace(obs=None)
    assert join_cells([cut_cells(bare, 100, 102), cut_cells(bare, 102, 105)]).obs is None


def test_picked_and_viewed_in_any_order(rows: GeneRows) -> None:
    numbers = np.array([4, 2, 0, 0])
    expected = [cells_of(rows)[number] for number in numbers]
    assert cells_of(pick_cells(rows, numbers)) == expected
    views = RowViews.of(rows, numbers)
    for v in (views, RowViews.of(rows, np.arange(5)).select(numbers)):
        assert v.genes is rows.tokens
        assert v.counts is rows.counts
        places = zip(v.gene_starts, v.count_starts, v.lengths, strict=True)
        found = [(v.genes[a : a + n].tolist(), v.counts[b : b + n].tolist()) for a, b, n in places]
        assert found == expected


def test_selected_genes_stay_with_their_cells(rows: GeneRows) -> None:
    odd = rows.select(rows.tokens % 2 == 1)
    assert cells_of(odd) == [([11], [2.0]), ([13], [4.0]), ([], []), ([15], [6.0]), ([17], [8.0])]
    assert (odd.first_cell, odd.obs is rows.obs) == (100, True)
