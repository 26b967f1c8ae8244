# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Perturbation screens: the mean expression of each perturbation, in random quarters that share no cell."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tahoex1_hf.benchmarking.cells import EvaluationFile

QUARTERS = 4
_CHUNK = 20_000  # cells whose values are computed at a time


@dataclass(frozen=True, eq=False)
class Screen:
    """Cells with a perturbation each; a group is the cells of one line with the same perturbation.

    Attributes:
        cells: Cells.
        control: Name of the controls.
        lines: Names of the cell lines; the group of a line's number is its controls.
        names: Perturbation of each group.
        line_of: Line number of each group, shape `(groups,)`.
        groups: Group of each cell, shape `(cells,)`.
        tested: Groups of perturbed cells that have a cell in each quarter, shape `(tested,)`.
    """

    cells: EvaluationFile
    control: str
    lines: list[str]
    names: list[str]
    line_of: np.ndarray
    groups: np.ndarray
    tested: np.ndarray

    def genes(self, group: int) -> frozenset[str]:
        """Return the names of the genes that are perturbed in a group; pairs are written as `A+B`."""
        return frozenset(name for name in self.names[group].split("+") if name != self.control)

    def controls(self) -> EvaluationFile:
        """Return the controls of all lines."""
        return EvaluationFile(self.cells.path, self.cells.adata[self.groups < len(self.lines)].copy())


def read_screen(cells: EvaluationFile, perturbation: str, control: str, line: str | None = None) -> Screen:
    """Find the perturbations of cells.

    Args:
        cells: Cells.
        perturbation: Column of obs with the perturbations.
        control: Value there of cells without one.
        line: Column of obs with the cell lines, each of which is compared with its own controls; None for one line.

    Raises:
        ValueError: If there is no such column or value, or a line has no perturbation or too few controls.
    """
    numbers, names = cells.labels(perturbation, "--label")
    if control not in names:
        raise ValueError(
            f"--control {control} is no value of {perturbation} in {cells.path}; there are {', '.join(names[:20])}."
        )
    lines, line_names = np.zeros(len(numbers), dtype=np.int64), ["all"]
    if line is not None:
        lines, line_names = cells.labels(line, "--line")
    without = names.index(control)
    found = sorted(set(zip(lines.tolist(), numbers.tolist(), strict=True)))
    keys = [(number, without) for number in range(len(line_names))] + [key for key in found if key[1] != without]
    place = {key: number for number, key in enumerate(keys)}
    groups = np.array([place[key] for key in zip(lines.tolist(), numbers.tolist(), strict=True)])
    sizes = np.bincount(groups, minlength=len(keys))
    line_of = np.array([number for number, _ in keys])
    tested = np.flatnonzero((sizes >= QUARTERS) & (np.arange(len(keys)) >= len(line_names)))
    for number, name in enumerate(line_names):
        if sizes[number] < QUARTERS or not (line_of[tested] == number).any():
            where = cells.path if line is None else f"{cells.path}, {line} {name}"
            raise ValueError(
                f"{where}: {sizes[number]} controls, and {int((line_of[tested] == number).sum())} perturbations with "
                f"{QUARTERS} cells or more; both are needed. Leave these cells out."
            )
    return Screen(cells, control, line_names, [names[which] for _, which in keys], line_of, groups, tested)


def quarter_sums(screen: Screen, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Add up the log-normalised counts of each group's cells, in four random quarters of them.

    Counts are scaled to the median of the cells' sums before the logarithm: scaled to 10,000, the few molecules of a
    targeted panel would make the difference between 0 and 1 larger than any other.

    Args:
        screen: Screen.
        seed: Seed of the quarters.

    Returns:
        `(groups, 4, genes)` float64 sums, and `(groups, 4)` numbers of cells. Cells are read a chunk at a time.
    """
    from scipy.sparse import csr_matrix

    size = len(screen.names)
    slots = QUARTERS * screen.groups + _quarters(screen.groups, size, seed)
    sums = np.zeros((size * QUARTERS, screen.cells.adata.n_vars))
    for start, values in _values(screen.cells):
        own = slots[start : start + values.shape[0]]
        used, row = np.unique(own, return_inverse=True)
        ones = np.ones(len(own))
        sums[used] += (csr_matrix((ones, (row, np.arange(len(own)))), shape=(len(used), len(own))) @ values).toarray()
    counts = np.bincount(slots, minlength=size * QUARTERS).reshape(size, QUARTERS)
    return sums.reshape(size, QUARTERS, -1), counts


def _quarters(groups: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return a random quarter for each cell, so that the quarters of a group differ by one cell at most."""
    order = np.random.default_rng(seed).permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=size))])[:-1]
    found = np.empty(len(groups), dtype=np.int64)
    found[order] = (np.arange(len(groups)) - starts[groups[order]]) % QUARTERS
    return found


def _values(cells: EvaluationFile) -> Iterator[tuple[int, "np.ndarray"]]:
    """Yield the first cell of a chunk and the chunk's log-normalised counts, CSR."""
    from scipy.sparse import diags

    counts = cells.adata.X
    sums = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    scales = np.divide(np.median(sums), sums, out=np.zeros_like(sums), where=sums > 0)
    for start in range(0, counts.shape[0], _CHUNK):
        values = (diags(scales[start : start + _CHUNK]) @ counts[start : start + _CHUNK].astype(np.float64)).tocsr()
        yield start, values.log1p()
