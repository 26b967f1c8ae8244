"""The order of cells has every cell once, however it is asked for, and never changes."""

import pytest

from tahoex1_hf.data.order import CellOrder, MixedOrder


@pytest.mark.parametrize("sizes", [[10], [5, 0, 7, 3], [1] * 20])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_every_position_has_one_cell_however_it_is_asked_for(sizes: list[int], window: int) -> None:
    order = CellOrder(sizes, seed=3, window=window)
    total = sum(sizes)
    for epoch in (0, 1):
        whole = order.cells(epoch, 0, total)
        pairs = list(zip(whole.shards.tolist(), whole.rows.tolist(), strict=True))
        assert sorted(pairs) == [(s, r) for s, size in enumerate(sizes) for r in range(size)]
        for start in range(total):
            for stop in range(start, total + 1):
                part = order.cells(epoch, start, stop)
                assert list(zip(part.shards.tolist(), part.rows.tolist(), strict=True)) == pairs[start:stop]
                assert part.streams.tolist() == whole.streams[start:stop].tolist()
        assert len(set(whole.streams.tolist())) == total


def test_shards_are_named_before_they_are_needed() -> None:
    order = CellOrder([50] * 40, seed=1, window=64)
    for position in range(0, 2000, 37):
        near = order.shards_near(0, position, 64)
        stop = min(position + 64, 2000)
        needed = set(order.cells(0, position, stop).shards.tolist())
        assert needed <= set(near)
        assert len(near) <= 6


def test_the_order_never_changes() -> None:
    """A checkpoint saved today must resume with a later version of this package, and of numpy."""
    cells = CellOrder([5, 3, 4], seed=42, window=6).cells(2, 0, 12)
    assert cells.shards.tolist() == FROZEN[0]
    assert cells.rows.tolist() == FROZEN[1]
    assert cells.streams[:2].tolist() == FROZEN[2]


FROZEN: tuple[list[int], list[int], list[int]] = (
    [1, 0, 0, 0, 0, 0, 2, 1, 2, 1, 2, 2],
    [0, 4, 1, 3, 0, 2, 3, 1, 0, 2, 1, 2],
    [13783819716148779108, 8294614344695508233],
)


def test_a_mixture_goes_through_each_dataset_again_and_again() -> None:
    orders = [CellOrder([7, 6], 1, 4), CellOrder([500], 2, 100)]
    mixture = MixedOrder(orders, [1, 3], 1000, seed=0)
    seen: list[list[tuple[int, int]]] = [[], []]
    for epoch in range(9):
        for start in range(0, 1000, 125):
            for dataset, (_, cells) in enumerate(mixture.cells(epoch, start, start + 125)):
                seen[dataset] += list(zip(cells.shards.tolist(), cells.rows.tolist(), strict=True))
    assert len(seen[0]) + len(seen[1]) == 9000
    assert len(seen[0]) == pytest.approx(9000 / 4, abs=100)
    for cells, size in zip(seen, (13, 500), strict=True):
        passes = [cells[i : i + size] for i in range(0, len(cells) - size, size)]
        assert all(len(set(one)) == size for one in passes)
        assert passes[0] != passes[1]
