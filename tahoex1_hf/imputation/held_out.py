# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A test of expected expression on genes that are held out, beside each gene's mean and kNN smoothing.

Half of the genes of some cells are hidden. The model sees the other half of the cell; kNN smoothing finds the 15
nearest other cells by the other half (50 principal components), and averages what they express. Both means are over
cells that express the gene, since only genes that the test cell expresses are scored there. Whether a gene is
expressed at all is tested apart, on hidden genes among as many that the cell does not express.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tahoex1_hf.benchmarking.resampling import auroc
from tahoex1_hf.encoding_tahoe_x1 import GeneRows
from tahoex1_hf.finetuning.cells.baselines import Components, log_normalized
from tahoex1_hf.imputation.targets import TargetPredictor
from tahoex1_hf.inference.expression import halves
from tahoex1_hf.perturbation.cells import PerturbationBatch, PerturbationEncoder, gene_places
from tahoex1_hf.runs.report import Report, interval

TEST_CELLS, OTHER_CELLS, NEIGHBOURS = 200, 2000, 15
FEWEST = 40  # with fewer cells, neither means nor neighbours say anything
_MOST_HIDDEN = 64  # most hidden genes of a cell among which expressed ones are to be told
OURS, MEAN, SMOOTHED = "Tahoe-x1", "mean of the gene", f"kNN smoothing ({NEIGHBOURS} cells)"
METRICS = {"mse": "squared error", "correlation": "correlation in a cell", "auroc": "expressed or not (AUROC)"}


@dataclass(frozen=True, eq=False)
class HeldOutTest:
    """What came of a test.

    Attributes:
        report: Scores of all methods.
        verdicts: Sentences that say whether the model beats the others.
    """

    report: Report
    verdicts: list[str]


@dataclass(frozen=True, eq=False)
class _Half:
    """Cells of which half is hidden.

    Attributes:
        batch: The cells.
        values: `(total genes,)` values in the tokenizer's unit.
        hidden: `(total genes,)` bool.
    """

    batch: PerturbationBatch
    values: np.ndarray
    hidden: np.ndarray

    @classmethod
    def make(cls, batch: PerturbationBatch, seed: int) -> "_Half":
        rows = batch.rows
        everything = np.ones(len(rows.tokens), dtype=bool)
        encoded = batch.source.encode(rows, everything, batch.numbers, batch.drug_ids)
        places = gene_places(rows.offsets, 1 if batch.drug_ids is None else 2)
        half = halves(rows.cells(), rows.tokens, batch.contents, seed)
        return cls(batch, encoded.expression_values[places].astype(np.float64), half == 0)

    def matrix(self, values: np.ndarray, keep: np.ndarray | None = None) -> "object":
        """Return values of the genes, or of those to keep, as a CSR matrix `(cells, tokens)`."""
        from scipy.sparse import csr_matrix

        rows = self.batch.rows if keep is None else self.batch.rows.select(keep)
        values = values if keep is None else values[keep]
        return csr_matrix((values, rows.tokens, rows.offsets), shape=(rows.num_cells, self.batch.source.num_tokens))


