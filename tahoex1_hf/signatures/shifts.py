# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Shifts of drugs from their controls: their size, their reliability, and what shifts without a drug are like.

Two shifts that are measured against the same controls agree by the noise of these controls alone. So the controls of
each line and plate are halved, and whatever is compared takes one half each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tahoex1_hf.benchmarking.resampling import ends
from tahoex1_hf.signatures.screen import Condition, Screen

REPLICATES = 200  # of the bootstrap
SPLITS = 20  # random halves, over which reliability is averaged
_KEPT = 8  # strata whose controls' halves and resamples are kept: a screen goes through them in order
RELIABLE = 0.8  # that a signature with enough cells has
_AT_ONCE = 250  # permutations that are computed together

Halves = tuple[int, ...]
FIRST, SECOND, BOTH = (0,), (1,), (0, 1)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosines of each of some vectors with each of others, 0 for vectors of length 0."""
    return unit(first) @ unit(second).T


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1; those of length 0 stay."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


@dataclass(frozen=True)
class Strength:
    """How strong and how reliable a signature is.

    Attributes:
        effect: Length of the shift in units of the controls' spread, without what noise adds; below 0 where noise
            exceeds it.
        lower: Lower end of its 95 % bootstrap interval.
        upper: Upper end.
        reliability: Agreement that two such measurements would have, by split halves (Spearman and Brown).
        cells_needed: Number of the drug's cells for a reliability of 0.8, with as many more controls; infinite where
            the halves do not agree.
    """

    effect: float
    lower: float
    upper: float
    reliability: float
    cells_needed: float


class Shifts:
    """Shifts of the drugs of a screen.

    Args:
        values: Values of the cells, `(cells, width)`, which may lie on disk.
        screen: Drugs and controls.
        seed: Seed of resamples and permutations.
    """

    def __init__(self, values: np.ndarray, screen: Screen, seed: int):
        self.values, self.screen, self.seed = values, screen, seed
        self._controls = [tuple(self._mean(half) for half in pair) for pair in screen.controls]
        self._spreads = [self._spread(np.concatenate(pair)) for pair in screen.controls]
        self._resampled: dict[tuple[int, int], np.ndarray] = {}
        self._split: dict[int, np.ndarray] = {}

    def _mean(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.values[rows]).mean(axis=0, dtype=np.float64)

    def _spread(self, rows: np.ndarray) -> float:
        """Return the root of the sum of the variances of all dimensions."""
        return float(np.sqrt(np.asarray(self.values[rows], dtype=np.float64).var(axis=0, ddof=1).sum()))

    def shift(self, condition: Condition, cells: Halves = BOTH, controls: Halves = BOTH) -> np.ndarray:
        """Return the mean shift of a drug's cells from the controls of their lines and plates.

        Args:
            condition: Drug in a line.
            cells: Halves of its cells.
            controls: Halves of the controls.
        """
        total = np.zeros(self.values.shape[1])
        for part, weight in zip(condition.parts, condition.weights(), strict=True):
            mine = self._mean(np.concatenate([part.halves[half] for half in cells]))
            pair, rows = self._controls[part.stratum], self.screen.controls[part.stratum]
            theirs = np.average([pair[half] for half in controls], axis=0, weights=[len(rows[h]) for h in controls])
            total += weight * (mine - theirs)
        return total

    def all_shifts(self, conditions: Sequence[Condition], controls: Halves = BOTH) -> np.ndarray:
        """Return the shifts of some drugs, `(conditions, width)`."""
        return np.stack([self.shift(condition, BOTH, controls) for condition in conditions])

    def strength(self, condition: Condition, number: int) -> Strength:
        """Return how strong and how reliable a signature is.

        Args:
            condition: Drug in a line.
            number: Its number, which with the seed decides the resamples.
        """
        first, second = self._split_shifts(condition, number)
        agreement = float(np.einsum("sd,sd->s", unit(first), unit(second)).mean())
        reliability = 2 * agreement / (1 + agreement) if agreement > -0.5 else -1.0
        needed = float("inf")
        if 0 < reliability < 1:
            needed = condition.num_cells * RELIABLE / (1 - RELIABLE) * (1 - reliability) / reliability
        # The squared length, to which noise adds nothing, since no two halves share a cell.
        square = float(np.einsum("sd,sd->s", first, second).mean())
        squares = np.concatenate([[square], self._replicates(condition, number)])
        spread = float(np.dot(condition.weights(), [self._spreads[part.stratum] for part in condition.parts])) or 1.0
        low, high = ends(squares)
        effect, lower, upper = (float(np.sign(x) * np.sqrt(abs(x)) / spread) for x in (square, low, high))
        return Strength(effect, lower, upper, reliability, needed)

    def _split_shifts(self, condition: Condition, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shifts of the two halves of cells and controls, each `(splits, width)`, for random halves."""
        random = np.random.default_rng([self.seed, 4, number])
        found = np.zeros((2, SPLITS, self.values.shape[1]))
        for part, weight in zip(condition.parts, condition.weights(), strict=True):
            if part.stratum not in self._split:
                if len(self._split) > _KEPT:
                    self._split.clear()
                rows = np.concatenate(self.screen.controls[part.stratum])
                self._split[part.stratum] = self._halved(rows, np.random.default_rng([self.seed, 5, part.stratum]))
            found += weight * (self._halved(part.rows, random) - self._split[part.stratum])
        return found[0], found[1]

    def _halved(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the means of the two halves of cells, for several random halves, `(2, splits, width)`."""
        half = len(rows) // 2
        mine = np.zeros((SPLITS, len(rows)), dtype=np.float32)
        mine[:, :half] = 1
        mine = random.permuted(mine, axis=1)
        values = np.asarray(self.values[rows], dtype=np.float32)
        return np.stack([mine @ values / half, (1 - mine) @ values / (len(rows) - half)])

    def _replicates(self, condition: Condition, number: int) -> np.ndarray:
        """Return squared lengths for resamples of the drug's cells and of the controls, `(replicates,)`."""
        random = np.random.default_rng([self.seed, 1, number])
        sums = [[np.zeros((REPLICATES, self.values.shape[1])) for _ in range(2)] for _ in range(2)]
        for part, weight in zip(condition.parts, condition.weights(), strict=True):
            mine = [self._resample(half, random) for half in part.halves]
            theirs = [self._resampled_controls(part.stratum, half) for half in (0, 1)]
            for cells in (0, 1):
                for controls in (0, 1):
                    sums[cells][controls] += weight * (mine[cells] - theirs[controls])
        same = np.einsum("rd,rd->r", sums[0][0], sums[1][1])
        return np.asarray((same + np.einsum("rd,rd->r", sums[0][1], sums[1][0])) / 2)

    def _resampled_controls(self, stratum: int, half: int) -> np.ndarray:
        if (stratum, half) not in self._resampled:
            if len(self._resampled) > 2 * _KEPT:
                self._resampled.clear()
            random = np.random.default_rng([self.seed, 2, stratum, half])
            self._resampled[stratum, half] = self._resample(self.screen.controls[stratum][half], random)
        return self._resampled[stratum, half]

    def _resample(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the means of resamples of cells, `(replicates, width)`."""
        times = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), REPLICATES)
        return times.astype(np.float32) @ np.asarray(self.values[rows], dtype=np.float32) / len(rows)

    def null_shifts(self, condition: Condition, controls: Halves, permutations: int, number: int) -> np.ndarray:
        """Return shifts that the drug's cells and controls would have if the drug did nothing.

        Which cells are the drug's is permuted within each line and plate.

        Args:
            condition: Drug in a line.
            controls: Halves of the controls.
            permutations: Number of permutations.
            number: Number of the drug, which with the seed decides the permutations.

        Returns:
            `(permutations, width)` float32.
        """
        random = np.random.default_rng([self.seed, 3, number])
        found = np.zeros((permutations, self.values.shape[1]), dtype=np.float32)
        for part, weight in zip(condition.parts, condition.weights(), strict=True):
            others = np.concatenate([self.screen.controls[part.stratum][half] for half in controls])
            rows = np.concatenate([part.rows, others])
            pool = np.asarray(self.values[rows], dtype=np.float32)
            pool = pool - pool.mean(axis=0)  # changes no difference, and keeps the digits
            treated = len(part.rows)
            for start in range(0, permutations, _AT_ONCE):
                signs = np.full((min(_AT_ONCE, permutations - start), len(rows)), -1 / len(others), dtype=np.float32)
                signs[:, :treated] = 1 / treated
                found[start : start + len(signs)] += weight * (random.permuted(signs, axis=1) @ pool)
        return found


def p_values(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return the share of values without an effect that are as large, the observed one counted among them.

    Args:
        observed: Values, `(n,)`.
        null: Values without an effect, `(permutations, n)`.
    """
    return np.asarray((1 + (null >= observed).sum(axis=0)) / (1 + len(null)))


def q_values(p: np.ndarray) -> np.ndarray:
    """Return the least false discovery rates (Benjamini and Hochberg) at which each p value counts; NaN stays."""
    from scipy.stats import false_discovery_control

    found, known = np.full(p.shape, np.nan), np.isfinite(p)
    if known.any():
        found[known] = false_discovery_control(p[known])
    return found
