"""P values are uniform where there is nothing, small where there is something, and tails are fitted where they fit."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, genpareto, kstest

from tahoex1_hf.perturbation.statistics import NullEffects, fitted_tail, strata


def effects(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return shifts that grow with a gene's expression, and its expression: share of cells, and mean count."""
    random = np.random.default_rng(seed)
    places = random.normal(size=(number, 2)) * [2, 1] - [3, 0]
    return np.exp(-8 + places[:, 0] + 0.5 * places[:, 1] + 0.4 * random.standard_normal(number)), places


def test_p_values_of_random_genes_are_uniform_and_a_planted_effect_is_found() -> None:
    """A thousand random genes of a screen, each beside the others, and one that stands out by 12 times the noise."""
    values, places = effects(1001, 0)
    values[0] = np.exp(-8 + places[0, 0] + 0.5 * places[0, 1] + 0.4 * 12)
    nulls = NullEffects(values, places, two_sided=False)
    assert nulls.poolable
    assert len(np.unique(nulls.strata)) > 8
    tested = [
        nulls.test(value, place, number) for number, (value, place) in enumerate(zip(values, places, strict=True))
    ]
    p = np.array([each.p_value for each in tested])
    assert kstest(p[1:], "uniform").pvalue > 0.05
    # With 20 nearest genes no p value could be below 1/21; here p is known to its tail.
    assert (p[1:] < 0.01).sum() == pytest.approx(10, abs=3 * 10**0.5)
    q = false_discovery_control(p)
    assert q[0] < 1e-3
    assert q[1:].min() > 0.05
    assert tested[0].method == "tail"
    assert {each.method for each in tested if each.extreme >= 10} == {"count"}


def test_effects_in_both_directions() -> None:
    random = np.random.default_rng(1)
    places = random.normal(size=(800, 2))
    values = 0.3 * places[:, 0] + random.standard_normal(800)
    nulls = NullEffects(values, places, two_sided=True)
    p = [
        nulls.test(value, place, number).p_value
        for number, (value, place) in enumerate(zip(values, places, strict=True))
    ]
    assert kstest(p, "uniform").pvalue > 0.05
    low, high = (nulls.test(sign * 6.0, np.zeros(2)).p_value for sign in (-1, 1))
    assert max(low, high) < 1e-4


def test_few_null_effects_are_counted() -> None:
    nulls = NullEffects(np.array([1.0, 2.0, 3.0, 4.0]), np.zeros((4, 1)), two_sided=False)
    assert nulls.test(3.0, np.zeros(1)).p_value == pytest.approx(3 / 5)  # an equal effect is as extreme
    assert nulls.test(100.0, np.zeros(1)).p_value == pytest.approx(1 / 5)
    assert nulls.test(4.0, np.zeros(1), without=3).p_value == pytest.approx(1 / 4)
    assert nulls.test(0.0, np.zeros(1)).p_value == 1
    assert np.isnan(NullEffects(np.zeros(0), np.zeros((0, 1)), True).test(1.0, np.zeros(1)).p_value)
    assert np.isnan(nulls.test(float("nan"), np.zeros(1)).p_value)


def test_strata_of_other_shapes_are_not_pooled() -> None:
    """Where strong genes have effects of another shape, a weak gene is not compared with them."""
    random = np.random.default_rng(2)
    places = np.concatenate([np.zeros((150, 1)), np.ones((150, 1))])
    values = np.concatenate([random.standard_normal(150), np.sign(random.standard_normal(150)) * 2])
    nulls = NullEffects(values, places, two_sided=True)
    assert not nulls.poolable
    found = nulls.test(5.0, np.zeros(1))
    assert (found.n_null, found.method) == (150, "count")


def test_strata_hold_enough_genes_and_genes_of_one_expression_stay_together() -> None:
    places = np.random.default_rng(3).normal(size=(1000, 2))
    places[:300] = 0.5
    found = strata(places)
    assert np.bincount(found).min() >= 40
    assert len(np.unique(found[:300])) == 1
    assert len(np.unique(found)) > 8
    assert strata(places[:50]).tolist() == [0] * 50


@pytest.mark.parametrize("shape", [0.0, 0.25])
def test_tail_is_that_of_the_distribution(shape: float) -> None:
    scores = genpareto.rvs(shape, size=5000, random_state=np.random.default_rng(4))
    found = fitted_tail(scores, 0)
    assert found is not None
    start, share, fitted, scale = found
    far = genpareto.isf(1e-5, shape)
    assert np.log10(share * genpareto.sf(far - start, fitted, scale=scale)) == pytest.approx(-5, abs=1)


def test_tail_that_fits_no_pareto_distribution_is_not_used() -> None:
    """Scores of a few values only, as of genes that few cells express."""
    assert fitted_tail(np.random.default_rng(5).integers(0, 6, 1000).astype(float), 0) is None
    assert fitted_tail(np.arange(20.0), 0) is None
