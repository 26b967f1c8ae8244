# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The plan of a run: perturbations, their cells, and the genes of similar expression that each is compared with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tahoex1_hf.cells.encoding import CHUNK_CELLS
from tahoex1_hf.cells.gene_names import shown_names
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.perturbation.cells import PerturbationEncoder

# A block of perturbations is measured together, and kept when it is done. A block has at most this many perturbed
# cells, enough for full batches, and at most this many perturbations, fewer where the change of every gene is summed.
_BLOCK_CELLS, _BLOCK, _BLOCK_EVERY_GENE = 2048, 512, 32


@dataclass(frozen=True)
class Task:
    """Genes that are perturbed together in the cells of one group.

    Attributes:
        group: Number of the group.
        genes: Tokens of the genes.
        control: Whether the genes serve only as a control.
    """

    group: int
    genes: tuple[int, ...]
    control: bool = False


@dataclass
class Groups:
    """The cells that are perturbed.

    Attributes:
        names: Name of each group.
        numbers: Increasing cell numbers of each group.
    """

    names: list[str]
    numbers: list[np.ndarray]

    def chunks(self, group: int) -> Iterator[np.ndarray]:
        """Yield the cell numbers of a group, a chunk at a time."""
        yield from chunks(self.numbers[group])


def chunks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Yield cell numbers, a chunk at a time."""
    for start in range(0, len(numbers), CHUNK_CELLS):
        yield numbers[start : start + CHUNK_CELLS]


def choose_cells(source: CellInput, cells: Any, name: str) -> np.ndarray:
    """Return the chosen cells as a `(cells,)` bool mask.

    Args:
        source: Cells to choose from.
        cells: Mask, comparison over columns of `obs`, or None for all cells.
        name: Name of the argument, for messages.

    Raises:
        ValueError: If the mask has another length, the expression does not fit `obs`, or no cell is chosen.
    """
    if cells is None:
        mask = np.ones(source.num_cells, dtype=bool)
    elif isinstance(cells, str):
        mask = _query(source, cells, name)
    else:
        mask = np.asarray(cells)
        if mask.dtype != bool or mask.shape != (source.num_cells,):
            raise ValueError(
                f"{name} has shape {mask.shape} and dtype {mask.dtype}: pass True or False for each of the "
                f"{source.num_cells} cells, or a comparison like 'cell_type == \"B\"'."
            )
    if not mask.any():
        raise ValueError(f"{name}={cells!r} leaves none of the {source.num_cells} cells: choose others.")
    return mask


def _query(source: CellInput, expression: str, name: str) -> np.ndarray:
    import pandas as pd

    from tahoex1_hf.data.columns import filter_mask
    from tahoex1_hf.data.config import filter_columns

    try:
        columns = filter_columns(expression)
        missing = [column for column in columns if column not in source.obs_columns]
        if missing:
            raise ValueError(f"{missing[0]!r} is not in adata.obs: it has {source.obs_columns}.")
        parts = {column: source.column(column).array for column in columns}
        return filter_mask(pd.DataFrame(parts, index=range(source.num_cells)), expression)
    except ValueError as error:
        raise ValueError(f"{name}={expression!r}: {error}") from None


def make_groups(source: CellInput, mask: np.ndarray, groupby: str | None) -> Groups:
    """Group the chosen cells by a column of `obs`; cells without a value there are left out."""
    numbers = np.flatnonzero(mask)
    if groupby is None:
        return Groups(["all"], [numbers])
    if groupby not in source.obs_columns:
        raise ValueError(f"groupby={groupby!r} is not in adata.obs: it has {source.obs_columns}.")
    column = source.column(groupby).iloc[numbers]
    known = column.notna().to_numpy()
    values = np.array([str(value) for value in column], dtype=object)
    names = sorted(set(values[known]))
    if not names:
        raise ValueError(f"groupby={groupby!r} is missing for all of the chosen cells.")
    return Groups(names, [numbers[known & (values == name)] for name in names])


class GeneNames:
    """Translation between the names that a user gives to genes and their tokens.

    Args:
        source: Cells; symbols are also looked for in the columns of `var`.
        symbols: Gene symbol -> Ensembl id, or None.
    """

    def __init__(self, source: PerturbationEncoder, symbols: Mapping[str, str] | None):
        self.source, self.var = source, source.cells.var
        self.symbols: Mapping[str, str] = symbols or {}

    def tokens(self, names: Sequence[str]) -> list[int]:
        """Return the tokens of genes named by Ensembl id or symbol.

        Raises:
            ValueError: If the data or the vocabulary lacks a gene, or a name means several genes.
        """
        wanted = [str(name) for name in names]
        if not wanted:
            raise ValueError('genes is empty: name genes, or pass "all".')
        found = {}
        for name in wanted:
            token = self.source.tokenizer.gene_token(name, self.symbols)
            if token >= 0 and self.source.column_of[token] >= 0:
                found[name] = token
        missing = [name for name in wanted if name not in found]
        for column in [self.var.index.to_series(), *(self.var[name] for name in self.var.columns)]:
            texts = column.astype(str).to_numpy()
            for name in missing:
                tokens = {int(token) for token in self.source.genes.token_ids[texts == name] if token >= 0}
                if len(tokens) > 1:
                    raise ValueError(f"genes: {name!r} is {len(tokens)} genes of the data: name it by its Ensembl id.")
                if tokens:
                    found[name] = tokens.pop()
            missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(
                f"genes: {missing} are not among the genes that data and model have in common. Name them by Ensembl "
                "id, by a name in adata.var, or pass gene_symbols=."
            )
        tokens_of = [found[name] for name in wanted]
        twice = sorted({name for name, token in zip(wanted, tokens_of, strict=True) if tokens_of.count(token) > 1})
        if twice:
            raise ValueError(f"genes names a gene twice: {twice}.")
        return tokens_of

    def labels(self, asked: Sequence[str] | str = "all") -> dict[int, str]:
        """Return the name of each gene of the data, by token: its symbol where there is one.

        Args:
            asked: Genes that the user named, which keep these names; or `"all"`.
        """
        shown = shown_names(self.var, self.symbols)
        labels: dict[int, str] = {}
        for token, name in zip(self.source.genes.token_ids.tolist(), shown, strict=True):
            if token >= 0:
                labels.setdefault(token, str(name))
        if not isinstance(asked, str):
            labels.update(zip(self.tokens(asked), map(str, asked), strict=True))
        return labels


@dataclass
class Levels:
    """Expression of each gene in each group; genes are in the order of `PerturbationEncoder.tokens`.

    Attributes:
        cells: `(groups,)` number of cells.
        expressing: `(groups, genes)` number of cells that express the gene.
        sums: `(groups, genes)` sum of the gene's counts.
    """

    cells: np.ndarray
    expressing: np.ndarray
    sums: np.ndarray

    @classmethod
    def measure(cls, source: PerturbationEncoder, groups: Groups) -> "Levels":
        """Read all cells once, and raise ValueError for counts that cannot be encoded."""
        shape = (len(groups.names), len(source.tokens))
        expressing, sums = np.zeros(shape, dtype=np.int64), np.zeros(shape)
        for group in range(len(groups.names)):
            for numbers in groups.chunks(group):
                cells = source.read(numbers)
                source.check(cells)
                columns = source.column_of[cells.rows.tokens]
                expressing[group] += np.bincount(columns, minlength=shape[1])
                sums[group] += np.bincount(columns, weights=cells.rows.counts, minlength=shape[1])
        return cls(np.array([len(numbers) for numbers in groups.numbers]), expressing, sums)

    def coordinates(self, group: int) -> np.ndarray:
        """Return `(genes, 2)`: log2 of the share of cells that express a gene, and log2 of its mean count there."""
        expressing = self.expressing[group]
        share = np.log2((expressing + 1) / (self.cells[group] + 1))
        return np.stack([share, np.log2((self.sums[group] + 1) / (expressing + 1))], axis=1)


class Controls:
    """Genes of similar expression, whose perturbation shows the shift to expect from any gene of that expression.

    Candidates are the genes that at least `min_cells` cells express, without the tested genes. The nearest are taken,
    by the squared difference of the log2 share of cells that express a gene, plus that of the log2 mean count in these
    cells.

    Args:
        levels: Expression of the genes.
        tested: `(tested,)` columns of the genes that must not be controls.
        number: Number of controls per perturbation.
        min_cells: Fewest cells that must express a control.
        everywhere: Whether to count the expressing cells of all groups instead of the group alone, for perturbations
            that also change cells which do not express the gene.
        ties: `(genes,)` numbers that decide among genes that are equally near, the lower first; many genes that few
            cells express are equally near.

    Attributes:
        expressed: `(groups, genes)` bool, the genes that enough cells express.
        free: `(genes,)` bool, the genes that may be controls.
    """

    def __init__(
        self, levels: Levels, tested: np.ndarray, number: int, min_cells: int, everywhere: bool, ties: np.ndarray
    ):
        self.levels, self.number, self.ties = levels, number, ties
        total = levels.expressing.sum(0)
        self.expressed = np.stack([total if everywhere else row for row in levels.expressing]) >= min_cells
        self.free = np.ones(levels.expressing.shape[1], dtype=bool)
        self.free[tested] = False

    def of(self, group: int, columns: Sequence[int], number: int | None = None) -> list[tuple[int, ...]]:
        """Return the columns of controls, each with as many genes as `columns`, the nearest first.

        Args:
            group: Number of the group.
            columns: Columns of the genes of the perturbation.
            number: Most controls; by default the class's. Fewer are the first of more.
        """
        number = self.number if number is None else number
        allowed = self.free & self.expressed[group]
        allowed[list(columns)] = False
        candidates, places = np.flatnonzero(allowed), self.levels.coordinates(group)
        nearest = []
        for column in columns:
            distance = ((places[candidates] - places[column]) ** 2).sum(1)
            nearest.append(candidates[np.lexsort((self.ties[candidates], distance))].tolist())
        sets: list[tuple[int, ...]] = []
        for start in range(min(number, len(candidates) // max(1, len(columns)))):
            chosen: list[int] = []
            for order in nearest:  # of each gene, the start-th nearest that is not in the set yet
                chosen.append(next(gene for gene in order[start:] + order[:start] if gene not in chosen))
            sets.append(tuple(chosen))
        return list(dict.fromkeys(sets))


def blocks(tasks: Sequence[Task], num_cells: Sequence[int], every_gene: bool) -> Iterator[list[Task]]:
    """Cut tasks into blocks that are measured together, which makes fuller batches; the cuts are always the same.

    Args:
        tasks: Tasks of one group, all with the same number of genes.
        num_cells: About how many cells each task changes.
        every_gene: Whether the change of every gene is summed, which takes memory for each task of a block and gene.
    """
    block: list[Task] = []
    total, most = 0, _BLOCK_EVERY_GENE if every_gene else _BLOCK
    for task, cells in zip(tasks, num_cells, strict=True):
        if block and (len(block) == most or total + cells > _BLOCK_CELLS):
            yield block
            block, total = [], 0
        block.append(task)
        total += cells
    if block:
        yield block
