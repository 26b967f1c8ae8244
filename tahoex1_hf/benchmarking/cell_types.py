# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tell cell types apart by embeddings: what can be read with neighbours, a linear model, clusters and three cells."""

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.cell_embeddings import Computing, embed_cells, harmonized
from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.clusters import NEIGHBOURS, leiden
from tahoex1_hf.benchmarking.cz_benchmarks import cz_scores
from tahoex1_hf.benchmarking.integration import integration
from tahoex1_hf.benchmarking.overlap import check_not_trained_on
from tahoex1_hf.benchmarking.resampling import Measurement, bootstrapped, macro_f1
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.finetuning.splits import make_splits

logger = logging.getLogger(__name__)

FOLDS, SHOTS, SHOT_SAMPLES = 5, 3, 5
RANDOM, BATCH, FEW, ALL = "random folds", "batch left out", f"{SHOTS} cells a class", "all cells"
_MOST_DISTANCES = 10_000  # cells among which all distances are computed
_PERMUTATIONS = 3

Fold = tuple[np.ndarray, np.ndarray]
"""Row numbers of the training and of the test cells."""


@dataclass
class CellTypes:
    """The task `cell-types`.

    Attributes:
        cells: Cells.
        label: Column of obs with the labels.
        batch: Column of obs with the batches, each of which is left out once; None for no such split.
        seeds: Number of times that the random folds are made.
        computing: How models are run.
    """

    cells: EvaluationFile
    label: str
    batch: str | None = None
    seeds: int = 1
    computing: Computing = field(default_factory=Computing)

    name = "cell-types"
    headline = (RANDOM, "kNN", "macro_f1")
    axis = "cells"

    def __post_init__(self) -> None:
        self.labels, self.classes = self.cells.labels(self.label, "--label")
        self.batches = None if self.batch is None else self.cells.labels(self.batch, "--batch")[0]
        self.notes: list[str] = []

    @property
    def dataset(self) -> str:
        """Name of the data."""
        return self.cells.name

    def settings(self) -> dict[str, Any]:
        """Return everything on which the scores depend but the source."""
        names = {name: getattr(self, name) for name in ("label", "batch", "seeds")}
        return names | {"cells": self.cells.fingerprint()} | self.computing.settings()

    def prepare(self, sources: Sequence[Source]) -> None:
        """Check before any work is done that no model was trained on the cells."""
        for source in sources:
            if source.kind == "model" and (note := check_not_trained_on(source, self.cells)):
                self.notes.append(note)
        if not find_spec("igraph"):
            self.notes.append("Leiden clusters are left out, for want of igraph: pip install 'tahoex1_hf[evaluate]'.")
        if self.batch is not None and find_spec("scib_metrics"):
            self.notes.append("The intervals of scib-metrics are from random halves of the cells, not from resamples.")
        elif self.batch is not None:
            self.notes.append(
                "Batch integration is left out, for want of scib-metrics: pip install 'tahoex1_hf[evaluate]'."
            )

    # Splits -----------------------------------------------------------------------------------------

    def folds(self) -> dict[str, list[Fold]]:
        """Return the folds of every split."""
        every = np.arange(len(self.labels))
        found: dict[str, list[Fold]] = {RANDOM: []}
        for seed in range(self.seeds):
            splits = make_splits(self.labels, folds=FOLDS, seed=seed)
            found[RANDOM] += [(np.setdiff1d(every, split.test), split.test) for split in splits]
        if self.batches is not None:
            parts = [np.flatnonzero(self.batches == number) for number in np.unique(self.batches)]
            found[BATCH] = [(np.setdiff1d(every, test), test) for test in parts]
        found[FEW] = [few_cells(self.labels, seed) for seed in range(SHOT_SAMPLES)]
        return found

    # Scores -----------------------------------------------------------------------------------------

    def evaluate(self, source: Source) -> list[Measurement]:
        """Return the scores of a source."""
        features = self.embed(source)
        found = [*self.scores(features), *cz_scores(features, self.labels)]
        if self.batches is not None and find_spec("scib_metrics"):
            found += integration(features, self._plain, self.labels, self.batches)
        return found

    def embed(self, source: Source) -> Any:
        """Return the embeddings of a source, shape `(cells, width)`."""
        if source.kind == "harmony" and self.batches is not None:
            return harmonized(self.cells, self.batches, 0)
        return embed_cells(source, self.cells, 0, self.computing)

    def scores(self, features: Any) -> list[Measurement]:
        """Return the scores of embeddings, shape `(cells, width)`, in this benchmark's own splits."""
        found = [
            self.read(features, split, folds, reader)
            for split, folds in self.folds().items()
            for reader in ("kNN", "logistic regression")
        ]
        return [*found, *self._clusters(features)]

    @cached_property
    def _plain(self) -> np.ndarray:
        """PCA of the cells."""
        return np.asarray(embed_cells(Source("PCA", "pca"), self.cells, 0, self.computing))

    def read(self, features: Any, split: str, folds: list[Fold], reader: str) -> Measurement:
        """Return the macro-F1 of the labels that a reader reads from features, shape `(cells, width)`."""
        values, numbers, seconds = [], [], []
        for train, test in folds:
            started = time.perf_counter()
            predicted = read_classes(features, self.labels, train, test, reader, 1 if split == FEW else NEIGHBOURS)
            seconds.append(time.perf_counter() - started)
            values.append(bootstrapped(macro_f1, self.labels[test], predicted, test, len(self.labels)))
            numbers.append(len(test))
        return Measurement("", reader, split, "macro_f1", np.stack(values), numbers, seconds)

    def _clusters(self, features: Any) -> Iterator[Measurement]:
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples

        labels, started = self.labels, time.perf_counter()
        rows = every = np.arange(len(labels))
        if len(rows) > _MOST_DISTANCES:
            rows = np.sort(np.random.default_rng(0).choice(rows, _MOST_DISTANCES, replace=False))
        widths = silhouette_samples(features[rows], labels[rows])
        values = bootstrapped(lambda _, chosen: float(chosen.mean()), labels[rows], widths, rows, len(labels))
        spent = [time.perf_counter() - started]
        yield Measurement("", "distances", ALL, "silhouette", values[None], [len(rows)], spent)
        if not find_spec("igraph"):
            return
        scores = {"ari": adjusted_rand_score, "nmi": normalized_mutual_info_score}
        replicates: dict[str, list[np.ndarray]] = {name: [] for name in scores}
        seconds = []
        for seed in range(self.seeds):
            started = time.perf_counter()
            clusters = leiden(features, seed)
            seconds.append(time.perf_counter() - started)
            for name, score in scores.items():
                replicates[name].append(bootstrapped(score, labels, clusters, every, len(labels)))
        for name, each in replicates.items():
            yield Measurement("", "Leiden", ALL, name, np.stack(each), [len(labels)] * self.seeds, seconds)

    def judge(self, found: dict[str, list[Measurement]], sources: Sequence[Source]) -> list[str]:
        """Say whether the labels can be read at all: whether PCA reads them better than labels by chance."""
        pca = next(source for source in sources if source.kind == "pca" and not source.what)
        value = next(m for m in found[pca.name] if (m.split, m.reader, m.metric) == self.headline).value
        chance = self.chance(embed_cells(pca, self.cells, 0, self.computing))
        least = needed(chance)
        if value >= least:
            return [f"The labels can be read: kNN on {pca.name} {value:.3f}, by chance {chance:.3f}."]
        return [
            f"**Unfit label**: kNN on {pca.name} reads {self.label} with a macro-F1 of {value:.3f}, by chance "
            f"{chance:.3f}; below {least:.3f} the label does not fit the counts, and no score here says anything."
        ]

    def chance(self, features: Any) -> float:
        """Return the mean macro-F1 of kNN on shuffled labels."""
        scores = []
        for seed in range(_PERMUTATIONS):
            shuffled = np.random.default_rng(seed).permutation(self.labels)
            for split in make_splits(shuffled, folds=FOLDS, seed=seed):
                train = np.setdiff1d(np.arange(len(shuffled)), split.test)
                predicted = read_classes(features, shuffled, train, split.test, "kNN", NEIGHBOURS)
                scores.append(macro_f1(shuffled[split.test], predicted))
        return float(np.mean(scores))


