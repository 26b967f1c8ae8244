# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tell by embeddings of genes in cell lines in which lines a gene is essential: the original's third benchmark."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.cell_embeddings import Computing
from tahoex1_hf.benchmarking.cell_lines import Dependencies
from tahoex1_hf.benchmarking.cells import EvaluationFile
from tahoex1_hf.benchmarking.gene_embeddings import common_genes, left_out
from tahoex1_hf.benchmarking.line_genes import PairsOf, pair_embeddings
from tahoex1_hf.benchmarking.overlap import check_not_trained_on
from tahoex1_hf.benchmarking.resampling import Measurement, auroc, bootstrapped
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.finetuning.splits import make_splits

FOLDS, ESSENTIAL = 5, 0.5
TREES = 100  # as in the original, which takes scikit-learn's default
MEAN_OF_STRATA, FOREST = "mean of the strata", "random forest"
STRATA = tuple(range(10, 100, 10))  # lower ends in percent of the lines


def pooled_auroc(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Compute the AUROC of all pairs of a line and a gene together; NaN in `truth` is left out."""
    known = np.isfinite(truth)
    return auroc(truth[known] > ESSENTIAL, predicted[known])


def gene_auroc(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Compute the mean AUROC over genes of telling the lines that depend on a gene from the others.

    Args:
        truth: Dependencies, NaN where unknown, shape `(lines, genes)`.
        predicted: Predictions, of the same shape.

    Returns:
        Mean over the genes on which some of the lines depend and others do not; NaN where there is no such gene.
    """
    from scipy.stats import rankdata

    known = np.isfinite(truth)
    positive = known & (truth > ESSENTIAL)
    # Unknown pairs are ranked below all others, and these ranks are then taken off.
    ranks = rankdata(np.where(known, predicted, -np.inf), axis=0) - (~known).sum(axis=0)
    ones = positive.sum(axis=0)
    zeros = known.sum(axis=0) - ones
    there = (ones > 0) & (zeros > 0)
    if not there.any():
        return float("nan")
    above = np.where(positive, ranks, 0).sum(axis=0)[there] - ones[there] * (ones[there] + 1) / 2
    return float((above / (ones[there] * zeros[there])).mean())


def r2(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Compute the share of the variance of all pairs that is predicted; NaN in `truth` is left out."""
    known = np.isfinite(truth)
    truth, predicted = truth[known], predicted[known]
    total = ((truth - truth.mean()) ** 2).sum() if len(truth) else 0.0
    return float(1 - ((truth - predicted) ** 2).sum() / total) if total > 0 else float("nan")


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auroc": pooled_auroc,
    "gene_auroc": gene_auroc,
    "r2": r2,
}


@dataclass
class ContextualEssentiality:
    """The task `contextual-essentiality`.

    Attributes:
        lines: Cell lines with their counts.
        genes: Dependencies of these lines.
        seeds: Number of times that the folds of lines are made.
        computing: How models are run.
    """

    lines: EvaluationFile
    genes: Dependencies
    seeds: int = 1
    computing: Computing = field(default_factory=Computing)

    name = "contextual-essentiality"
    headline = (MEAN_OF_STRATA, FOREST, "auroc")
    axis = "cell lines"

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    @property
    def dataset(self) -> str:
        """Name of the counts."""
        return self.lines.name

    def settings(self) -> dict[str, Any]:
        """Return everything on which the scores depend but the source."""
        files = [self.lines.fingerprint(), self.genes.fingerprint()]
        genes, lines = self.genes.names.tolist(), self.lines.adata.obs_names.tolist()
        return {"seeds": self.seeds, "files": files, "genes": genes, "lines": lines} | self.computing.settings()

    def prepare(self, sources: Sequence[Source]) -> None:
        """Check the models, and keep to the genes that all of them know."""
        for source in sources:
            if source.kind == "model" and (note := check_not_trained_on(source, self.lines)):
                self.notes.append(note)
        models = [source for source in sources if source.kind != "file"]  # files have embeddings of lines
        genes = common_genes(self.genes, models, [self.lines])
        self.genes = genes.some(genes.means >= STRATA[0] / 100, f"essential in less than {STRATA[0]} % of the lines")
        strata = self.strata()
        self.notes.append(
            f"{len(self.genes.values)} cell lines, {len(self.genes.names)} genes; left out: {left_out(self.genes)}. "
            + (f"Strata: {', '.join(f'{name} ({len(columns)} genes)' for name, columns in strata.items())}.")
        )
        if not strata:
            raise ValueError(
                f"--dependencies: in no stratum of the {len(self.genes.names)} genes does every fold of lines have "
                "both lines that depend on a gene and others: take more lines."
            )

    def folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the row numbers of the training and of the test lines of every fold."""
        found = []
        for seed in range(self.seeds):
            for split in make_splits(None, num_rows=len(self.genes.values), folds=FOLDS, seed=seed):
                found.append((np.concatenate([split.train, split.validation]), split.test))
        return found

    def strata(self) -> dict[str, np.ndarray]:
        """Return the row numbers of the genes of every stratum in which all folds can be scored."""
        found = {}
        for low in STRATA:
            high = low + 10
            inside = (self.genes.means >= low / 100) & ((self.genes.means < high / 100) | (high == 100))
            columns = np.flatnonzero(inside)
            if all(_has_both(self.genes.values[test][:, columns]) for _, test in self.folds()):
                found[f"{low}-{high} %"] = columns
        return found

    def evaluate(self, source: Source) -> list[Measurement]:
        """Return the scores of a source."""
        if source.kind == "mean":
            return self.read(None)
        with pair_embeddings(source, self.lines, self.genes.names, 0, self.computing) as pairs_of:
            return self.read(pairs_of)

    def read(self, pairs_of: PairsOf | None) -> list[Measurement]:
        """Return the scores of every stratum and their mean; without embeddings, of the mean of the training lines."""
        found: list[Measurement] = []
        for name, columns in self.strata().items():
            found += self._of_stratum(name, columns, pairs_of)
        for metric in _METRICS:
            each = [measured for measured in found if measured.metric == metric]
            replicates = np.mean([measured.replicates for measured in each], axis=0)
            numbers = np.sum([measured.numbers for measured in each], axis=0).tolist()
            seconds = np.sum([measured.seconds for measured in each], axis=0).tolist()
            found.append(Measurement("", FOREST, MEAN_OF_STRATA, metric, replicates, numbers, seconds))
        return found

    def _of_stratum(self, name: str, columns: np.ndarray, pairs_of: PairsOf | None) -> list[Measurement]:
        values: dict[str, list[np.ndarray]] = {metric: [] for metric in _METRICS}
        numbers, seconds = [], []
        every = self.genes.values
        for number, (train, test) in enumerate(self.folds()):
            started = time.perf_counter()
            known, truth = every[train][:, columns], every[test][:, columns]
            if pairs_of is None:
                predicted = np.broadcast_to(np.nanmean(known, axis=0), truth.shape)
            else:
                predicted = forest(pairs_of(train, columns), known, pairs_of(test, columns), number // FOLDS)
            seconds.append(time.perf_counter() - started)
            numbers.append(int(np.isfinite(truth).sum()))
            for metric, compute in _METRICS.items():
                values[metric].append(bootstrapped(compute, truth, predicted, test, len(every)))
        return [
            Measurement("", FOREST, f"essential in {name}", metric, np.stack(each), numbers, seconds)
            for metric, each in values.items()
        ]

    def judge(self, found: dict[str, list[Measurement]], sources: Sequence[Source]) -> list[str]:
        """Say how the metrics are to be read."""
        return [
            "AUROC and R² are over all pairs of a line and a gene, and most of what they measure is which genes are "
            "essential in more lines. The gene AUROC is the mean over genes of telling lines apart; the mean of the "
            "training lines has 0.5 there."
        ]


def _has_both(values: np.ndarray) -> bool:
    """Return whether there is a gene on which some lines depend and others do not."""
    known = np.isfinite(values)
    ones = (known & (values > ESSENTIAL)).sum(axis=0)
    return bool(((ones > 0) & (ones < known.sum(axis=0))).any())


def forest(features: np.ndarray, dependencies: np.ndarray, tested: np.ndarray, seed: int) -> np.ndarray:
    """Fit a random forest to the dependencies of the training lines, and predict those of the test lines.

    Args:
        features: Embeddings of genes in the training lines, shape `(lines, genes, width)`.
        dependencies: Their dependencies, NaN where unknown, shape `(lines, genes)`.
        tested: Embeddings of the same genes in the test lines, shape `(test lines, genes, width)`.
        seed: Seed of the forest.

    Returns:
        `(test lines, genes)` predictions.
    """
    from sklearn.ensemble import RandomForestRegressor

    known = np.isfinite(dependencies)
    model = RandomForestRegressor(TREES, random_state=seed, n_jobs=-1).fit(features[known], dependencies[known])
    return np.asarray(model.predict(tested.reshape(-1, tested.shape[2]))).reshape(tested.shape[:2])
