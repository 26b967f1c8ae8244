# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Transfer of the labels of a reference to a query by every method, with the scores of each."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tahoex1_hf.annotation.methods import EMBEDDING, Features, Votes, methods
from tahoex1_hf.annotation.validation import (
    UNKNOWN,
    Expected,
    HeldOut,
    cross_validate,
    decide,
    expected_of,
    find_threshold,
    make_folds,
)
from tahoex1_hf.benchmarking.resampling import Measurement, auroc, bootstrapped, macro_f1
from tahoex1_hf.common.progress import progress_bar

QUERY = "query"
CLASSIFIER = "fine-tuned classifier"
TWIN = 1e-5  # embeddings have length 1: cells nearer than this to one of the reference hold the same counts


@dataclass(frozen=True)
class TransferOptions:
    """How labels are transferred.

    Attributes:
        neighbours: Number of neighbours that vote.
        unknown_share: Share of the reference's cells that may be called unknown in the cross-validation.
        seed: Seed of folds, PCA, samples and UMAP.
    """

    neighbours: int = 15
    unknown_share: float = 0.05
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for numbers that make no sense."""
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours}: pass at least 1.")
        if not 0 < self.unknown_share < 1:
            raise ValueError(f"unknown_share={self.unknown_share}: pass a share between 0 and 1, such as 0.05.")


@dataclass(frozen=True, eq=False)
class LabelledReference:
    """The cells to learn from.

    Attributes:
        features: What the methods read of them.
        labels: Class numbers, `(cells,)`.
        classes: Names of the classes.
        batches: Names of their batches, `(cells,)`; None where there are none, or one.
    """

    features: Features
    labels: np.ndarray
    classes: list[str]
    batches: np.ndarray | None


@dataclass(frozen=True, eq=False)
class ScoredQuery:
    """Cells of the query that have a label, by which the transfer is scored.

    Attributes:
        rows: Their numbers in the query, rising, `(scored,)`.
        features: What the methods read of them.
        truth: Class numbers, `(scored,)`; `UNKNOWN` for classes that the reference lacks.
    """

    rows: np.ndarray
    features: Features
    truth: np.ndarray


@dataclass(frozen=True, eq=False)
class Transferred:
    """What came of a transfer.

    Attributes:
        votes: What the neighbours among embeddings say of every cell of the query.
        called: Class numbers of the query's cells; `UNKNOWN` for cells that are far from the reference.
        threshold: Distance beyond which a cell is unknown.
        expected: What may be expected of each class.
        twins: Number of the query's cells whose embedding a cell of the reference has too.
        split: Name of the cross-validation.
        scores: Method -> its scores.
        left_out: Method -> for each class, the area under the ROC curve by which it is told from others if the
            reference lacks it.
        classified: What a fine-tuned classifier says of every cell of the query; None where there is none.
    """

    votes: Votes
    called: np.ndarray
    threshold: float
    expected: list[Expected]
    twins: int
    split: str
    scores: dict[str, list[Measurement]]
    left_out: dict[str, list[float]]
    classified: Votes | None = None


def transfer(
    reference: LabelledReference,
    query: Features,
    scored: ScoredQuery | None,
    options: TransferOptions,
    classified: Votes | None = None,
    progress: bool | None = True,
) -> Transferred:
    """Transfer labels.

    Args:
        reference: Cells to learn from.
        query: Embeddings of all cells of the query, which may lie on disk; counts are not needed.
        scored: Cells of the query that have a label; None where there are none.
        options: How labels are transferred.
        classified: What a fine-tuned classifier says of every cell of the query, to be scored beside; None where there
            is none. It is not fitted to the reference, so it is scored on the query alone.
        progress: Whether to show a progress bar.
    """
    labels, number = reference.labels, len(reference.classes)
    folds = make_folds(labels, reference.batches, options.seed)
    split = "random fifths left out" if reference.batches is None else "batches left out"
    scores: dict[str, list[Measurement]] = {}
    left_out: dict[str, list[float]] = {}
    found: Transferred | None = None
    every = methods(options.neighbours, options.seed, reference.features.values is not None)
    with progress_bar(progress, total=len(every) * (len(folds) + 1), unit="fit", desc="Annotating") as bar:
        for name, method in every.items():
            started = time.perf_counter()
            held_out = cross_validate(method, reference.features, labels, number, folds, bar.update)
            threshold = find_threshold(held_out, options.unknown_share)
            expected = expected_of(held_out, labels, number, threshold)
            left_out[name] = [each.auroc for each in expected if each.auroc is not None]
            scores[name] = _reference_scores(split, held_out, labels, threshold, time.perf_counter() - started)
            if name == EMBEDDING or scored is not None:
                started = time.perf_counter()
                fitted = method(reference.features, labels, number)
                votes = fitted.votes(query if name == EMBEDDING or scored is None else scored.features)
                if name == EMBEDDING:
                    called = decide(votes, threshold)
                    twins = int((votes.nearest < TWIN).sum())
                    found = Transferred(votes, called, threshold, expected, twins, split, scores, left_out, classified)
                if scored is not None:
                    mine = _pick(votes, scored.rows) if name == EMBEDDING else votes
                    seconds = time.perf_counter() - started
                    scores[name] += _scores(QUERY, mine, scored.truth, threshold, scored.rows, len(query), seconds)
            bar.update()
    if classified is not None and scored is not None:
        said = _pick(classified, scored.rows)
        scores[CLASSIFIER] = _scores(QUERY, said, scored.truth, math.inf, scored.rows, len(query), None)
        left_out[CLASSIFIER] = []
    assert found is not None  # the method of the embeddings is one of them
    return found


def _pick(votes: Votes, rows: np.ndarray) -> Votes:
    return Votes(votes.probabilities[rows], votes.distance[rows], votes.nearest[rows])


def _reference_scores(
    split: str, held_out: HeldOut, labels: np.ndarray, threshold: float, seconds: float
) -> list[Measurement]:
    rows = np.flatnonzero(held_out.scored)
    return _scores(split, _pick(held_out.votes, rows), labels[rows], threshold, rows, len(labels), seconds)


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Compute the share of right labels."""
    return float((truth == predicted).mean())


