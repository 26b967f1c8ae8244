# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Baselines that a fine-tuned model has to beat: classical models of log-normalised counts of the training cells.

The counts stay sparse, and dense matrices have 50 columns. Where a split has validation cells, they choose the
strength of the linear models' regularisation (by macro-F1, or squared error), just as they end the model's training.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.finetuning.metrics import classification_metrics
from tahoex1_hf.finetuning.splits import Split

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

COMPONENTS = 50
# Most training cells that a baseline is fitted on: more would hardly improve it, but make PCA slow.
MOST_CELLS = 50_000
_TARGET_SUM = 1e4
# Values of C that are tried, from strong to weak regularisation.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
_BOOSTING: dict[str, Any] = {"max_iter": 50, "learning_rate": 0.1, "max_leaf_nodes": 8, "early_stopping": False}

LINEAR = {"classification": "PCA + logistic regression", "regression": "PCA + ridge regression"}
BOOSTED = "PCA + gradient boosting"
CONSTANT = {"classification": "majority class", "regression": "mean"}


def log_normalized(counts: "csr_matrix") -> "csr_matrix":
    """Compute log(1 + counts per 10,000), cell by cell, so that no cell's values depend on another cell.

    Args:
        counts: Raw counts, shape `(cells, genes)`; not changed.

    Returns:
        `(cells, genes)` float32 CSR; a cell without counts has an empty row.
    """
    from scipy.sparse import csr_matrix

    lengths = np.diff(counts.indptr)
    sums = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    scales = np.divide(_TARGET_SUM, sums, out=np.zeros_like(sums), where=sums > 0)
    values = np.log1p(counts.data * np.repeat(scales, lengths)).astype(np.float32)
    return csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def sparse_pca(values: "csr_matrix", seed: int) -> Any:
    """Return an unfitted PCA with at most 50 components for sparse values, which it centres as it goes.

    Args:
        values: Values that it will be fitted to, shape `(cells, genes)`.
        seed: Seed of the solver's start.

    Returns:
        scikit-learn's `PCA`; None if there are too few cells or genes for one component.
    """
    from sklearn.decomposition import PCA

    number = min(COMPONENTS, min(values.shape) - 1)
    return PCA(number, svd_solver="arpack", random_state=seed) if number > 0 else None


class Components:
    """Principal components of log-normalised counts, centred and scaled to unit variance.

    Args:
        values: Log-normalised counts of the training cells, shape `(training cells, genes)`.
        seed: Seed of the solver's start.
    """

    def __init__(self, values: "csr_matrix", seed: int):
        from sklearn.preprocessing import StandardScaler

        # Genes that no training cell expresses have no variance; left out, they cost nothing.
        self._genes = np.flatnonzero(values.getnnz(axis=0))
        expressed = values[:, self._genes]
        self._pca = sparse_pca(expressed, seed)
        if self._pca is None:
            self.train = np.zeros((values.shape[0], 1))
            return
        scores = self._pca.fit_transform(expressed)
        self._scaler = StandardScaler().fit(scores)
        self.train = self._scaler.transform(scores)

    def transform(self, values: "csr_matrix") -> np.ndarray:
        """Return the components of other cells, `(cells, components)`."""
        if self._pca is None or not values.shape[0]:
            return np.zeros((values.shape[0], self.train.shape[1]))
        return np.asarray(self._scaler.transform(self._pca.transform(values[:, self._genes])))


