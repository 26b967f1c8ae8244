"""The verdict on public embeddings, from cosines alone."""

import numpy as np
import pytest

from tahoex1_hf.embedding.release.comparing import BEST_KNOWN, compare, cosines, intervals, judge, summarise

RANDOM = np.random.default_rng(0)


def near(departure: float, cells: int = 2000, samples: int = 3) -> np.ndarray:
    """Return cosines with about this median departure from 1."""
    return 1 - departure * np.exp(0.7 * RANDOM.standard_normal((samples, cells)))


def test_cosines_and_their_summary() -> None:
    one, other = np.array([[1, 0], [3, 4], [0, 0]]), np.array([[2.0, 0], [4, 3], [1, 1]])
    np.testing.assert_allclose(cosines(one, other), [1, 0.96, 0])
    found = summarise(np.array([[1.0, 0.9, 0.8], [1.0, 1.0, 0.94]]))
    assert (found.median, found.below) == (0.95, 0.5)
    assert found.mean == pytest.approx(0.94)


def test_intervals_hold_the_truth_nineteen_times_of_twenty() -> None:
    inside = 0
    for _ in range(40):
        low, high = intervals(1 - 0.01 * RANDOM.exponential(size=300))
        inside += low.mean <= 0.99 <= high.mean
    assert 33 <= inside <= 40  # 38 are expected


@pytest.mark.parametrize(
    ("public", "floor", "verdict"),
    [
        (1e-3, 1e-3, "floor"),
        (1.5e-3, 1e-3, "floor"),
        (5e-5, 1e-7, "floor"),  # nothing that anyone could see
        (4e-3, 1e-3, "known"),
        (5e-3, 1e-6, "known"),
        (1.2e-2, 1e-3, "farther"),
        (0.4, 1e-3, "farther"),
    ],
)
def test_verdicts(public: float, floor: float, verdict: str) -> None:
    assert judge(near(public), near(floor)) == verdict


def test_a_handful_of_far_cells_among_thousands_is_chance() -> None:
    floor, public = near(1e-5), near(1e-5)
    public[:, :5] = 0.9
    assert judge(public, floor) == "floor"
    public[:, :20] = 0.9  # 1 %, as in the best known reproduction
    assert judge(public, floor) == "known"


def test_each_of_the_three_numbers_must_be_good() -> None:
    floor = near(1e-5)
    some_far = near(1e-5)
    some_far[:, :40] = 0.9  # 2 % of the cells
    assert summarise(some_far).median > BEST_KNOWN.median
    assert summarise(some_far).mean > BEST_KNOWN.mean
    assert judge(some_far, floor) == "farther"
    far_mean = near(1e-5)
    far_mean[:, :400] = 0.951
    assert judge(far_mean, floor) == "farther"


def test_public_embeddings_and_our_other_run_are_compared_with_the_same_samples() -> None:
    public, low, bare, *samples = RANDOM.standard_normal((6, 5, 8))
    found = compare(public, samples, low, bare)
    np.testing.assert_array_equal(found.public, [cosines(public, samples[1]), cosines(public, samples[2])])
    np.testing.assert_array_equal(found.floor, [cosines(low, samples[1]), cosines(low, samples[2])])
    np.testing.assert_array_equal(found.sampling[1], cosines(samples[0], samples[2]))
    np.testing.assert_array_equal(found.precision, cosines(low, samples[0]))
    np.testing.assert_array_equal(found.without_drug, cosines(bare, samples[0]))
    assert compare(public, samples, low, None).without_drug is None
