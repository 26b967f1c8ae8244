"""Shifts are as large as they were planted, controls are never shared, p values are uniform without an effect."""

import numpy as np
import pytest
from planted_screens import MECHANISMS, WIDTH, planted
from scipy.stats import kstest

from tahoex1_hf.signatures.comparing import Library, compare
from tahoex1_hf.signatures.screen import Columns, Screen, make_screen
from tahoex1_hf.signatures.shifts import BOTH, FIRST, SECOND, Shifts, cosine, p_values, q_values

COLUMNS = Columns("drug", line="line", plate="plate")


def opened(size: float, seed: int = 0, **options: int) -> tuple[np.ndarray, Screen]:
    values, obs = planted(MECHANISMS, size, seed=seed, **options)  # type: ignore[arg-type]
    return values, make_screen(
        "screen", obs.set_index(np.char.add("c", np.arange(len(obs)).astype(str))), COLUMNS, 20, False, 0
    )


def test_a_planted_shift_is_found_in_its_size_whatever_the_plates_do() -> None:
    values, screen = opened(4.0)
    shifts = Shifts(values, screen, 0)
    assert len(screen.conditions) == 2 * len(MECHANISMS)
    truth = 4.0 * np.random.default_rng(5).normal(size=(2, WIDTH)) / WIDTH**0.5
    for number, condition in enumerate(screen.conditions):
        strength = shifts.strength(condition, number)
        kind = MECHANISMS[condition.drug]
        planted_size = np.linalg.norm(truth["AB".index(kind)]) / WIDTH**0.5 if kind in ("A", "B") else 0.0
        assert strength.lower <= planted_size + 0.03
        assert strength.upper >= planted_size - 0.03
        if planted_size:
            assert strength.effect == pytest.approx(planted_size, abs=0.06)
            assert strength.reliability > 0.95
            assert strength.cells_needed < condition.num_cells
        else:
            assert abs(strength.effect) < 0.2
            assert strength.cells_needed > condition.num_cells


def test_halves_share_no_cell_and_do_not_depend_on_the_order() -> None:
    values, screen = opened(1.0)
    for pair in [*screen.controls, *(part.halves for each in screen.conditions for part in each.parts)]:
        assert not set(pair[0]) & set(pair[1])
        assert abs(len(pair[0]) - len(pair[1])) <= 1
    obs = planted(MECHANISMS, 1.0)[1]
    named = obs.set_index(np.char.add("c", np.arange(len(obs)).astype(str)))
    order = np.random.default_rng(0).permutation(len(obs))
    other = make_screen("screen", named.iloc[order], COLUMNS, 20, False, 0)
    np.testing.assert_allclose(
        Shifts(values[order], other, 0).all_shifts(other.conditions, FIRST),
        Shifts(values, screen, 0).all_shifts(screen.conditions, FIRST),
        atol=1e-5,
    )


def test_shared_controls_would_make_drugs_alike_that_do_nothing() -> None:
    """The reason for the halves: without an effect, shifts from the same controls have cosines well above 0."""
    shared, apart = [], []
    for seed in range(4):
        values, screen = opened(0.0, seed, controls=40)
        shifts = Shifts(values, screen, 0)
        first, second = (shifts.all_shifts(screen.conditions, half) for half in (FIRST, SECOND))
        same_line = np.equal.outer([c.line for c in screen.conditions], [c.line for c in screen.conditions])
        pairs = same_line & ~np.eye(len(first), dtype=bool)
        both = shifts.all_shifts(screen.conditions, BOTH)
        shared.append(cosine(both, both)[pairs].mean())
        apart.append(cosine(first, second)[pairs].mean())
    assert np.mean(shared) > 0.3
    assert abs(np.mean(apart)) < 0.1


def test_p_values_are_uniform_without_an_effect_and_small_with_one() -> None:
    similar, effects = [], []
    for seed in range(6):
        values, screen = opened(0.0, seed, cells=20, controls=40)
        shifts = Shifts(values, screen, seed)
        strong_values, strong = opened(4.0, 100)
        strong_shifts = Shifts(strong_values, strong, 0)
        drugs = np.array([each.name for each in strong.conditions], dtype=object)
        lines = np.array([each.line for each in strong.conditions], dtype=object)
        library = Library(drugs, lines, strong_shifts.all_shifts(strong.conditions))
        for drug in MECHANISMS:
            numbers = [number for number, each in enumerate(screen.conditions) if each.drug == drug]
            found = compare(shifts, [screen.conditions[n] for n in numbers], numbers, BOTH, library, 99)
            similar.append(found.p[library.names.index("a1")])  # one of each, since drugs of a mechanism are alike
            effects.append(found.p_effect)
    assert kstest(similar, "uniform").pvalue > 0.01
    assert kstest(effects, "uniform").pvalue > 0.01
    numbers = [number for number, each in enumerate(strong.conditions) if each.drug == "a2"]
    found = compare(strong_shifts, [strong.conditions[n] for n in numbers], numbers, BOTH, library, 199)
    assert found.p_effect == found.p[library.names.index("a1")] == 1 / 200
    assert found.agree[library.names.index("a1")] == 2


def test_p_and_q_values() -> None:
    null = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    np.testing.assert_allclose(p_values(np.array([2.0, 6.0]), null), [3 / 4, 1 / 4])
    np.testing.assert_allclose(q_values(np.array([0.01, np.nan, 0.04])), [0.02, np.nan, 0.04])
