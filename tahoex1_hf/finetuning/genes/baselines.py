# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Baselines of a gene classification: classical models of features that need no fine-tuning."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import log_normalize
from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.splits import Split

MAJORITY = "majority class"
TREES = 200  # of a random forest
_CHUNK_CELLS = 4096  # cells read at once


def expression_features(cells: FinetuningData, tokens: np.ndarray) -> np.ndarray:
    """Compute how strongly genes are expressed.

    Args:
        cells: Cells to take the means over.
        tokens: Token ids, shape `(genes,)`.

    Returns:
        `(genes, 2)` float64: mean over the cells of log(1 + counts per 10,000), and the fraction of cells that express
        the gene.
    """
    sums, counts = np.zeros(len(cells.tokenizer)), np.zeros(len(cells.tokenizer))
    for start in range(0, len(cells), _CHUNK_CELLS):
        rows = cells.rows_at(cells.numbers[start : start + _CHUNK_CELLS])
        sums += np.bincount(rows.tokens, log_normalize(rows.counts, rows.offsets), minlength=len(sums))
        counts += np.bincount(rows.tokens, minlength=len(sums))
    return np.stack([sums[tokens], counts[tokens]], axis=1) / len(cells)


def gene_baselines(
    features: dict[str, np.ndarray], labels: np.ndarray, num_classes: int, splits: list[Split], seed: int
) -> dict[str, list[np.ndarray]]:
    """Predict classes from features of the genes.

    The baselines are fitted on all genes that are not tested on: unlike the model, they do not need validation genes
    to stop by.

    Args:
        features: Features `(genes, width)` by name.
        labels: Class numbers, shape `(genes,)`.
        num_classes: Number of classes.
        splits: Splits of the genes.
        seed: Seed of the random forests.

    Returns:
        For each baseline and split, the probabilities `(test genes, classes)`.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    models: dict[str, Callable[[], Any]] = {
        "logistic regression": lambda: make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced")
        ),
        "random forest": lambda: RandomForestClassifier(
            TREES, min_samples_leaf=2, class_weight="balanced", random_state=seed
        ),
    }
    found: dict[str, list[np.ndarray]] = {}
    for split in splits:
        known = np.concatenate([split.train, split.validation])
        share = np.bincount(labels[known], minlength=num_classes) / len(known)
        found.setdefault(MAJORITY, []).append(np.tile(share, (len(split.test), 1)))
        for name, values in features.items():
            for kind, make in models.items():
                model = make().fit(values[known], labels[known])
                chances = np.zeros((len(split.test), num_classes))
                chances[:, model.classes_] = model.predict_proba(values[split.test])
                found.setdefault(f"{kind} on {name}", []).append(chances)
    return found
