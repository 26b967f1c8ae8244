# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The numbers of cz-benchmarks' tasks, with its settings (version 0.15.1): labels, clusters and silhouette."""

import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.clusters import leiden
from tahoex1_hf.benchmarking.resampling import Measurement, bootstrapped, macro_f1

SPLIT = "as in cz-benchmarks"
_SEED, _FOLDS = 42, 5
_FEWEST = 10  # cells of a class, which is else left out
TREES = 100


def cz_scores(features: Any, labels: np.ndarray) -> Iterator[Measurement]:
    """Yield macro-F1 and accuracy of three classifiers, and the agreement of Leiden clusters with the labels.

    Args:
        features: Embeddings, shape `(cells, width)`, dense or CSR.
        labels: Class numbers, shape `(cells,)`.
    """
    yield from _of_classifiers(features, labels)
    if find_spec("igraph"):
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        started = time.perf_counter()
        clusters, every = leiden(features, _SEED), np.arange(len(labels))
        spent = [time.perf_counter() - started]
        for name, score in (("ari", adjusted_rand_score), ("nmi", normalized_mutual_info_score)):
            values = bootstrapped(score, labels, clusters, every, len(labels))[None]
            yield Measurement("", "Leiden", SPLIT, name, values, [len(labels)], spent)


def _of_classifiers(features: Any, labels: np.ndarray) -> Iterator[Measurement]:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kept = np.flatnonzero((np.bincount(labels) >= _FEWEST)[labels])
    classes, truth = np.unique(labels[kept], return_inverse=True)
    if len(classes) < 2:
        return
    inputs = features[kept]
    readers: dict[str, Any] = {
        "kNN": make_pipeline(StandardScaler(with_mean=False), KNeighborsClassifier()),
        "logistic regression": make_pipeline(StandardScaler(with_mean=False), LogisticRegression()),
        "random forest": RandomForestClassifier(TREES, random_state=_SEED),
    }
    metrics = {"macro_f1": macro_f1 if len(classes) > 2 else _binary_f1, "accuracy": _accuracy}
    folds = list(StratifiedKFold(_FOLDS, shuffle=True, random_state=_SEED).split(truth, truth))
    for name, reader in readers.items():
        values: dict[str, list[np.ndarray]] = {metric: [] for metric in metrics}
        seconds = []
        for train, test in folds:
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="lbfgs failed to converge")
                predicted = reader.fit(inputs[train], truth[train]).predict(inputs[test])
            seconds.append(time.perf_counter() - started)
            for metric, compute in metrics.items():
                values[metric].append(bootstrapped(compute, truth[test], predicted, kept[test], len(labels)))
        for metric, each in values.items():
            yield Measurement("", name, SPLIT, metric, np.stack(each), [len(test) for _, test in folds], seconds)


def _accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float((truth == predicted).mean())


def _binary_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Compute the F1 of the second of two classes, which cz-benchmarks takes."""
    both = truth.sum() + predicted.sum()
    return float(2 * (truth & predicted).sum() / both) if both else 0.0