def run_test(source: PerturbationEncoder, targets: TargetPredictor, dataset: str, seed: int) -> HeldOutTest | None:
    """Test a model on some cells.

    Args:
        source: Encoder of the cells.
        targets: Model.
        dataset: Name of the data.
        seed: Seed of the choice of cells and genes.

    Returns:
        The result; None if there are too few cells.
    """
    total = source.cells.num_cells
    if total < FEWEST:
        return None
    chosen = np.random.default_rng(seed).permutation(total)
    number = min(TEST_CELLS, total // 4)
    test = _Half.make(_read(source, np.sort(chosen[:number])), seed)
    others = _Half.make(_read(source, np.sort(chosen[number : number + OTHER_CELLS])), seed)
    means, rates, smoothed, near = _baselines(test, others, seed)
    rows = test.batch.rows
    owners, tokens = rows.cells()[test.hidden], rows.tokens[test.hidden]
    predicted = {
        OURS: targets.hidden_genes(test.batch, test.hidden)[test.hidden].astype(np.float64),
        MEAN: means[tokens],
        SMOOTHED: smoothed[owners, tokens],
    }
    truth = test.values[test.hidden]
    told = _tell_expressed(test, targets, rates, near, seed)
    report = Report("imputation", dataset)
    found: dict[str, dict[str, np.ndarray]] = {}
    for method, values in predicted.items():
        found[method] = {**_by_cell(truth, values, owners, rows.num_cells), "auroc": told[method]}
        known = {name: each[np.isfinite(each)].tolist() for name, each in found[method].items()}
        report.add(method, [{name: each for name, each in known.items() if each}], numbers=[rows.num_cells])
    return HeldOutTest(report, _verdicts(found))


def _read(source: PerturbationEncoder, numbers: np.ndarray) -> PerturbationBatch:
    """Read cells with these rising numbers; all cells are passed by, and only these are kept."""
    parts: list[PerturbationBatch] = []
    for batch in source.stream(0, source.cells.num_cells):
        low, high = np.searchsorted(numbers, [batch.numbers[0], batch.numbers[-1] + 1])
        if high > low:
            parts.append(batch.pick(numbers[low:high] - batch.numbers[0]))
    lengths = np.concatenate([np.diff(part.rows.offsets) for part in parts])
    rows = GeneRows(
        np.concatenate([part.rows.tokens for part in parts]),
        np.concatenate([part.rows.counts for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )
    drugs = [part.drug_ids for part in parts if part.drug_ids is not None]
    return PerturbationBatch(source, rows, numbers, np.concatenate(drugs) if drugs else None)


def _baselines(test: _Half, others: _Half, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Learn the baselines from the other cells.

    Returns:
        By token: the mean value of cells that express it, and the share of cells that do; and, by test cell and token,
        the mean value of neighbours that express it, with the mean of all as one more neighbour, and the number of
        neighbours that do.
    """
    from sklearn.neighbors import NearestNeighbors

    rows, size = others.batch.rows, test.batch.source.num_tokens
    number = np.bincount(rows.tokens, minlength=size)
    sums = np.bincount(rows.tokens, weights=others.values, minlength=size)
    means = np.where(number > 0, sums / np.maximum(number, 1), others.values.mean())
    seen = [log_normalized(each.matrix(each.batch.rows.counts, ~each.hidden)) for each in (others, test)]
    components = Components(seen[0], seed)
    finder = NearestNeighbors(n_neighbors=min(NEIGHBOURS, rows.num_cells)).fit(components.train)
    nearest = finder.kneighbors_graph(components.transform(seen[1]))
    values, expressed = others.matrix(others.values), others.matrix(np.ones(len(rows.tokens)))
    near = (nearest @ expressed).toarray()
    smoothed = ((nearest @ values).toarray() + means) / (near + 1)
    return means, number / rows.num_cells, smoothed, near


def _by_cell(truth: np.ndarray, predicted: np.ndarray, owners: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Return the mean squared error and the correlation in each cell, NaN where there are too few genes."""
    number = np.bincount(owners, minlength=size)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(owners, weights=values, minlength=size) / number

    with np.errstate(invalid="ignore", divide="ignore"):
        error = mean((truth - predicted) ** 2)
        one, two = truth - mean(truth)[owners], predicted - mean(predicted)[owners]
        correlation = mean(one * two) / np.sqrt(mean(one**2) * mean(two**2))
    return {"mse": error, "correlation": np.where(number > 2, correlation, np.nan)}


def _tell_expressed(
    test: _Half, targets: TargetPredictor, rates: np.ndarray, near: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Return, for each method, each cell's AUROC of hidden expressed genes against as many that are not expressed."""
    rows, batch = test.batch.rows, test.batch
    random = np.random.default_rng(seed)
    there, room = np.flatnonzero(rates > 0), batch.source.room
    most = _MOST_HIDDEN if room is None else max(1, min(_MOST_HIDDEN, room // 4))
    hidden, added_cells, added = np.zeros(len(rows.tokens), dtype=bool), [], []
    for cell in range(rows.num_cells):
        here = np.arange(rows.offsets[cell], rows.offsets[cell + 1])
        lacking = np.setdiff1d(there, rows.tokens[here])
        mine = here[test.hidden[here]]
        number = min(len(mine), len(lacking), most)
        hidden[random.choice(mine, number, replace=False)] = True
        added.append(random.choice(lacking, number, replace=False))
        added_cells.append(np.full(number, cell))
    owners, tokens = np.concatenate(added_cells), np.concatenate(added)
    ours = np.concatenate(targets.predict(batch, hidden, owners, tokens, 2 * most, ~test.hidden))
    cells = np.concatenate([rows.cells()[hidden], owners])
    genes = np.concatenate([rows.tokens[hidden], tokens])
    truth = np.repeat([1, 0], [int(hidden.sum()), len(tokens)])
    scores = {OURS: ours, MEAN: rates[genes], SMOOTHED: near[cells, genes] + rates[genes]}
    return {
        method: np.array([auroc(truth[cells == cell], values[cells == cell]) for cell in range(rows.num_cells)])
        for method, values in scores.items()
    }


def _verdicts(found: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Return a sentence for each comparison; differences are taken cell by cell."""
    sentences = []
    for metric, what, sign in (("mse", "how much of a gene a cell expresses", -1), ("auroc", "whether it does", 1)):
        for other in (MEAN, SMOOTHED):
            differences = sign * (found[OURS][metric] - found[other][metric])
            sentences.append(f"{_verdict(differences[np.isfinite(differences)].tolist())} {other} at {what}.")
    return sentences


def _verdict(differences: Sequence[float]) -> str:
    if len(differences) < 2:
        return "There are too few cells to compare the model with the"
    found = interval(differences)
    if found["low"] > 0:
        return "The model beats the"
    return "The model loses to the" if found["high"] < 0 else "The model is not told apart from the"
