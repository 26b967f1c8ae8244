# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding of cells: look up genes and drugs by name, choose the genes of long cells, turn counts into values.

Except for the tables of genes and drugs, these are pure functions on flat arrays with offsets, vectorised over the
cells. This file is published on the Hugging Face Hub beside the weights, so it imports only numpy, transformers and a
file that is published with it.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from .configuration_tahoe_x1 import read_vocabulary, similar_names

logger = logging.get_logger(__name__)

_VERSION_SUFFIX = re.compile(r"\.\d+$")
_SPECIAL_TOKEN = re.compile(r"^<.*>$")
# The missing values of Python, numpy and pandas as text.
_MISSING = ("None", "nan", "<NA>")
_OTHER_SPECIES = re.compile(r"^ENS[A-Z]{3,4}G\d+")


def bin_expression(values: np.ndarray, offsets: np.ndarray, num_bins: int = 51, right: bool = False) -> np.ndarray:
    """Replace each expression value by the number of its cell's quantile bin.

    The formula is the original's. The `num_bins - 1` edges of a cell are the `torch.quantile` of its non-zero values
    at `linspace(0, 1, num_bins - 1)` in float32, with linear interpolation. The bin of a value is the number of edges
    below it plus one; with `right` it is the number of edges that are not above it. Results equal the original's bit
    for bit.

    Args:
        values: `(total,)` expression values of all cells, one cell after the other, in any unit; converted to float32.
        offsets: `(cells + 1,)` bounds of the cells: cell `i` is `values[offsets[i]:offsets[i + 1]]`; cells may be
            empty.
        num_bins: Number of bins, including the bin for zeros; at least 2.
        right: Whether edges equal to a value count as below it (the original's `right_binning`).

    Returns:
        `(total,)` float32 bins, `1..num_bins - 1` for values above zero. Zeros are not used for the edges; they get
        the bin 0, or 1 if `right` is False.

    Raises:
        ValueError: If `num_bins` is below 2, `offsets` do not partition `values`, or a value is NaN.
    """
    if num_bins < 2:
        raise ValueError(f"num_bins={num_bins}: quantile bins need at least 2.")
    values = np.asarray(values, dtype=np.float32) + np.float32(0)  # a copy in which -0.0 has become 0.0
    lengths = _checked_lengths(offsets, len(values))
    if not len(values):
        return values
    if np.isnan(values).any():
        raise ValueError("values holds NaN, which has no bin: remove or replace the missing values first.")
    codes, table_values, table_cells, table_counts = _distinct_values(values, lengths)
    table_counts[table_values == 0] = 0
    edges = _quantile_edges(table_values, table_cells, table_counts, len(lengths), num_bins - 1)
    edge_cells = np.repeat(np.arange(len(lengths)), num_bins - 1)
    bins = np.searchsorted(
        _sort_keys(edge_cells, edges), _sort_keys(table_cells, table_values), side="right" if right else "left"
    )
    bins -= table_cells * (num_bins - 1)  # subtract the edges of the cells before
    bins[table_values == 0] = 0
    return (bins + (not right)).astype(np.float32)[codes]


def log_normalize(values: np.ndarray, offsets: np.ndarray, target_sum: float = 10000.0) -> np.ndarray:
    """Scale every cell to the same sum and take `log1p`: the original's `log1p(x / (sum + 1e-9) * target_sum)`.

    Args:
        values: `(total,)` non-negative counts of all cells, one cell after the other.
        offsets: `(cells + 1,)` bounds of the cells: cell `i` is `values[offsets[i]:offsets[i + 1]]`; cells may be
            empty.
        target_sum: Sum of every cell before the logarithm.

    Returns:
        `(total,)` float32 values. They are computed in float64, so they do not depend on the order of the genes.

    Raises:
        ValueError: If `offsets` do not partition `values`.
    """
    lengths = _checked_lengths(offsets, len(values))
    cells = np.repeat(np.arange(len(lengths)), lengths)
    wide = np.asarray(values, dtype=np.float64)
    sums = np.bincount(cells, weights=wide, minlength=len(lengths))
    return np.log1p(wide / (sums[cells] + 1e-9) * target_sum).astype(np.float32)


