# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tell essential genes from others by embeddings of genes."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.cell_embeddings import Computing
from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.gene_embeddings import common_genes, expressed_genes, finite_embeddings, left_out
from tahoex1_hf.benchmarking.gene_labels import LabelledGenes
from tahoex1_hf.benchmarking.resampling import Measurement, auprc, auroc, bootstrapped
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.common.digests import json_digest
from tahoex1_hf.finetuning.splits import Split, make_splits

FOLDS = 5
TREES = 100  # as in the original, which takes scikit-learn's default
FAMILY, RANDOM = "family folds", "random folds"
FOREST, LOGISTIC = "random forest", "logistic regression"
_METRICS = {"auroc": auroc, "auprc": auprc}


@dataclass
class Essentiality:
    """The task `essentiality`.

    Attributes:
        sets: Cells from which expression, PCA loadings and contextual embeddings are computed.
        genes: Genes with labels and families.
        seeds: Number of times that the folds are made.
        computing: How models are run.
    """

    sets: Sequence[EvaluationFile]
    genes: LabelledGenes
    seeds: int = 1
    computing: Computing = field(default_factory=Computing)

    name = "essentiality"
    headline = (FAMILY, FOREST, "auroc")
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
        genes = [self.genes.names.tolist(), self.genes.labels.tolist(), self.genes.families.tolist()]
        return {
            "seeds": self.seeds,
            "cells": [each.fingerprint() for each in self.sets],
            "genes": json_digest(genes),
            **self.computing.settings(),
        }

    def prepare(self, sources: Sequence[Source]) -> None:
        """Keep to the genes that all sources know, so that they are compared on the same genes."""
        self.genes = common_genes(self.genes, sources, self.sets)
        vars(self).pop("folds", None)
        self.notes.append(
            f"{len(self.genes.labels)} genes, {int(self.genes.labels.sum())} of them essential; left out: "
            f"{left_out(self.genes)}."
        )

    @cached_property
    def folds(self) -> dict[str, list[Split]]:
        """Folds of every split, the same for all embeddings; no protein family is in two parts of a family fold."""
        found: dict[str, list[Split]] = {FAMILY: [], RANDOM: []}
        for seed in range(self.seeds):
            labels = self.genes.labels
            found[FAMILY] += make_splits(labels, self.genes.families, folds=FOLDS, seed=seed)
            found[RANDOM] += make_splits(labels, folds=FOLDS, seed=seed)
        return found

    def evaluate(self, source: Source) -> list[Measurement]:
        """Return the scores of a source."""
        found = finite_embeddings(source, self.sets, self.genes.names, 0, self.computing)
        measured = []
        for kind, features in found.items():
            for split, folds in self.folds.items():
                for reader in (FOREST, LOGISTIC):
                    measured += self.read(kind, features, split, folds, reader)
        return measured

    def read(self, kind: str, features: np.ndarray, split: str, folds: list[Split], reader: str) -> list[Measurement]:
        """Return the scores of the labels that a reader reads from features of a kind, shape `(genes, width)`."""
        values: dict[str, list[np.ndarray]] = {name: [] for name in _METRICS}
        seconds, labels = [], self.genes.labels
        for number, fold in enumerate(folds):
            started = time.perf_counter()
            train = np.concatenate([fold.train, fold.validation])
            chances = read_chances(features[train], labels[train], features[fold.test], reader, number // FOLDS)
            seconds.append(time.perf_counter() - started)
            truth = labels[fold.test]
            for name, metric in _METRICS.items():
                values[name].append(bootstrapped(metric, truth, chances, fold.test, len(labels)))
        numbers = [len(fold.test) for fold in folds]
        return [
            Measurement(kind, reader, split, name, np.stack(each), numbers, seconds) for name, each in values.items()
        ]

    def judge(self, found: dict[str, list[Measurement]], sources: Sequence[Source]) -> list[str]:
        """Say nothing: the labels of genes are not of these cells."""
        return []


def read_chances(features: np.ndarray, labels: np.ndarray, tested: np.ndarray, reader: str, seed: int) -> np.ndarray:
    """Fit a reader, and return the probability that a gene is essential.

    Args:
        features: Embeddings of the training genes, shape `(genes, width)`.
        labels: Their labels, shape `(genes,)`.
        tested: Embeddings of the test genes, shape `(test genes, width)`.
        reader: `random forest`, with the settings of the original, or
            `logistic regression`.
        seed: Seed of the forest.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    if reader == FOREST:
        model = RandomForestClassifier(TREES, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        model.fit(features, labels)
    return np.asarray(model.predict_proba(tested)[:, 1])