def needed(chance: float) -> float:
    """Return the macro-F1 that a readable label has: three times chance, or half the way to 1 where that is less."""
    return min(3 * chance, (1 + chance) / 2)


def few_cells(labels: np.ndarray, seed: int) -> Fold:
    """Return three random training cells of every class that has more, and the other cells of these classes."""
    random = np.random.default_rng(seed)
    parts = [random.permutation(np.flatnonzero(labels == kind)) for kind in np.unique(labels)]
    parts = [part for part in parts if len(part) > SHOTS]
    if len(parts) < 2:
        raise ValueError(f"fewer than two classes have more than {SHOTS} cells.")
    train, test = (
        np.sort(np.concatenate(each)) for each in zip(*((p[:SHOTS], p[SHOTS:]) for p in parts), strict=True)
    )
    return train, test


def read_classes(
    features: Any, labels: np.ndarray, train: np.ndarray, test: np.ndarray, reader: str, neighbours: int
) -> np.ndarray:
    """Fit a reader to the training cells, and return the classes that it predicts for the test cells.

    Args:
        features: Embeddings, shape `(cells, width)`, dense or CSR.
        labels: Class numbers, shape `(cells,)`.
        train: Row numbers of the training cells.
        test: Row numbers of the test cells.
        reader: `kNN` or `logistic regression`.
        neighbours: Number of neighbours of kNN.
    """
    from scipy.sparse import issparse
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model: Any = KNeighborsClassifier(min(neighbours, len(train)))
    if reader != "kNN":
        model = LogisticRegression(max_iter=2000)
        # Centred expression would no longer be sparse; log-normalised counts have one scale as they are.
        model = model if issparse(features) else make_pipeline(StandardScaler(), model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        model.fit(features[train], labels[train])
    return np.asarray(model.predict(features[test]))