def _checked_lengths(offsets: np.ndarray, total: int) -> np.ndarray:
    lengths = np.diff(np.asarray(offsets, dtype=np.int64))
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != total or (lengths < 0).any():
        raise ValueError(f"offsets must rise from 0 to the number of values ({total}).")
    return lengths


def _distinct_values(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Make a table with one row for each distinct value of each cell, in rising order.

    A cell has only a few dozen distinct counts among thousands of genes, and all further work is done per row.

    Returns:
        The row of every value, and for each row its value, its cell, and the number of values in it.
    """
    cells = np.repeat(np.arange(len(lengths)), lengths)
    # In the usual case, small integers, a histogram finds the distinct values without sorting. (Rows may be empty.)
    if values.min() >= 0 and values.max() < 2**24 and (values == np.floor(values)).all():
        counts = values.astype(np.int64)
        sizes = np.zeros(len(lengths), dtype=np.int64)
        filled = lengths > 0
        sizes[filled] = np.maximum.reduceat(counts, (np.cumsum(lengths) - lengths)[filled]) + 1
        if sizes.sum() <= 4 * len(values) + 1024:
            starts = np.cumsum(sizes) - sizes
            codes = starts[cells] + counts
            table_cells = np.repeat(np.arange(len(lengths)), sizes)
            table_values = (np.arange(sizes.sum()) - starts[table_cells]).astype(np.float32)
            return codes, table_values, table_cells, np.bincount(codes, minlength=len(table_cells))
    order = np.argsort(_sort_keys(cells, values))
    codes = np.empty_like(order)
    codes[order] = np.arange(len(order))
    return codes, values[order], cells[order], np.ones(len(order), dtype=np.int64)


def _sort_keys(cells: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return int64 keys that sort by cell, then by float32 value: the bits of a float32 rise with its magnitude."""
    bits = values.view(np.int32).astype(np.int64)
    return (cells.astype(np.int64) << 32) + np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def unit_quantiles(count: int) -> np.ndarray:
    """Return `torch.linspace(0, 1, count)`, `(count,)` float32, as processors with a fused multiply-add compute it."""
    step, number = np.float64(np.float32(1) / np.float32(max(count - 1, 1))), np.arange(count)  # exact from here on
    return np.where(number < max(1, count // 2), step * number, 1 - step * (count - 1 - number)).astype(np.float32)


def _fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return `a * b + c` of float32 arrays, rounded once (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819)."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)  # the product is exact
    total = product + addend
    error = (product - (total - (total - product))) + (addend - (total - product))
    even = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)  # an odd total can be rounded again
    return np.where(even, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def _quantile_edges(
    table_values: np.ndarray, table_cells: np.ndarray, table_counts: np.ndarray, num_cells: int, num_edges: int
) -> np.ndarray:
    """Return the quantiles of every cell, `(num_cells * num_edges,)` float32, rounded like those of `torch.quantile`.

    torch computes the rank q * (n - 1) in float32, and interpolates between the values beside it with `lerp`, which
    uses a fused multiply-add on most processors. This function uses one on all processors.
    """
    cell_counts = np.bincount(table_cells, weights=table_counts, minlength=num_cells).astype(np.int64)
    last = np.maximum(cell_counts - 1, 0).astype(np.float32)
    ranks = (unit_quantiles(num_edges)[None, :] * last[:, None]).ravel()
    below, starts = np.floor(ranks), np.repeat(np.cumsum(cell_counts) - cell_counts, num_edges)
    upto = np.cumsum(table_counts)

    def value_at(rank: np.ndarray) -> np.ndarray:
        # A cell without non-zero values has no such row; the value that it gets here is never used.
        rows = np.searchsorted(upto, rank.astype(np.int64) + starts, side="right")
        return table_values[np.minimum(rows, len(table_values) - 1)]

    low, high, weight = value_at(below), value_at(np.ceil(ranks)), ranks - below
    near = weight < np.float32(0.5)
    return _fused_multiply_add(np.where(near, weight, weight - np.float32(1)), high - low, np.where(near, low, high))


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """The token of each column of a matrix.

    Attributes:
        token_ids: `(num_genes,)` int64 token ids; -1 for unknown genes.
        num_genes: Number of columns that were looked up.
        num_matched: Number of distinct tokens found.
        num_unknown: Number of columns without a token; they are left out of every cell.
        num_duplicates: Number of columns whose counts are added to an earlier column with the same token.
        unknown_examples: Up to five names without a token.
    """

    token_ids: np.ndarray
    num_genes: int
    num_matched: int
    num_unknown: int
    num_duplicates: int
    unknown_examples: tuple[str, ...]


class Vocabulary:
    """Tokens of a vocabulary file, and the genes among them.

    Attributes:
        ids: Token -> id.
        tokens: Id -> token.
        is_gene: `(largest id + 1,)` bool, True for genes, False for special tokens and fillers.
    """

    def __init__(self, ids: dict[str, int]):
        self.ids, self.tokens = ids, {index: token for token, index in ids.items()}
        self.is_gene = np.zeros(max(self.tokens) + 1, dtype=bool)
        self.is_gene[[index for token, index in ids.items() if not _SPECIAL_TOKEN.match(token)]] = True

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Vocabulary":
        """Read a `vocab.json`; raise ValueError if it cannot be used."""
        return cls(read_vocabulary(path))

    def match(
        self, gene_ids: Iterable[str], symbols: Mapping[str, str] | None, advice: Callable[[], str] = str
    ) -> GeneMatch:
        """Look up genes like `TahoeX1Tokenizer.match_genes`; `advice` returns the end of the error message."""
        if isinstance(gene_ids, (str, bytes)):
            raise TypeError(f"gene_ids={gene_ids!r} is one string: pass a sequence of gene ids.")
        names = [str(name) for name in gene_ids]
        token_ids = np.array([self.gene_token(name, symbols) for name in names], dtype=np.int64)
        known = token_ids[token_ids >= 0]
        matched = len(np.unique(known))
        unknown = [name for name, token in zip(names, token_ids, strict=True) if token < 0]
        # Some columns of symbols hold an Ensembl id if a gene has no symbol, so a few known ids prove nothing.
        symbols_unread = symbols is None and 2 * sum(not name.startswith("ENS") for name in unknown) > len(names)
        if 100 * len(known) < len(names) or symbols_unread or not names:
            raise ValueError(self._explain_no_match(names, unknown, symbols) + advice())
        if unknown:
            level = logging.WARNING if 2 * len(known) < len(names) else logging.INFO
            left_out = f"{len(unknown)} of {len(names)} genes are not in the vocabulary and are left out"
            logger.log(level, f"{left_out}: {unknown[:5]}")
        if len(known) > matched:
            logger.warning(f"{len(known) - matched} gene columns repeat another gene: their counts are added up.")
        return GeneMatch(token_ids, len(names), matched, len(unknown), len(known) - matched, tuple(unknown[:5]))

    def gene_token(self, name: str, symbols: Mapping[str, str] | None = None) -> int:
        """Return the token id of a gene; -1 if it is unknown."""
        name = name if symbols is None else symbols.get(name, name)
        token = self.ids.get(name)
        token = self.ids.get(_VERSION_SUFFIX.sub("", name), -1) if token is None else token
        return token if token >= 0 and self.is_gene[token] else -1

    def _explain_no_match(self, names: list[str], unknown: list[str], symbols: Mapping[str, str] | None) -> str:
        vocabulary = [self.tokens[int(i)] for i in np.flatnonzero(self.is_gene)[:3]]
        start = f"{len(names) - len(unknown)} of {len(names)} genes are in the vocabulary"
        if not names:
            return "gene_ids is empty: pass one Ensembl gene id per matrix column."
        foreign = sum(bool(_OTHER_SPECIES.match(name)) for name in unknown)
        if 2 * foreign >= len(unknown):
            return (
                f"{start}: {unknown[:3]} are Ensembl ids of another species, and the vocabulary is human (like "
                f"{vocabulary}). Map the genes to human orthologues first."
            )
        if symbols is None and 2 * sum(not name.startswith("ENS") for name in unknown) > len(unknown):
            return (
                f"{start}: {unknown[:3]} look like gene symbols, and the vocabulary has Ensembl ids (like "
                f"{vocabulary}). Pass Ensembl ids, or gene_symbols= with a table symbol -> Ensembl id."
            )
        return f"{start}: {unknown[:3]} are unknown, the vocabulary has {vocabulary}. Pass human Ensembl gene ids."

    def knows_most(self, names: Iterable[Any]) -> bool:
        """Return whether more than half of the names are genes of the vocabulary."""
        tokens = [self.gene_token(str(name)) for name in names]
        return 2 * sum(token >= 0 for token in tokens) > len(tokens)

    def cell_tokens(self, genes: np.ndarray, lookup: Mapping[str, int]) -> np.ndarray:
        """Return the token ids of a cell's genes.

        Args:
            genes: `(genes,)` names of the genes, or integer token ids, which are checked.
            lookup: Name -> token id.

        Raises:
            TypeError: If `genes` holds neither names nor integers.
            ValueError: If a token id is not that of a gene.
        """
        if genes.dtype.kind in "UO":
            return np.array([lookup[str(name)] for name in genes], dtype=np.int64)
        if genes.dtype.kind not in "iu" and len(genes):
            raise TypeError(f"genes have dtype {genes.dtype}: pass Ensembl ids or integer token ids.")
        tokens = genes.astype(np.int64)
        wrong = tokens[(tokens < 0) | (tokens >= len(self.is_gene))]
        wrong = wrong if len(wrong) else tokens[~self.is_gene[tokens]]
        if len(wrong):
            what = f"{wrong[0]} ({self.tokens.get(int(wrong[0]))}), which is not the token id of a gene"
            raise ValueError(f"genes holds {what}: leave special tokens such as <cls> out, they are added here.")
        return tokens


class DrugTable:
    """The drugs of a model, by name. Blanks around a name are ignored, and id 0 means no drug.

    Args:
        ids: Drug -> id.
    """

    def __init__(self, ids: Mapping[str, int]):
        self.ids = dict(ids)
        self._trimmed = {name.strip(): number for name, number in ids.items()}
        self._reported: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the reported drugs, since a hash of the tokenizer must not change when it is used."""
        return {**self.__dict__, "_reported": set()}

    def find(self, name: Any) -> int | None:
        """Return the id of a drug, 0 for a missing value or "", None for a drug that is not in the table."""
        if not isinstance(name, str):
            name = "" if str(name) in _MISSING else str(name)
        found = self.ids.get(name, self._trimmed.get(name.strip()))
        return found if found is not None or name.strip() else 0

    def look_up(self, names: Sequence[Any]) -> tuple[np.ndarray, Counter[str]]:
        """Look up the drug of each cell.

        Returns:
            `(cells,)` int64 ids, 0 for drugs that are not in the table; and the number of cells of each such drug.
        """
        ids = np.array([self.find(name) or 0 for name in names], dtype=np.int64)
        return ids, self.unknown(Counter(names))

    def unknown(self, cells: Mapping[Any, int]) -> Counter[str]:
        """Return the drugs that are not in the table, with the number of cells of each.

        Args:
            cells: Drug -> number of cells.
        """
        total: Counter[str] = Counter()
        for name, number in cells.items():
            if self.find(name) is None:
                total[str(name).strip()] += int(number)
        return total

    def settle(self, unknown: Mapping[str, int], rule: str, warn: str = "always") -> None:
        """Apply the rule for drugs that are not in the table.

        Args:
            unknown: Drug -> number of cells.
            rule: `"error"` to raise ValueError; `"pad"` to warn that the cells count as cells without a drug.
            warn: `"always"`; `"new"` to warn only if some of the drugs have not been reported before; or `"never"`,
                which still marks the drugs as reported.
        """
        told = warn == "never" or (warn == "new" and self._reported.issuperset(unknown))
        if rule == "pad":
            self._reported.update(unknown)
        if not unknown or (rule == "pad" and told):
            return
        most = sorted(unknown, key=lambda name: (-unknown[name], name))
        listed = ", ".join(f"{name!r} ({unknown[name]:,})" for name in most[:20])
        listed += f" and {len(most) - 20} others" if len(most) > 20 else ""
        if rule == "error":
            raise ValueError(
                f"drugs: {most[0]!r} is not in the drug table{similar_names(most[0], self.ids)} Unknown drugs, with "
                f"their numbers of cells: {listed}. List the names with tokenizer.drug_to_id, pass None for no drug, "
                'or treat unknown drugs as no drug, as the original does: unknown_drugs="pad" (--unknown-drugs pad).'
            )
        logger.warning(
            f"Drugs that are not in the drug table, with their numbers of cells: {listed}. These cells count as cells "
            'without a drug, as in the original; unknown_drugs="error" refuses them.'
        )


class GeneRows(NamedTuple):
    """The expressed genes of some cells that are in the vocabulary.

    Attributes:
        tokens: `(total,)` token ids of all cells, one cell after the other.
        counts: `(total,)` float32 counts.
        offsets: `(cells + 1,)` bounds of the cells: cell `i` is `tokens[offsets[i]:offsets[i + 1]]`.
        first_cell: Number of the first cell in the input, where the cells are consecutive.
        obs: DataFrame with the requested columns of obs, one row per cell; None where none were requested.
        unknown_counts: Sum of the counts of genes that are not in the vocabulary.
    """

    tokens: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    first_cell: int = 0
    obs: Any = None
    unknown_counts: float = 0.0

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1

    def cells(self) -> np.ndarray:
        """Return the row number of the cell of each gene, `(total,)` int64."""
        return np.repeat(np.arange(self.num_cells), np.diff(self.offsets))

    def select(self, keep: np.ndarray) -> "GeneRows":
        """Return the genes at which `keep`, `(total,)` bool, is True."""
        offsets = np.concatenate([[0], np.cumsum(keep)])[self.offsets]
        return self._replace(tokens=self.tokens[keep], counts=self.counts[keep], offsets=offsets)


def as_counts(values: Any) -> np.ndarray:
    """Convert counts of any integer, boolean or real type to float32; raise TypeError for others."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"counts have dtype {array.dtype}: pass integers, booleans or real numbers.")
    return array.astype(np.float32, copy=False)


def matrix_rows(matrix: Any, genes: GeneMatch) -> tuple[GeneRows, bool]:
    """Read the known, non-zero entries of a matrix.

    Args:
        matrix: `(cells, genes)` counts, sparse or dense.
        genes: Tokens of its columns.

    Returns:
        The genes of each cell in the order of the columns, and whether a gene may occur twice in a cell.
    """
    if getattr(matrix, "ndim", 2) != 2 or matrix.shape[1] != genes.num_genes:
        raise ValueError(
            f"counts has shape {tuple(matrix.shape)}, but {genes.num_genes} gene ids were matched: pass rows of cells "
            "whose columns are those genes (one cell: counts.reshape(1, -1))."
        )
    if hasattr(matrix, "tocsr"):
        matrix = to_csr(matrix)
        columns, counts = matrix.indices, as_counts(matrix.data)
        offsets = np.asarray(matrix.indptr, dtype=np.int64)
    else:
        dense = np.asarray(matrix)
        cells, columns = np.nonzero(dense)
        counts = as_counts(dense[cells, columns])
        offsets = np.searchsorted(cells, np.arange(len(dense) + 1))
    keep = (genes.token_ids[columns] >= 0) & (counts != 0)
    columns, counts = columns[keep], counts[keep]
    offsets = np.concatenate([[0], np.cumsum(keep)])[offsets]
    if genes.num_duplicates:  # move every column to the first one with its token
        _, first, inverse = np.unique(genes.token_ids, return_index=True, return_inverse=True)
        columns = first[inverse][columns]
    places = np.repeat(np.arange(len(offsets) - 1) * genes.num_genes, np.diff(offsets)) + columns
    if (places[1:] > places[:-1]).all():
        return GeneRows(genes.token_ids[columns], counts, offsets), False
    order = np.argsort(places, kind="stable")  # unsorted, repeated or merged entries: sort a copy
    return GeneRows(genes.token_ids[columns[order]], counts[order], offsets), True


def merge_repeats(rows: GeneRows) -> GeneRows:
    """Add up the counts of a gene that occurs several times in a cell, and put the sum at its first place."""
    cells = rows.cells()
    keys = cells * (rows.tokens.max(initial=0) + 1) + rows.tokens
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == len(keys):
        return rows
    order = np.argsort(first)
    sums = np.bincount(inverse, weights=rows.counts)[order].astype(np.float32)
    places = first[order]
    return GeneRows(rows.tokens[places], sums, np.searchsorted(cells[places], np.arange(len(rows.offsets))))


def mix64(numbers: np.ndarray) -> np.ndarray:
    """Scramble uint64 numbers (finaliser of SplitMix64; Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def content_numbers(rows: GeneRows) -> np.ndarray:
    """Return `(cells,)` uint64 numbers, each of which depends on a cell's genes and counts, but not on their order.

    The sample of a cell longer than the context is chosen by this number, so it depends neither on the file nor on
    the cell's place in it. Cells that happen to have the same number share their random numbers, which does no harm.
    """
    bits = np.ascontiguousarray(rows.counts, dtype=np.float32).view(np.uint32)
    products = rows.tokens.astype(np.uint64) * bits.astype(np.uint64)
    upto = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(products, dtype=np.uint64)])  # may wrap around
    return upto[rows.offsets[1:]] - upto[rows.offsets[:-1]]


def cell_streams(contents: np.ndarray, seed: int) -> np.ndarray:
    """Return the `(cells,)` uint64 starts of the random numbers of cells with these content numbers."""
    return mix64(mix64(np.array([seed], dtype=np.uint64)) + contents)


def sample_seed(seed: int, number: int) -> int:
    """Return the seed of one of several samples; the first sample, number 0, uses `seed` itself."""
    if number == 0:
        return seed
    return int(mix64(mix64(np.array([seed], dtype=np.uint64)) + np.uint64(number))[0] >> np.uint64(1))


def kept_genes(
    rows: GeneRows,
    seed: int,
    room: int,
    overflow: str,
    keep_first: bool = False,
    contents: np.ndarray | None = None,
) -> np.ndarray | None:
    """Choose the genes to keep of cells that have more than `room` genes.

    Args:
        rows: Genes of the cells.
        seed: Seed of the sampling.
        room: Largest number of genes of a cell.
        overflow: `"sample"` for random genes, chosen by a hash of seed, cell content and gene, so that a cell's sample
            depends on nothing else; `"highest"` for the genes with the highest counts, and among equal counts those
            with the lowest token ids; `"first"` for the first genes in storage order.
        keep_first: Whether to always keep a cell's first gene.
        contents: `(cells,)` content numbers for the sampling; by default those of `rows`.

    Returns:
        `(total,)` bool, True at the kept genes; None if all genes are kept.
    """
    lengths = np.diff(rows.offsets)
    long = np.flatnonzero(lengths > room)
    if not len(long):
        return None
    keep = np.ones(len(rows.tokens), dtype=bool)
    streams = cell_streams(content_numbers(rows) if contents is None else contents, seed)
    for cell in long:
        here = slice(rows.offsets[cell], rows.offsets[cell + 1])
        tokens, counts = rows.tokens[here], rows.counts[here]
        if overflow == "first":
            keep[here] = np.arange(len(tokens)) < room
            continue
        if overflow == "highest":
            falling = np.uint64(2**32 - 1) - counts.view(np.uint32)  # the bits of a float32 rise with it
            scores = (falling << np.uint64(32)) + tokens.astype(np.uint64)
        else:
            scores = mix64(streams[cell] + tokens.astype(np.uint64))
        if keep_first:
            scores[0] = 0
        keep[here] = False
        keep[here.start + np.argpartition(scores, room)[:room]] = True
    return keep


def to_csr(matrix: Any) -> Any:
    """Return a sparse matrix as CSR (stored by cell), with a warning if it was CSC (stored by gene)."""
    if getattr(matrix, "format", "csr") == "csc":
        logger.warning("The matrix is CSC (by gene) and is converted to CSR (by cell): convert it once to save time.")
    return matrix.tocsr()


def count_problem(rows: GeneRows, first_cell: int, gene_names: Mapping[int, str]) -> tuple[str | None, str | None]:
    """Look for values that cannot be counts.

    Args:
        rows: Genes and counts of the cells.
        first_cell: Number of the first cell in its data set, for the message.
        gene_names: Token id -> gene, for the message.

    Returns:
        Two messages: one about values that cannot be encoded, and one about values that can be encoded but do not look
        like counts. Each is None if there are no such values.
    """
    counts = rows.counts
    if not (counts.min(initial=0) >= 0 and counts.max(initial=0) < np.inf):  # false for NaN too
        place = int(np.flatnonzero(~(np.isfinite(counts) & (counts >= 0)))[0])
        value, gene = counts[place], gene_names[int(rows.tokens[place])]
        cell = first_cell + int(np.searchsorted(rows.offsets, place, side="right")) - 1
        where = f"counts: cell {cell}, gene {gene} has the value {value}"
        if value < 0 and value > -np.inf:
            return f"{where}: negative values look scaled (z-scores), not counted.", None
        return f"{where}: NaN and infinite values cannot be encoded; remove or replace them.", None
    if (counts == np.rint(counts)).all():
        return None, None
    with np.errstate(over="ignore"):
        sums = np.bincount(rows.cells(), weights=np.expm1(counts.astype(np.float64)))
    sums = sums[sums > 0]
    # If counts were scaled to a common sum before log1p, all cells have the same sum after the logarithm is undone.
    logarithms = len(sums) > 1 and sums.std() < 0.05 * sums.mean()
    looks = " and look log-normalised" if logarithms else ""
    return None, f"counts: the values are not integers{looks}. The models were trained on raw counts."


def _looks_like_counts(matrix: Any) -> bool:
    few = matrix[:5]
    values = np.asarray(few.data if hasattr(few, "tocsr") else few)
    is_number = values.size > 0 and values.dtype.kind in "biuf"
    return bool(is_number and values.min() >= 0 and values.max() > 0 and (values == np.rint(values)).all())


def count_hint(adata: Any, layer: str | None) -> str:
    """Return advice for an error message: the places of an AnnData that hold non-negative integers.

    Only the first five rows of each matrix are read.

    Args:
        adata: AnnData; None if there is none.
        layer: Layer that was used; None for `X`.
    """
    if adata is None:
        return " Pass the raw counts."
    others = [name for name in adata.layers if name not in (None, layer)]  # None is X since anndata 0.13
    places = [f'layer="{name}"' for name in others if _looks_like_counts(adata.layers[name])]
    if layer is not None and adata.X is not None and _looks_like_counts(adata.X):
        places.append("adata.X (leave out layer=)")
    if adata.raw is not None and _looks_like_counts(adata.raw.X):
        places.append("adata.raw (pass adata.raw.to_adata())")
    if not places:
        return " Pass the raw counts; this AnnData has no layer and no .raw with non-negative integers."
    return f" Raw counts seem to be in {' and in '.join(places)}: pass that."
