# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Predict how perturbations change mean expression, beside the simple baselines and the reliability of the truth."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.cell_embeddings import Computing
from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.overlap import check_not_trained_on
from tahoex1_hf.benchmarking.perturbed_genes import (
    embeddings_of_perturbed,
    ensembl_ids,
    known_to_model,
    perturbed_names,
)
from tahoex1_hf.benchmarking.report import verdict_sentences, verdicts_of
from tahoex1_hf.benchmarking.resampling import Measurement, bootstrapped
from tahoex1_hf.benchmarking.screens import Screen, quarter_sums
from tahoex1_hf.benchmarking.sources import CEILING, Source

UNSEEN, PAIRS, EVERY = "unseen genes", "pairs of seen genes", "unseen genes, all perturbations"
NO_CHANGE, MEAN_SHIFT, ADDITIVE = "no change", "mean shift", "additive"
PREDICTORS = (NO_CHANGE, MEAN_SHIFT, ADDITIVE, CEILING)
REPRODUCIBLE = 0.7  # least reliability of a perturbation that is scored
# Strengths of the ridge regression, for embeddings whose mean square distance from their mean is 1.
_STRENGTHS = np.logspace(-3, 3, 13)


def with_predictors(sources: Sequence[Source]) -> list[Source]:
    """Add the predictors that need no embeddings."""
    return [*sources, *(Source(name, name) for name in PREDICTORS)]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation over genes; 0 where one of the two is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def reliability(halves: Sequence[np.ndarray]) -> float:
    """Return how well a change that was measured twice agrees, for both halves together (Spearman and Brown)."""
    between = correlation(*halves)
    return 2 * between / (1 + between) if between > -0.5 else -1.0


