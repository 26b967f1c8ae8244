"""The cells of a training batch follow from the seed and the step's number."""

import numpy as np
import pytest

from tahoex1_hf.finetuning.batches import TrainingBatches, epoch_order


def test_order_of_the_cells_follows_from_the_seed() -> None:
    rows, lengths = np.arange(10, 110), np.random.default_rng(0).integers(5, 50, 200)
    first = epoch_order(rows, lengths, 8, seed=3, epoch=1)
    assert np.array_equal(first, epoch_order(rows, lengths, 8, seed=3, epoch=1))
    assert first.shape == (12, 8)
    assert len(np.unique(first)) == 96
    assert set(first.ravel()) <= set(rows)
    assert not np.array_equal(first, epoch_order(rows, lengths, 8, seed=3, epoch=2))
    assert np.ptp(lengths[first], axis=1).mean() < 0.3 * np.ptp(lengths[rows])  # similar lengths share a batch


def test_steps_are_shared_by_processes_and_resume() -> None:
    lengths = np.full(40, 9)

    def steps(rank: int, processes: int, done: int = 0) -> list[np.ndarray]:
        batches = TrainingBatches(lambda rows, _: {"rows": rows}, np.arange(40), lengths, 8, 0, (rank, processes))
        batches.max_steps, batches.done = 12, lambda: done
        return [batch["rows"] for batch in batches]

    alone, (first, second) = steps(0, 1), (steps(0, 2), steps(1, 2))
    assert len(alone) == 12
    for whole, *halves in zip(alone, first, second, strict=True):
        assert set(whole) == set(np.concatenate(halves))
    assert all(np.array_equal(a, b) for a, b in zip(alone[7:], steps(0, 1, done=7), strict=True))
    with pytest.raises(ValueError, match="batch_size=8 cannot be shared evenly by 3 processes"):
        steps(0, 3)
