# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cosines between public embeddings and ours, and the verdict on them.

How the public embeddings were made is only partly known, so two right runs differ: they keep other genes of cells that
are longer than the context, and compute in other precisions. How far, is measured: a run of our own, in bfloat16, is
compared with further samples in float32, and the public embeddings with the very same samples.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

LOW = 0.95
"""Cosine below which an embedding counts as far off."""

# Two embeddings with this distance are the same for every use.
SLACK = 1e-4
# As near as our own floor: a departure of up to so many times that of our own two runs.
FACTOR = 2.0
# Where none of the floor's cells is below `LOW`, so many may be by chance.
_FEW = 0.002

_BOOTSTRAPS, _SEED = 1000, 0
_NUMBERS_AT_ONCE = 2**22  # of all resamples that are in memory together

Verdict = Literal["floor", "known", "farther"]

VERDICTS: dict[Verdict, str] = {
    "floor": "as near as our own floor: the public embeddings differ from ours as much as two runs of ours do",
    "known": "as near as the best known reproduction, but farther than our own floor",
    "farther": "farther than the best known reproduction",
}


@dataclass(frozen=True)
class Summary:
    """How near embeddings are to others.

    Attributes:
        median: Median cosine over the cells.
        mean: Mean cosine.
        below: Share of the cells below `LOW`.
    """

    median: float
    mean: float
    below: float


BEST_KNOWN = Summary(0.9948, 0.9919, 0.0107)
"""The best known reproduction of the public embeddings: pull request 83 of the original program."""


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of a matrix with the same row of another, `(cells,)` float64."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: np.ndarray = np.clip((a * b).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny), -1, 1)
    return found


def summarise(values: np.ndarray) -> Summary:
    """Summarise cosines, `(cells,)`, or `(samples, cells)`, of which the samples' summaries are averaged."""
    rows = np.atleast_2d(values)
    return Summary(float(np.median(rows, axis=1).mean()), float(rows.mean()), float((rows < LOW).mean()))


def intervals(values: np.ndarray) -> tuple[Summary, Summary]:
    """Return the lower and upper ends of 95 % intervals, by resampling the cells, of what `summarise` returns."""
    rows = np.atleast_2d(values)
    random, cells = np.random.default_rng(_SEED), rows.shape[1]
    found = []
    at_once = max(1, _NUMBERS_AT_ONCE // rows.size)
    for start in range(0, _BOOTSTRAPS, at_once):
        some = rows[:, random.integers(0, cells, (min(at_once, _BOOTSTRAPS - start), cells))]
        found.append([np.median(some, axis=2).mean(0), some.mean((0, 2)), (some < LOW).mean((0, 2))])
    low, high = np.quantile(np.concatenate(found, axis=1), [0.025, 0.975], axis=1)
    return Summary(*map(float, low)), Summary(*map(float, high))


def judge(public: np.ndarray, floor: np.ndarray) -> Verdict:
    """Judge how near public embeddings are to ours.

    Args:
        public: `(samples, cells)` cosines of the public embeddings with samples of ours.
        floor: `(samples, cells)` cosines of another run of ours with the same samples.

    Returns:
        `"floor"` where the departures (1 - cosine) in median and mean are at most `FACTOR` times those of the floor
        and `SLACK`, and the share below `LOW` at most `FACTOR` times its share and 0.2 %; `"known"` where median, mean
        and share are as good as `BEST_KNOWN`; otherwise `"farther"`. The better end of the interval counts.
    """
    own = summarise(floor)
    low, high = intervals(public)
    near = (
        1 - high.median <= FACTOR * (1 - own.median) + SLACK
        and 1 - high.mean <= FACTOR * (1 - own.mean) + SLACK
        and low.below <= FACTOR * own.below + _FEW
    )
    if near:
        return "floor"
    known = high.median >= BEST_KNOWN.median and high.mean >= BEST_KNOWN.mean and low.below <= BEST_KNOWN.below
    return "known" if known else "farther"


@dataclass(frozen=True)
class Comparison:
    """Cosines of every cell.

    Attributes:
        public: `(samples, cells)`, the public embedding with samples of ours in float32.
        floor: `(samples, cells)`, our run in bfloat16 with the same samples.
        sampling: `(samples, cells)`, another sample of ours in float32 with the same samples.
        precision: `(cells,)`, the run in bfloat16 with that in float32 of the same sample.
        without_drug: `(cells,)`, that sample with and without the drug token; None for a model without drugs.
        public_without_drug: `(cells,)`, the public embedding with that sample without the drug token.
    """

    public: np.ndarray
    floor: np.ndarray
    sampling: np.ndarray
    precision: np.ndarray
    without_drug: np.ndarray | None
    public_without_drug: np.ndarray | None

    @cached_property
    def verdict(self) -> Verdict:
        """How near the public embeddings are."""
        return judge(self.public, self.floor)


def compare(
    public: np.ndarray, samples: list[np.ndarray], low_precision: np.ndarray, without_drug: np.ndarray | None
) -> Comparison:
    """Compare public embeddings with ours, and ours with one another.

    Args:
        public: `(cells, width)` public embeddings.
        samples: The same of ours, in float32, for at least two seeds of the sampling.
        low_precision: The same in bfloat16, with the first seed.
        without_drug: The same in float32, with the first seed and without the drug token; None for a model without
            drugs.
    """
    first, others = samples[0], samples[1:]
    return Comparison(
        public=np.stack([cosines(public, each) for each in others]),
        floor=np.stack([cosines(low_precision, each) for each in others]),
        sampling=np.stack([cosines(first, each) for each in others]),
        precision=cosines(low_precision, first),
        without_drug=None if without_drug is None else cosines(without_drug, first),
        public_without_drug=None if without_drug is None else cosines(public, without_drug),
    )