class Half:
    """One half of all cells whose changes are predicted; the other half chooses what is scored.

    The two halves share no cell, controls included: changes that are measured against the same controls agree by the
    noise of these alone.

    Args:
        screen: Screen.
        sums: Sums that `quarter_sums` returns.
        counts: Its numbers of cells.
        scored: Quarters whose changes are predicted; the others choose, and give the controls of predictions.
    """

    def __init__(self, screen: Screen, sums: np.ndarray, counts: np.ndarray, scored: tuple[int, int]):
        self.screen, self.sums, self.counts = screen, sums, counts
        self.scored = scored
        self.choosing = tuple(quarter for quarter in range(sums.shape[1]) if quarter not in scored)

    def mean(self, group: int, quarters: Sequence[int]) -> np.ndarray:
        """Return the mean expression of a group in some quarters, shape `(genes,)`."""
        return self.sums[group, quarters].sum(axis=0) / self.counts[group, quarters].sum()

    def change(self, group: int, quarters: Sequence[int]) -> np.ndarray:
        """Return the change of a group in some quarters against its line's controls in the same quarters."""
        return self.mean(group, quarters) - self.mean(self.screen.line_of[group], quarters)

    def known_change(self, group: int) -> np.ndarray:
        """Return the change that predictions learn from: all cells of a group, against the controls that choose."""
        every = range(self.sums.shape[1])
        return self.mean(group, list(every)) - self.mean(self.screen.line_of[group], self.choosing)

    def reliability(self, group: int, quarters: Sequence[int]) -> float:
        """Return how well two quarters agree on a group's change."""
        return reliability([self.change(group, [quarter]) for quarter in quarters])

    @cached_property
    def reproducible(self) -> set[int]:
        """Groups whose change is reproducible, by the cells that are not scored."""
        return {int(g) for g in self.screen.tested if self.reliability(g, self.choosing) >= REPRODUCIBLE}

    def trials(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each group that a split scores, with the groups of its line that predictions may learn from."""
        screen = self.screen
        for group in screen.tested.tolist():
            if split != EVERY and group not in self.reproducible:
                continue
            others = screen.tested[(screen.line_of[screen.tested] == screen.line_of[group]) & (screen.tested != group)]
            if split == PAIRS:
                if parts_of(screen, group) is None:
                    continue
            else:
                others = others[[screen.genes(other).isdisjoint(screen.genes(group)) for other in others.tolist()]]
            if len(others) > 1:
                yield group, others


def parts_of(screen: Screen, group: int) -> list[int] | None:
    """Return the groups of the single genes of a pair, in its line; None if it is no pair, or one is not there."""
    single = {
        next(iter(screen.genes(other))): other
        for other in screen.tested.tolist()
        if screen.line_of[other] == screen.line_of[group] and len(screen.genes(other)) == 1
    }
    genes = sorted(screen.genes(group))
    return [single[gene] for gene in genes] if len(genes) == 2 and set(genes) <= set(single) else None


def predicted_change(
    half: Half, kind: str, group: int, others: np.ndarray, features: np.ndarray | None
) -> np.ndarray | None:
    """Predict the change of a group from the other groups.

    Args:
        half: Half of the cells.
        kind: `no change`, `mean shift`, `additive`, or anything else for ridge regression on embeddings.
        group: Group.
        others: Groups that may be learned from.
        features: Embedding of each group's genes, their sum for a pair, NaN where one is unknown, shape
            `(groups, width)`; None for predictors without.

    Returns:
        `(genes,)` change; None where the predictor says nothing.
    """
    from sklearn.linear_model import RidgeCV

    if kind == NO_CHANGE:
        return np.zeros(half.sums.shape[2])
    if kind == ADDITIVE:
        parts = parts_of(half.screen, group)
        if parts is None or not set(parts) <= set(others.tolist()):
            return None
        return sum((half.known_change(part) for part in parts), np.zeros(half.sums.shape[2]))
    changes = np.stack([half.known_change(other) for other in others])
    mean = changes.mean(axis=0)
    if kind == MEAN_SHIFT or features is None or np.isnan(features[group]).any():
        return mean
    known = ~np.isnan(features[others]).any(axis=1)
    if known.sum() < 3:
        return mean
    inputs = features[others[known]]
    middle = inputs.mean(axis=0)
    scale = np.sqrt(((inputs - middle) ** 2).sum(axis=1).mean()) or 1.0
    # The errors do not change when the changes are turned onto their own axes, of which there are fewer than genes.
    turned, axes = _turned(changes[known] - mean)
    model = RidgeCV(_STRENGTHS).fit((inputs - middle) / scale, turned)
    return mean + model.predict(((features[group] - middle) / scale)[None])[0] @ axes


def _turned(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, sizes, axes = np.linalg.svd(changes, full_matrices=False)
    return left * sizes, axes


@dataclass
class Perturbation:
    """The task `perturbation`.

    Attributes:
        screen: Perturbed cells and their controls.
        others: Cells from which expression, PCA loadings and contextual embeddings of genes are computed; where there
            are none, the screen's controls.
        seeds: Number of times that the cells are halved; each half is scored.
        computing: How models are run.
    """

    screen: Screen
    others: Sequence[EvaluationFile] = ()
    seeds: int = 1
    computing: Computing = field(default_factory=Computing)

    name = "perturbation"
    headline = (UNSEEN, "", "pearson")
    axis = "perturbations"

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    @property
    def dataset(self) -> str:
        """Name of the data."""
        return self.screen.cells.name

    def settings(self) -> dict[str, Any]:
        """Return everything on which the scores depend but the source."""
        return {
            "control": self.screen.control,
            "groups": [self.screen.lines, self.screen.names, self.screen.line_of.tolist()],
            "seeds": self.seeds,
            "dtype": self.computing.dtype,
            "cells": [each.fingerprint() for each in (self.screen.cells, *self.others)],
        }

    def prepare(self, sources: Sequence[Source]) -> None:
        """Check before any work is done that no model was trained on the cells, and count the genes that it knows."""
        ids = ensembl_ids(self.screen, perturbed_names(self.screen))
        for source in sources:
            if source.kind != "model":
                continue
            if note := check_not_trained_on(source, self.screen.cells):
                self.notes.append(note)
            self.notes.append(
                f"{source.name} knows {len(known_to_model(source, ids))} of the {len(ids)} genes that are perturbed; "
                "for the others its prediction is the mean shift."
            )

    @cached_property
    def halves(self) -> list[Half]:
        """Halves of the cells, two for each seed."""
        found = []
        for seed in range(self.seeds):
            sums, counts = quarter_sums(self.screen, seed)
            found += [Half(self.screen, sums, counts, scored) for scored in ((0, 1), (2, 3))]
        return found

    def evaluate(self, source: Source) -> list[Measurement]:
        """Return the scores of a source."""
        kinds: dict[str, np.ndarray | None] = {"": None}
        if source.kind not in PREDICTORS:
            sets = self.others or [self.screen.controls()]
            kinds = dict(embeddings_of_perturbed(source, self.screen, sets, self.computing))
        return [
            measurement
            for kind, features in kinds.items()
            for split in (UNSEEN, PAIRS, EVERY)
            for measurement in self.read(source.kind, kind, features, split)
        ]

    def read(self, predictor: str, kind: str, features: np.ndarray | None, split: str) -> Iterator[Measurement]:
        """Yield the scores of a predictor: agreement with the true change, and the share of it that is explained."""
        found: dict[str, list[np.ndarray]] = {"pearson": [], "explained": []}
        numbers, seconds = [], []
        for half in self.halves:
            started = time.perf_counter()
            values, rows = [], []
            for group, others in half.trials(split):
                if predictor == CEILING:
                    values.append((half.reliability(group, half.scored), np.nan))
                    rows.append(group)
                    continue
                predicted = predicted_change(half, predictor, group, others, features)
                if predicted is not None:
                    truth = half.change(group, half.scored)
                    explained = 1 - ((predicted - truth) ** 2).sum() / (truth**2).sum()
                    values.append((correlation(predicted, truth), explained))
                    rows.append(group)
            if rows:
                numbers.append(len(rows))
                seconds.append(time.perf_counter() - started)
                total = len(self.screen.names)
                for name, each in zip(found, np.array(values).T, strict=True):
                    found[name].append(bootstrapped(_mean, each, each, np.array(rows), total))
        for name, each in found.items():
            if numbers and not np.isnan(each[0][0]):
                yield Measurement(kind, "", split, name, np.stack(each), numbers, seconds)

    def judge(self, found: dict[str, list[Measurement]], sources: Sequence[Source]) -> list[str]:
        """Say how many perturbations are reproducible in each line, and compare sources on pairs."""
        screen, notes = self.screen, []
        for number, line in enumerate(screen.lines):
            own = screen.tested[screen.line_of[screen.tested] == number]
            chosen = np.mean([len(half.reproducible & set(own.tolist())) for half in self.halves])
            agree = np.mean([half.reliability(group, half.scored) for half in self.halves for group in own.tolist()])
            notes.append(
                f"{line}: {chosen:.1f} of {len(own)} perturbations are reproducible (two quarters of the cells agree "
                f"on the change, reliability {REPRODUCIBLE} or more; mean of all perturbations {agree:.2f})."
            )
        if not any(half.reproducible for half in self.halves):
            notes.append("**Unfit screen**: no perturbation is reproducible, so that no score here says anything.")
        if pairs := verdicts_of((PAIRS, "", "pearson"), sources, found):
            notes.append(verdict_sentences((PAIRS, "", "pearson"), pairs))
        return notes


def _mean(_: np.ndarray, values: np.ndarray) -> float:
    return float(values.mean())