def classification_baselines(
    counts: "csr_matrix", labels: np.ndarray, splits: Sequence[Split], seed: int, num_classes: int | None = None
) -> dict[str, list[np.ndarray]]:
    """Predict classes from counts.

    Args:
        counts: Raw counts, shape `(cells, genes)`.
        labels: Class numbers, shape `(cells,)`; those of the test cells are not used for fitting.
        splits: Splits; models are fitted on `train`, and `validation` chooses the strength of regularisation.
        seed: Seed of PCA and boosting.
        num_classes: Number of classes; by default the highest label plus 1.

    Returns:
        For each baseline and split, the probabilities `(test cells, classes)`.
    """
    number = int(labels.max()) + 1 if num_classes is None else num_classes

    def linear(x: np.ndarray, y: np.ndarray, strength: float) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=strength, max_iter=2000, class_weight="balanced").fit(x, y)

    def boosted(x: np.ndarray, y: np.ndarray) -> Any:
        from sklearn.ensemble import HistGradientBoostingClassifier

        model = HistGradientBoostingClassifier(random_state=seed, class_weight="balanced", **_BOOSTING)
        return model.fit(x, y)

    def predict(model: Any, x: np.ndarray) -> np.ndarray:
        probabilities = np.zeros((len(x), number))
        if len(x):
            probabilities[:, model.classes_] = model.predict_proba(x)
        return probabilities

    def loss(predicted: np.ndarray, truth: np.ndarray) -> float:
        return -classification_metrics(truth, predicted.argmax(1))["macro_f1"]

    def constant(y: np.ndarray, num_cells: int) -> np.ndarray:
        return np.tile(np.bincount(y, minlength=number) / len(y), (num_cells, 1))

    return _baselines("classification", counts, labels, splits, seed, (linear, boosted, predict, loss, constant))


def regression_baselines(
    counts: "csr_matrix", labels: np.ndarray, splits: Sequence[Split], seed: int
) -> dict[str, list[np.ndarray]]:
    """Predict numbers from counts.

    Args:
        counts: Raw counts, shape `(cells, genes)`.
        labels: Numbers, shape `(cells,)`; those of the test cells are not used for fitting.
        splits: Splits, as for `classification_baselines`.
        seed: Seed of PCA and boosting.

    Returns:
        For each baseline and split, the predictions `(test cells,)`.
    """

    def linear(x: np.ndarray, y: np.ndarray, strength: float) -> Any:
        from sklearn.linear_model import Ridge

        return Ridge(alpha=1 / strength).fit(x, y)

    def boosted(x: np.ndarray, y: np.ndarray) -> Any:
        from sklearn.ensemble import HistGradientBoostingRegressor

        return HistGradientBoostingRegressor(random_state=seed, **_BOOSTING).fit(x, y)

    def predict(model: Any, x: np.ndarray) -> np.ndarray:
        return np.asarray(model.predict(x)) if len(x) else np.zeros(0)

    def loss(predicted: np.ndarray, truth: np.ndarray) -> float:
        return float(((predicted - truth) ** 2).mean())

    def constant(y: np.ndarray, num_cells: int) -> np.ndarray:
        return np.full(num_cells, y.mean())

    return _baselines("regression", counts, labels, splits, seed, (linear, boosted, predict, loss, constant))


def _baselines(
    task: str,
    counts: "csr_matrix",
    labels: np.ndarray,
    splits: Sequence[Split],
    seed: int,
    steps: tuple[Callable[..., Any], ...],
) -> dict[str, list[np.ndarray]]:
    linear, boosted, predict, loss, constant = steps
    found: dict[str, list[np.ndarray]] = {name: [] for name in (LINEAR[task], BOOSTED, CONSTANT[task])}
    values = log_normalized(counts)
    for split in splits:
        train = split.train
        if len(train) > MOST_CELLS:
            train = np.sort(np.random.default_rng(seed).choice(train, MOST_CELLS, replace=False))
            logger.info("The baselines are fitted on %d of %d training cells.", MOST_CELLS, len(split.train))
        y = labels[train]
        found[CONSTANT[task]].append(constant(y, len(split.test)))
        if len(np.unique(y)) < 2:  # scikit-learn's classifiers cannot be fitted then
            for name in (LINEAR[task], BOOSTED):
                found[name].append(constant(y, len(split.test)))
            continue
        components = Components(values[train], seed)
        seen, test = components.transform(values[split.validation]), components.transform(values[split.test])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="lbfgs failed to converge")
            tried = [linear(components.train, y, c) for c in (_STRENGTHS if len(seen) else (1.0,))]
        losses = [loss(predict(model, seen), labels[split.validation]) for model in tried] if len(seen) else [0.0]
        found[LINEAR[task]].append(predict(tried[int(np.argmin(losses))], test))
        found[BOOSTED].append(predict(boosted(components.train, y), test))
    return found
