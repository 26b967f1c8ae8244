# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare effects with those of null genes: strata of expression, pooled, with a fitted tail where it fits.

How far a gene moves a cell depends on how strongly the cell expresses it. The trend over expression is therefore taken
out of the null effects, they are centred and scaled within strata of genes of similar expression, and the strata are
pooled: so thousands of null genes stand behind a p value, and not just the nearest.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ENOUGH = 10  # null effects as extreme as the observed after which no more are measured
COUNTED, FITTED = "count", "tail"

_TREND = 100  # least null genes for a trend over expression
_STRATUM = 40  # least null genes of a stratum
_SAME = 0.01  # strata whose scores differ with a smaller p value are not pooled
_TAIL = 250  # most null effects that a tail is fitted to
_LEAST_TAIL = 40  # fewest; they are also at most a quarter of all
_FITS = 0.05  # a tail that fits with a smaller p value is not used
_RESAMPLES = 200


def strata(coordinates: np.ndarray) -> np.ndarray:
    """Cut genes into strata of similar expression, at medians, along the longer side of what is cut.

    Args:
        coordinates: Expression of the genes, shape `(genes, axes)`.

    Returns:
        `(genes,)` number of the stratum of each gene. A stratum has 40 genes or more, where there are as many.
    """
    found = np.zeros(len(coordinates), dtype=np.int64)
    todo, number = [np.arange(len(coordinates))], 0
    while todo:
        rows = todo.pop()
        if len(rows) >= 2 * _STRATUM:
            axis = int(np.argmax(np.ptp(coordinates[rows], axis=0)))
            order = rows[np.argsort(coordinates[rows, axis], kind="stable")]
            # Genes of the same expression stay together.
            cut = int(np.searchsorted(coordinates[order, axis], coordinates[order[len(order) // 2], axis]))
            if _STRATUM <= cut <= len(order) - _STRATUM:
                todo += [order[cut:], order[:cut]]
                continue
        found[rows] = number
        number += 1
    return found


@dataclass(frozen=True)
class Tested:
    """What the null effects say about an observed effect.

    Attributes:
        p_value: (1 + null effects as extreme) / (1 + null effects), or the fitted tail's; NaN without null effects.
        extreme: Number of null effects as extreme.
        n_null: Number of null effects.
        method: `count` or `tail`; empty without null effects.
    """

    p_value: float
    extreme: int
    n_null: int
    method: str


class NullEffects:
    """Effects of null genes, in the cells of one group.

    Args:
        effects: Effects, shape `(null genes,)`, finite.
        coordinates: Expression of the null genes, shape `(null genes, axes)`.
        two_sided: Whether effects are extreme in both directions from their stratum's median, or upwards only; effects
            that are so are distances, and are scaled as logarithms.
        seed: Seed of the test of the tail's fit.
    """

    def __init__(self, effects: np.ndarray, coordinates: np.ndarray, two_sided: bool, seed: int = 0):
        self.two_sided, self.seed, self.coordinates = two_sided, seed, coordinates
        # A gene that moves nothing would be at minus infinity: it is put just below the smallest shift.
        positive = effects[effects > 0]
        self._floor = 0.5 * float(positive.min()) if len(positive) else 1.0
        self._trend = np.zeros(1)
        if len(effects) >= _TREND:
            self._trend = _robust_fit(self._terms(coordinates), self._scaled(effects, coordinates))
        self.values = self._scaled(effects, coordinates)
        self.strata = strata(coordinates)

    def _scaled(self, effects: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
        values = effects if self.two_sided else np.log(np.maximum(effects, self._floor))
        return values - self._terms(coordinates)[:, : len(self._trend)] @ self._trend

    def _terms(self, coordinates: np.ndarray) -> np.ndarray:
        """Return constant, linear and quadratic terms; genes outside the null genes' range count as at its end."""
        if not len(coordinates):
            return np.ones((0, 1))
        low, high = self.coordinates.min(axis=0), self.coordinates.max(axis=0)
        scaled = (np.clip(coordinates, low, high) - low) / np.where(high > low, high - low, 1.0)
        axes = range(scaled.shape[1])
        pairs = [scaled[:, one] * scaled[:, other] for one in axes for other in axes if one <= other]
        return np.column_stack([np.ones(len(scaled)), scaled, *pairs])

    def _scores(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        """Return how extreme values are among the null effects `of`: distances from their median in their spreads."""
        middle = np.median(of)
        spread = np.subtract(*np.percentile(of, [75, 25])) or np.ptp(of) or 1.0
        scores = (values - middle) / spread
        return np.abs(scores) if self.two_sided else scores

    @cached_property
    def scores(self) -> np.ndarray:
        """Scores of the null effects, each among those of its stratum, shape `(null genes,)`."""
        found = np.empty(len(self.values))
        for number in np.unique(self.strata):
            own = self.strata == number
            found[own] = self._scores(self.values[own], self.values[own])
        return found

    @cached_property
    def poolable(self) -> bool:
        """Whether the scores of all strata look alike (Anderson and Darling's test of several samples)."""
        from scipy.stats import anderson_ksamp

        parts = [self.scores[self.strata == number] for number in np.unique(self.strata)]
        if len(parts) < 2 or len(np.unique(self.scores)) < 2:
            return True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="p-value")  # of its table's ends, 0.001 and 0.25
            # Midranks are the default; SciPy 1.17 wants them named by an argument that earlier ones do not have.
            warnings.filterwarnings("ignore", message=".*variant")
            return bool(anderson_ksamp(parts).pvalue >= _SAME)

    @cached_property
    def _tail(self) -> tuple[float, float, float, float] | None:
        return fitted_tail(self.scores, self.seed)

    def test(self, effect: float, coordinates: np.ndarray, without: int | None = None) -> Tested:
        """Compare an effect with the null effects.

        Args:
            effect: Effect.
            coordinates: Expression of its genes, shape `(axes,)`.
            without: Place of the gene itself among the null genes, where it is one.
        """
        kept = np.ones(len(self.values), dtype=bool)
        if without is not None:
            kept[without] = False
        if not kept.any() or not np.isfinite(effect):
            return Tested(float("nan"), 0, int(kept.sum()), "")
        nearest = np.argmin(np.where(kept, ((self.coordinates - coordinates) ** 2).sum(axis=1), np.inf))
        own = (self.strata == self.strata[nearest]) & kept
        score = self._scores(self._scaled(np.array([effect]), coordinates[None]), self.values[own])[0]
        if not self.poolable:
            kept = own
        scores = self.scores[kept] if self.poolable else self._scores(self.values[own], self.values[own])
        # Equal effects count as extreme, also where their scores differ by roundings.
        extreme, number = int((scores >= score - 1e-9 * max(1.0, abs(score))).sum()), int(kept.sum())
        counted = (1 + extreme) / (1 + number)
        tail = None
        if extreme < ENOUGH and self.poolable:
            # The gene itself must not shape the tail that it is compared with.
            tail = self._tail if without is None else fitted_tail(scores, self.seed)
        if tail is not None:
            start, share, shape, scale = tail
            if score > start:
                from scipy.stats import genpareto

                return Tested(float(share * genpareto.sf(score - start, shape, scale=scale)), extreme, number, FITTED)
        return Tested(counted, extreme, number, COUNTED)


def _robust_fit(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return coefficients by Huber's loss, to which the few genes with a true effect matter little."""
    from scipy.optimize import least_squares

    start = np.linalg.lstsq(terms, values, rcond=None)[0]
    rest = np.abs(values - terms @ start)
    spread = float(np.median(rest)) or 1.0
    return least_squares(
        lambda found: terms @ found - values, start, jac=lambda _: terms, loss="huber", f_scale=1.5 * spread
    ).x


def fitted_tail(scores: np.ndarray, seed: int) -> tuple[float, float, float, float] | None:
    """Fit a generalised Pareto distribution to the largest scores.

    It is fitted to the largest 250, and to fewer until Anderson and Darling's test, with samples of the fitted
    distribution, does not reject it (Knijnenburg et al. 2009, doi:10.1093/bioinformatics/btp211). A shape below 0
    would end the tail, and make any larger effect impossible; it is taken as 0.

    Args:
        scores: Scores, shape `(null genes,)`.
        seed: Seed of the test.

    Returns:
        Start of the tail, share of the scores in it, shape and scale; None where no tail fits.
    """
    from scipy.stats import genpareto

    ordered, random = np.sort(scores)[::-1], np.random.default_rng(seed)
    number = min(_TAIL, len(scores) // 4)
    while number >= _LEAST_TAIL:
        start = float(ordered[number - 1] + ordered[number]) / 2
        excess = ordered[:number] - start
        if excess[-1] > 0:
            shape, scale = _fit(excess)
            observed = _anderson_darling(excess, shape, scale)
            samples = genpareto.rvs(shape, scale=scale, size=(_RESAMPLES, number), random_state=random)
            null = [_anderson_darling(sample, *_fit(sample)) for sample in samples]
            if (1 + sum(value >= observed for value in null)) / (1 + _RESAMPLES) >= _FITS:
                return start, number / len(scores), shape, scale
        number = number * 3 // 4
    return None


def _fit(excess: np.ndarray) -> tuple[float, float]:
    """Return shape and scale by probability-weighted moments (Hosking and Wallis 1987, doi:10.2307/1269343)."""
    ordered = np.sort(excess)
    mean = float(ordered.mean())
    weighted = float((ordered * (1 - (np.arange(1, len(ordered) + 1) - 0.35) / len(ordered))).mean())
    shape = 2 - mean / (mean - 2 * weighted) if mean > 2 * weighted else 0.0
    return (0.0, mean) if shape <= 0 else (shape, mean * (1 - shape))


def _anderson_darling(excess: np.ndarray, shape: float, scale: float) -> float:
    from scipy.stats import genpareto

    chances = np.clip(genpareto.cdf(np.sort(excess), shape, scale=scale), 1e-12, 1 - 1e-12)
    weights = 2 * np.arange(1, len(chances) + 1) - 1
    return float(-len(chances) - (weights * (np.log(chances) + np.log1p(-chances[::-1]))).mean())
