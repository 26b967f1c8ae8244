# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tell by embeddings of genes which sets they are in: the original's benchmark of the 50 Hallmark pathways."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.cell_embeddings import Computing
from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.gene_embeddings import common_genes, expressed_genes, finite_embeddings, left_out
from tahoex1_hf.benchmarking.gene_sets import GeneSets
from tahoex1_hf.benchmarking.heads import GRIDS, Part, logistic_scores, mlp_scores
from tahoex1_hf.benchmarking.resampling import Measurement, auprc, bootstrapped, macro_auprc
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.common.digests import json_digest

SEEDS = 5  # the MLP varies from seed to seed
PARTITIONS, LOGISTIC, MLP = "a fifth of the genes", "logistic regression", "MLP"
_SHARES = (
    0.7,
    0.05,
    0.05,
)  # to train on, to end the training by, and to choose the MLP's shape by; the rest is tested
_FEWEST = 40  # genes, so that every part has two
_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "macro_auprc": macro_auprc,
    "auprc": lambda truth, scores: auprc(truth.ravel(), scores.ravel()),
}


@dataclass
class Hallmark:
    """The task `hallmark`.

    Attributes:
        sets: Cells from which expression, PCA loadings and contextual embeddings are computed.
        genes: Genes, and the sets that they are in.
        seeds: Number of partitions of the genes.
        grid: Shapes of the MLP that are tried, a key of `GRIDS`.
        computing: How models are run.
    """

    sets: Sequence[EvaluationFile]
    genes: GeneSets
    seeds: int = SEEDS
    grid: str = "small"
    computing: Computing = field(default_factory=Computing)

    name = "hallmark"
    headline = (PARTITIONS, LOGISTIC, "macro_auprc")
    axis = "genes"

    def __post_init__(self) -> None:
        self.genes = expressed_genes(self.genes, self.sets)
        self.notes: list[str] = []

    @property
    def dataset(self) -> str:
        """Names of the cells."""
        return " + ".join(each.name for each in self.sets)

    def settings(self) -> dict[str, Any]:
        """Return everything on which the scores depend but the source."""
        genes = [self.genes.names.tolist(), np.packbits(self.genes.members).tolist(), self.genes.titles]
        return {
            "seeds": self.seeds,
            "grid": self.grid,
            "cells": [each.fingerprint() for each in self.sets],
            "genes": json_digest(genes),
            **self.computing.settings(),
        }

    def prepare(self, sources: Sequence[Source]) -> None:
        """Keep to the genes that all sources know, so that they are compared on the same genes."""
        self.genes = common_genes(self.genes, sources, self.sets)
        number, tested = len(self.genes.names), len(partition(len(self.genes.names), 0)[-1])
        if number < _FEWEST:
            raise ValueError(f"--gene-sets: {number} genes are left, too few for four parts ({left_out(self.genes)}).")
        self.notes.append(
            f"{number} genes of {len(self.genes.titles)} sets, {tested} of them tested with each seed; a gene is in "
            f"{self.genes.members.mean():.1%} of the sets on average. Left out: {left_out(self.genes)}."
        )

    def evaluate(self, source: Source) -> list[Measurement]:
        """Return the scores of a source."""
        found = finite_embeddings(source, self.sets, self.genes.names, 0, self.computing)
        return [
            measured
            for kind, features in found.items()
            for reader in (LOGISTIC, MLP)
            for measured in self.read(kind, features, reader)
        ]

    def read(self, kind: str, features: np.ndarray, reader: str) -> Iterator[Measurement]:
        """Yield the scores of the memberships that a reader reads from features of a kind, shape `(genes, width)`."""
        from sklearn.preprocessing import StandardScaler

        members, total = self.genes.members, len(features)
        values: dict[str, list[np.ndarray]] = {name: [] for name in _METRICS}
        numbers, seconds = [], []
        for seed in range(self.seeds):
            started = time.perf_counter()
            train, validation, choosing, test = partition(total, seed)
            scaled = StandardScaler().fit(features[train]).transform(features)
            if reader == LOGISTIC:
                scores = logistic_scores(scaled[train], members[train], scaled[test])
            else:
                first, second, third = (Part(scaled[rows], members[rows]) for rows in (train, validation, choosing))
                scores = mlp_scores(first, second, third, scaled[test], GRIDS[self.grid], seed)
            seconds.append(time.perf_counter() - started)
            numbers.append(len(test))
            for name, metric in _METRICS.items():
                values[name].append(bootstrapped(metric, members[test], scores, test, total))
        for name, each in values.items():
            yield Measurement(kind, reader, PARTITIONS, name, np.stack(each), numbers, seconds)

    def judge(self, found: dict[str, list[Measurement]], sources: Sequence[Source]) -> list[str]:
        """Say nothing: the sets of genes are not of these cells."""
        return []


def partition(number: int, seed: int) -> list[np.ndarray]:
    """Return the four parts of so many genes that the original makes with a seed; the last is tested.

    The original leaves the order of the genes to chance. Here it is that of the Ensembl ids, so that equal seeds give
    equal parts.
    """
    order = np.random.RandomState(seed).permutation(number)  # the original's generator
    return np.split(order, (np.cumsum(_SHARES) * number).astype(int))
