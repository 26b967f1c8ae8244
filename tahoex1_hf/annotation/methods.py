# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Four ways to transfer labels: neighbours among embeddings, and three that they must be compared with."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tahoex1_hf.benchmarking.cells import fitted_pca, variable_genes

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

EMBEDDING, PROBE = "Tahoe-x1 + kNN", "Tahoe-x1 + logistic regression"
PCA, LOGISTIC = "PCA + kNN", "logistic regression"
_CHUNK = 4096  # cells whose neighbours are looked for at a time


@dataclass(frozen=True, eq=False)
class Features:
    """What the methods read of some cells.

    Attributes:
        embeddings: Embeddings, `(cells, width)`.
        values: Log-normalised counts of the genes of both reference and query, `(cells, genes)`; None where only the
            embeddings are read.
    """

    embeddings: np.ndarray
    values: "csr_matrix | None" = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def pick(self, rows: np.ndarray) -> "Features":
        """Return some of the cells."""
        return Features(self.embeddings[rows], None if self.values is None else self.values[rows])


@dataclass(frozen=True, eq=False)
class Votes:
    """What a method says of some cells.

    Attributes:
        probabilities: Probability of each class, `(cells, classes)`, float32.
        distance: Strangeness, `(cells,)`, float32: more is stranger. For neighbours the mean distance to them; for
            logistic regression 1 - the largest probability.
        nearest: Distance to the nearest cell of the reference, `(cells,)`; 1 for logistic regression.
    """

    probabilities: np.ndarray
    distance: np.ndarray
    nearest: np.ndarray


class Fitted(Protocol):
    """A method that has learnt from a reference."""

    def votes(self, cells: Features) -> Votes:
        """Return what the method says of cells."""

    def without(self, kind: int) -> "Fitted | None":
        """Return the method as if the reference lacked a class; None where it would have to be learnt anew."""


Method = Callable[[Features, np.ndarray, int], Fitted]
"""Function of a reference's features, its class numbers `(cells,)` and the number of classes."""


class Neighbours:
    """Votes of the nearest cells of a reference, of which near ones count more.

    A neighbour at distance d has the weight exp(-(d / r)²), r being the distance of the farthest neighbour: the
    farthest counts a third of one at the same place. The search is exact.

    Args:
        points: Places of the reference's cells, `(cells, width)`.
        labels: Their class numbers, `(cells,)`.
        num_classes: Number of classes.
        number: Number of neighbours.
        place: Function that returns the places of other cells.
    """

    def __init__(
        self,
        points: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        number: int,
        place: Callable[[Features], np.ndarray],
    ):
        from sklearn.neighbors import NearestNeighbors

        self._points, self._labels, self._num_classes, self._place = points, labels, num_classes, place
        self._number = min(number, len(points))
        self._index = NearestNeighbors(n_neighbors=self._number, algorithm="brute").fit(points)

    def votes(self, cells: Features) -> Votes:
        """Return what the neighbours say of cells."""
        probabilities = np.zeros((len(cells), self._num_classes), dtype=np.float32)
        distance, nearest = np.zeros(len(cells), dtype=np.float32), np.zeros(len(cells), dtype=np.float32)
        for start in range(0, len(cells), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(cells)))
            far, found = self._index.kneighbors(self._place(cells.pick(rows)))
            radius = far[:, -1:]
            weights = np.exp(-np.square(np.divide(far, radius, out=np.zeros_like(far), where=radius > 0)))
            places = np.arange(len(rows))[:, None] * self._num_classes + self._labels[found]
            sums = np.bincount(places.ravel(), weights.ravel(), minlength=len(rows) * self._num_classes)
            probabilities[rows] = sums.reshape(len(rows), -1) / weights.sum(1, keepdims=True)
            distance[rows], nearest[rows] = far.mean(1), far[:, 0]
        return Votes(probabilities, distance, nearest)

    def without(self, kind: int) -> "Neighbours":
        """Return the neighbours in a reference that lacks a class."""
        kept = self._labels != kind
        return Neighbours(self._points[kept], self._labels[kept], self._num_classes, self._number, self._place)


def embedding_neighbours(number: int) -> Method:
    """Return the method that looks for neighbours among embeddings."""

    def fit(cells: Features, labels: np.ndarray, num_classes: int) -> Fitted:
        return Neighbours(cells.embeddings, labels, num_classes, number, lambda others: others.embeddings)

    return fit


def pca_neighbours(number: int, seed: int) -> Method:
    """Return the method that looks for neighbours among 50 principal components of the reference's counts.

    They keep their variances, as in scanpy: scaled to equal ones, the last would add as much noise as the first say.
    """

    def fit(cells: Features, labels: np.ndarray, num_classes: int) -> Fitted:
        pca = fitted_pca(cells.values, seed)

        def place(others: Features) -> np.ndarray:
            return np.asarray(pca.transform(others.values))

        return Neighbours(place(cells), labels, num_classes, number, place)

    return fit


class Regression:
    """Logistic regression, in which classes have equal weights.

    Where the cells to learn from have one class, that is the answer.

    Args:
        read: Function that returns what the regression reads of cells, `(cells, features)`.
        cells: Cells to learn from.
        labels: Their class numbers, `(cells,)`.
        num_classes: Number of classes.
        centred: Whether features are centred; sparse ones would become dense.
    """

    def __init__(
        self,
        read: Callable[[Features], Any],
        cells: Features,
        labels: np.ndarray,
        num_classes: int,
        centred: bool,
    ):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._read, self._num_classes = read, num_classes
        self._only = int(labels[0]) if len(np.unique(labels)) == 1 else None
        if self._only is not None:
            return
        model = LogisticRegression(max_iter=200, class_weight="balanced")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="lbfgs failed to converge")
            self._model = make_pipeline(StandardScaler(with_mean=centred), model).fit(read(cells), labels)

    def votes(self, cells: Features) -> Votes:
        """Return what the regression says of cells."""
        probabilities = np.zeros((len(cells), self._num_classes), dtype=np.float32)
        if self._only is not None:
            probabilities[:, self._only] = 1
        else:
            probabilities[:, self._model.classes_] = self._model.predict_proba(self._read(cells))
        return Votes(probabilities, 1 - probabilities.max(1), np.ones(len(cells), dtype=np.float32))

    def without(self, kind: int) -> None:
        """Return None, since the regression would have to be fitted anew for each class."""


def count_regression(cells: Features, labels: np.ndarray, num_classes: int) -> Fitted:
    """Fit a logistic regression to log-normalised counts, after the manner of celltypist.

    It reads the 2,000 most variable genes of the reference, scaled to unit variance but not centred, so that they
    stay sparse.
    """
    assert cells.values is not None  # only methods of counts are given cells with them
    genes = variable_genes(cells.values)

    def read(others: Features) -> Any:
        assert others.values is not None
        return others.values[:, genes]

    return Regression(read, cells, labels, num_classes, centred=False)


def embedding_probe(cells: Features, labels: np.ndarray, num_classes: int) -> Fitted:
    """Fit a logistic regression to embeddings: what can be read from them where a little is trained after all."""
    return Regression(lambda others: others.embeddings, cells, labels, num_classes, centred=True)


def methods(number: int, seed: int, counts: bool = True) -> dict[str, Method]:
    """Return all methods by name, that of the embeddings first; without counts, those that read embeddings alone."""
    found: dict[str, Method] = {EMBEDDING: embedding_neighbours(number), PROBE: embedding_probe}
    if counts:
        found |= {PCA: pca_neighbours(number, seed), LOGISTIC: count_regression}
    return found