def _assigned(truth: np.ndarray, called: np.ndarray) -> float:
    return float((called != UNKNOWN).mean())


def _accuracy_of_assigned(truth: np.ndarray, called: np.ndarray) -> float:
    there = called != UNKNOWN
    return accuracy(truth[there], called[there]) if there.any() else float("nan")


def _overconfidence(right: np.ndarray, probability: np.ndarray) -> float:
    return float(probability.mean() - right.mean())


def _scores(
    split: str,
    votes: Votes,
    truth: np.ndarray,
    threshold: float,
    rows: np.ndarray,
    total: int,
    seconds: float | None,
) -> list[Measurement]:
    """Return the scores of some cells, with bootstrap replicates over cells.

    Args:
        split: Part of the data.
        votes: What a method says of the cells.
        truth: Their class numbers, `(cells,)`; `UNKNOWN` for classes that the reference lacks.
        threshold: Distance beyond which a cell is unknown.
        rows: Their numbers in the data, rising, `(cells,)`.
        total: Number of cells of the data.
        seconds: Time that it took; None where it was not measured.
    """
    forced, called = votes.probabilities.argmax(1), decide(votes, threshold)
    known = truth != UNKNOWN
    right = (forced == truth)[known]
    measured: Mapping[str, tuple[Callable[..., float], np.ndarray, np.ndarray, np.ndarray]] = {
        "accuracy": (accuracy, truth[known], forced[known], known),
        "macro_f1": (macro_f1, truth[known], forced[known], known),
        "assigned": (_assigned, truth[known], called[known], known),
        "accuracy_assigned": (_accuracy_of_assigned, truth[known], called[known], known),
        "overconfidence": (_overconfidence, right, votes.probabilities.max(1)[known], known),
    }
    if not known.any():
        measured = {}
    if (~known).any():
        measured = {**measured, "novel_unknown": (_unknown, truth[~known], called[~known], ~known)}
        if known.any():
            every = np.ones(len(truth), dtype=bool)
            measured["novel_auroc"] = (auroc, (~known).astype(np.int64), votes.distance, every)
    return [
        Measurement(
            *("", "", split, name),
            bootstrapped(metric, given, said, rows[on], total)[None],
            [int(on.sum())],
            [] if seconds is None else [seconds],
        )
        for name, (metric, given, said, on) in measured.items()
    ]


def _unknown(truth: np.ndarray, called: np.ndarray) -> float:
    return float((called == UNKNOWN).mean())
