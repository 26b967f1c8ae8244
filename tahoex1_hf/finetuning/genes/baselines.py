# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What a classifier of genes has to beat: classical models of what is known of a gene without fine-tuning."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import log_normalize
from tahoex1_hf.finetuning.cells.labelled import LabelledCells
from tahoex1_hf.finetuning.splits import Split

MAJORITY = "majority class"
_CELLS = 4096  # that are read at once


def expression_features(cells: LabelledCells, tokens: np.ndarray) -> np.ndarray:
    """How much a gene is expressed, from all cells in blocks.

    Args:
        cells: to take the means over.
        tokens: `(genes,)` token ids.

    Returns:
        `(genes, 2)` float64: mean over the cells of log(1 + counts per 10,000), and fraction of cells that express it.
    """
    sums, counts = np.zeros(len(cells.tokenizer)), np.zeros(len(cells.tokenizer))
    for start in range(0, len(cells), _CELLS):
        rows = cells.stored.rows(cells.numbers[start : start + _CELLS])
        sums += np.bincount(rows.tokens, log_normalize(rows.counts, rows.offsets), minlength=len(sums))
        counts += np.bincount(rows.tokens, minlength=len(sums))
    return np.stack([sums[tokens], counts[tokens]], axis=1) / len(cells)


def gene_baselines(
    features: dict[str, np.ndarray], labels: np.ndarray, num_classes: int, splits: list[Split], seed: int
) -> dict[str, list[np.ndarray]]:
    """Classes predicted from features of the genes.

    Fitted on all genes that are not tested on: unlike the model, nothing here needs validation genes to stop by.

    Args:
        features: name -> `(genes, width)`.
        labels: `(genes,)` class numbers.
        num_classes: how many there are.
        splits: of the genes.
        seed: of the forests.

    Returns:
        By baseline, for each split the `(test genes, classes)` probabilities.
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
            200, min_samples_leaf=2, class_weight="balanced", random_state=seed
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
