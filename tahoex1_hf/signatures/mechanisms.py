# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Mechanisms of action: a table of them, whether drugs of one lie together, and which a new drug's neighbours have."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tahoex1_hf.benchmarking.resampling import auroc
from tahoex1_hf.common.reading import reading
from tahoex1_hf.common.texts import as_text

COLUMN = "moa-fine"
UNKNOWN = ("", "unclear", "unknown", "nan", "None", "<NA>")  # no mechanism
_FEWEST = 2  # drugs of a mechanism
_SHUFFLES = 999


def read_mechanisms(path: str | Path, column: str = COLUMN) -> dict[str, str]:
    """Read the mechanism of each drug; drugs whose mechanism is not known are left out.

    Args:
        path: Table with the columns `drug` and `column`: `.parquet`, or text with commas or tabs.
        column: Column with the mechanisms.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If it lacks a column.
    """
    import pandas as pd

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"mechanisms={path} does not exist.")
    with reading(path):
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, sep=None, engine="python")
    for name in ("drug", column):
        if name not in table:
            raise ValueError(
                f"mechanisms={path} has no column {name}; there are {', '.join(map(str, table.columns))}."
            )
    pairs = zip(as_text(table["drug"]), as_text(table[column]).str.strip(), strict=True)
    return {drug: kind for drug, kind in pairs if kind not in UNKNOWN}


def mechanisms_of(drugs: Sequence[str], mechanisms: Mapping[str, str]) -> list[str]:
    """Return the mechanism of each drug, empty where it is not known."""
    return [mechanisms.get(drug, "") for drug in drugs]


def same_mechanism(similarity: np.ndarray, kinds: Sequence[str], seed: int) -> tuple[float, float, int] | None:
    """Return how well similarity tells pairs of drugs with the same mechanism from others.

    Args:
        similarity: Similarity of each drug to each, `(drugs, drugs)`; NaN where it is not known.
        kinds: Mechanism of each drug, empty where it is not known.
        seed: Seed of the shuffles.

    Returns:
        Area under the ROC curve, the share of shuffled mechanisms with an area as large, and the number of pairs of
        the same mechanism; None where there is no such pair.
    """
    names = np.array(kinds, dtype=object)
    known = np.flatnonzero(names != "")
    first, second = (known[side] for side in np.triu_indices(len(known), 1))
    scores = (similarity[first, second] + similarity[second, first]) / 2
    there = np.isfinite(scores)
    first, second, scores = first[there], second[there], scores[there]
    if not len(scores) or not (same := names[first] == names[second]).any() or same.all():
        return None
    area = auroc(same.astype(np.int64), scores)
    random, above, mixed = np.random.default_rng(seed), 0, names.copy()
    for _ in range(_SHUFFLES):
        mixed[known] = random.permutation(names[known])
        above += auroc((mixed[first] == mixed[second]).astype(np.int64), scores) >= area
    return area, (1 + above) / (1 + _SHUFFLES), int(same.sum())


def enriched(similarity: np.ndarray, kinds: Sequence[str]) -> list[tuple[str, int, float, float]]:
    """Return how near the drugs of each mechanism are, beside the others with a known one.

    Args:
        similarity: Similarity to each drug, `(drugs,)`.
        kinds: Mechanism of each drug, empty where it is not known.

    Returns:
        Mechanism, number of its drugs, area under the ROC curve, and p value of Mann and Whitney's test.
    """
    from scipy.stats import mannwhitneyu

    names = np.array(kinds, dtype=object)
    known = names != ""
    found = []
    for kind in sorted(set(names[known].tolist())):
        own = names == kind
        rest = known & ~own
        if own.sum() >= _FEWEST and rest.any():
            p = float(mannwhitneyu(similarity[own], similarity[rest], alternative="greater").pvalue)
            truth = own[known].astype(np.int64)
            found.append((kind, int(own.sum()), auroc(truth, similarity[known]), p))
    return found
