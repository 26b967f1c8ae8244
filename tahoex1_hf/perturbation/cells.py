# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cells with changed counts, encoded as the tokenizer would encode them, and the same cells unchanged.

A perturbation changes raw counts. Bins, or log1p values, are computed anew from the whole changed cell, as for a cell
that was measured that way. Cells longer than the context are sampled by the tokenizer's own rule, with one addition:
the perturbed genes are always in the sample, and the other genes of the sample are the same before and after. The
difference between the two samples is then due to the perturbation alone.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers.utils import logging

from tahoex1_hf.cells.encoding import CHUNK_CELLS, DrugIds, EncodeOptions, report_unknown_drugs
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.cells.rows import pick_cells
from tahoex1_hf.encoding_tahoe_x1 import (
    GeneMatch,
    GeneRows,
    content_numbers,
    count_problem,
    kept_genes,
)
from tahoex1_hf.inference.expression import halves
from tahoex1_hf.padding_tahoe_x1 import EncodedCells

PerturbationMode = Literal["delete", "overexpress", "percentile", "set"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Change:
    """The change of a perturbed gene's raw count.

    Attributes:
        mode: `"delete"` sets the count to 0; `"overexpress"` to the largest count of the cell, so that the gene is in
            the top bin, whether the cell expressed it or not; `"percentile"` to that percentile of the counts of the
            genes that the cell expresses, where the gene's count is lower; `"set"` to `value`.
        value: Raw count for `"set"`, percentile for `"percentile"`; None for the other modes.
    """

    mode: PerturbationMode
    value: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("delete", "overexpress", "percentile", "set"):
            raise ValueError(f'mode={self.mode!r}: pass "delete", "overexpress", "percentile" or "set".')
        if (self.mode in ("set", "percentile")) != (self.value is not None):
            raise ValueError(
                f'value={self.value}: pass a raw count with mode="set", or a percentile with mode="percentile", and '
                "only then."
            )
        if self.value is not None and not 0 <= self.value < np.inf:
            raise ValueError(f"value={self.value}: pass a raw count, zero or more.")
        if self.mode == "percentile" and not 0 < self.value <= 100:  # type: ignore[operator]
            raise ValueError(f'value={self.value}: pass a percentile above 0, up to 100, with mode="percentile".')

    def counts(self, cells: "PerturbationBatch") -> np.ndarray:
        """Return the new float32 count of a perturbed gene in each cell."""
        if self.mode in ("overexpress", "percentile"):
            return cells.percentile(100.0 if self.value is None else self.value)
        return np.full(cells.num_cells, self.value or 0.0, dtype=np.float32)

    def applied(self, before: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Return what becomes of counts: `new`, but a percentile lowers no count."""
        return np.maximum(before, new) if self.mode == "percentile" else np.broadcast_to(new, before.shape)


class PerturbationBatch:
    """A batch of cells before they are perturbed, and which of their genes are in the tokenizer's sample.

    Attributes:
        rows: Genes and counts of the cells, in the order of the data's columns.
        numbers: `(cells,)` number of each cell in the data.
        contents: `(cells,)` content number of each cell, by which it is sampled.
        drug_ids: `(cells,)` drug of each cell, or None.
        keep: `(total genes,)` bool, the genes that the tokenizer takes into its sample.
    """

    def __init__(
        self, source: "PerturbationEncoder", rows: GeneRows, numbers: np.ndarray, drug_ids: np.ndarray | None
    ):
        self.source, self.rows, self.numbers, self.drug_ids = source, rows, numbers, drug_ids
        self.contents, keep = content_numbers(rows), None
        if source.room is not None:
            overflow, seed = source.tokenizer.overflow, source.options.seed
            keep = kept_genes(rows, seed, source.room, overflow, contents=self.contents)
        self.keep = np.ones(len(rows.tokens), dtype=bool) if keep is None else keep
        self._percentiles: dict[float, np.ndarray] = {}

    def percentile(self, percent: float) -> np.ndarray:
        """Return the `(cells,)` percentile of each cell's counts, one that the cell has; 0 for a cell without."""
        if percent not in self._percentiles:
            found = np.zeros(self.num_cells, dtype=np.float32)
            if percent == 100:
                np.maximum.at(found, self.rows.cells(), self.rows.counts)
            else:
                ordered = self.rows.counts[np.lexsort((self.rows.counts, self.rows.cells()))]
                lengths = np.diff(self.rows.offsets)
                places = self.rows.offsets[:-1] + np.ceil((lengths - 1) * percent / 100).astype(np.int64)
                found[lengths > 0] = ordered[places[lengths > 0]]
            self._percentiles[percent] = found
        return self._percentiles[percent]

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return len(self.numbers)

    def encoded(self) -> EncodedCells:
        """Encode the unchanged cells, as the tokenizer does."""
        return self.source.encode(self.rows, self.keep, self.numbers, self.drug_ids)

    def pick(self, chosen: np.ndarray) -> "PerturbationBatch":
        """Return some of the cells, by their rising row numbers."""
        drugs = None if self.drug_ids is None else self.drug_ids[chosen]
        return PerturbationBatch(self.source, pick_cells(self.rows, chosen), self.numbers[chosen], drugs)

    def counts_of(self, tokens: np.ndarray) -> np.ndarray:
        """Return the `(cells, tokens)` counts of a few genes, given by distinct tokens."""
        slots = np.full(self.source.num_tokens, -1)
        slots[tokens] = np.arange(len(tokens))
        places = np.flatnonzero(slots[self.rows.tokens] >= 0)
        counts = np.zeros((self.num_cells, len(tokens)), dtype=np.float32)
        counts[self.rows.cells()[places], slots[self.rows.tokens[places]]] = self.rows.counts[places]
        return counts


class PerturbationEncoder:
    """Encoder of cells that are read by number, a few at a time, with or without some of their genes.

    Args:
        cells: Cells with raw counts.
        options: Options of the encoding.
        used: Numbers of the cells that will be read, by default all.

    Attributes:
        genes: Token of every column.
        tokens: `(genes,)` distinct tokens of the data, in the order of their first columns.
        room: Most genes of an encoded cell; None for no limit.
        num_tokens: Number of tokens of the vocabulary.
        column_of: `(num_tokens,)` position of each token in `tokens`, -1 for tokens that the data lacks.
    """

    genes: GeneMatch

    def __init__(self, cells: CellInput, options: EncodeOptions, used: np.ndarray | None = None):
        tokenizer = self.tokenizer = options.tokenizer
        self.options, self.cells = options, cells
        if tokenizer.first_gene_raw and options.drugs is None:
            raise ValueError(
                "tokenizer.first_gene_raw is on: the raw count of whichever gene comes first would be mistaken for "
                "an effect of the perturbation. Set it to False."
            )
        if cells.genes is None:
            raise ValueError(f"{cells.path} has no table of genes: perturb cells of an AnnData or an .h5ad file.")
        self.genes, self._drug_ids = cells.genes, DrugIds(cells, options, used)
        report_unknown_drugs([self._drug_ids])
        special = 1 if options.drugs is None else 2
        self.room = None if tokenizer.context_length is None else tokenizer.context_length - special
        self.num_tokens = max(tokenizer.get_vocab().values()) + 1
        known = self.genes.token_ids[self.genes.token_ids >= 0]
        self.tokens = known[np.sort(np.unique(known, return_index=True)[1])]
        self.column_of = np.full(self.num_tokens, -1)
        self.column_of[self.tokens] = np.arange(len(self.tokens))
        self._names = {token: name for name, token in tokenizer.get_vocab().items()}
        self._whole = copy.copy(tokenizer)
        self._whole.context_length = None

    def read(self, numbers: np.ndarray) -> PerturbationBatch:
        """Read the cells with these numbers, which increase."""
        rows = self.cells.rows_at(numbers)
        rows = rows._replace(tokens=rows.tokens.astype(np.int64))
        return PerturbationBatch(self, rows, numbers, self._drug_ids.of_cells(numbers))

    def stream(self, start: int, stop: int) -> Iterator[PerturbationBatch]:
        """Read cells `start` to `stop` in order, in chunks as for embedding."""
        for rows in self.cells.chunks(start, stop, CHUNK_CELLS, self._drug_ids.columns):
            numbers = rows.first_cell + np.arange(rows.num_cells)
            drug_ids = self._drug_ids.of_rows(rows)
            yield PerturbationBatch(self, rows._replace(tokens=rows.tokens.astype(np.int64)), numbers, drug_ids)

    def check(self, cells: PerturbationBatch) -> None:
        """Raise ValueError for counts that cannot be encoded; warn once of counts that look wrong."""
        lookup = self._names
        error, warning = count_problem(cells.rows, 0, lookup)
        if error is not None:  # find the cell, so that the message has its number in the data
            for cell in range(cells.num_cells):
                one = cells.rows.select(cells.rows.cells() == cell)
                part = GeneRows(one.tokens, one.counts, np.array([0, len(one.tokens)]))
                error, _ = count_problem(part, int(cells.numbers[cell]), lookup)
                if error is not None:
                    raise ValueError(error + self.cells.count_hint())
        if warning is not None and self.tokenizer.value_encoding != "raw":
            logger.warning_once(warning + self.cells.count_hint())

    def encode(
        self, rows: GeneRows, keep: np.ndarray, numbers: np.ndarray, drug_ids: np.ndarray | None
    ) -> EncodedCells:
        """Encode whole cells, then leave genes out.

        Args:
            rows: All genes of the cells, none with count 0.
            keep: `(total genes,)` bool, the genes to keep.
            numbers: `(cells,)` numbers of the cells in the data.
            drug_ids: `(cells,)` drug of each cell, or None.
        """
        whole = self._whole.encode_rows(rows, drug_ids=drug_ids, warn=lambda message: None)  # `check` has warned
        special = 1 if drug_ids is None else 2
        kept = np.ones(len(whole.input_ids), dtype=bool)
        kept[gene_places(rows.offsets, special)] = keep
        offsets = np.concatenate([[0], np.cumsum(kept)])[whole.offsets]
        return EncodedCells(
            whole.input_ids[kept], whole.expression_values[kept], offsets, drug_ids, numbers, whole.empty_cells
        )


def gene_places(offsets: np.ndarray, special: int) -> np.ndarray:
    """Return the index of every gene when each cell has `special` tokens in front; `offsets` do not count these."""
    cells = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.arange(offsets[-1]) + special * (cells + 1)


class Pairs:
    """Pairs of a cell with a perturbation, and the same cell without it ("before").

    The arrays of genes are `(total genes,)`, over the genes that a cell expresses before or after.

    Args:
        cells: Unperturbed cells.
        chosen: `(pairs,)` row of each pair's cell in `cells`.
        members: `(pairs, genes)` tokens that are perturbed together; at least one count of each pair changes.
        change: Change of their counts.

    Attributes:
        pair: Pair of every gene.
        tokens: Token of every gene.
        index: Index of the gene in `cells.rows`; -1 for a gene that the cell did not express.
        touched: Bool, the genes that are perturbed.
        keep: Bool, the genes in the sample.
        own_before: `(pairs,)` bool, the pairs whose "before" differs from the cell as the tokenizer encodes it: cells
            longer than the context whose sample was changed to hold the perturbed genes.

    Raises:
        ValueError: For a context that has no room for the perturbed genes.
    """

    def __init__(self, cells: PerturbationBatch, chosen: np.ndarray, members: np.ndarray, change: Change):
        self.cells, self.chosen, self.members = cells, chosen, members
        self._join(change)
        self.keep = self._sample()
        sampled = np.where(self.index >= 0, cells.keep[self.index], False) if len(cells.keep) else self.index >= 0
        own = (self.keep & (self.before > 0)) != sampled
        self.own_before = np.bincount(self.pair[own], minlength=len(chosen)) > 0

    def _join(self, change: Change) -> None:
        rows, chosen = self.cells.rows, self.chosen
        new = change.counts(self.cells)[chosen]
        lengths = np.diff(rows.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        pair = np.repeat(np.arange(len(chosen)), lengths)
        index = np.repeat(rows.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        tokens, before = rows.tokens[index], rows.counts[index]
        after, touched = before.copy(), np.zeros(len(tokens), dtype=bool)
        added_pairs, added_tokens = [], []
        for member in self.members.T:
            hits = np.flatnonzero(tokens == member[pair])
            touched[hits], after[hits] = True, change.applied(before[hits], new[pair[hits]])
            missing = new > 0
            missing[pair[hits]] = False
            added_pairs.append(np.flatnonzero(missing))
            added_tokens.append(member[missing])
        extra = np.concatenate(added_pairs)
        if len(extra):  # genes that the cell did not express, inserted in the order of columns
            pair, tokens = np.append(pair, extra), np.append(tokens, np.concatenate(added_tokens))
            order = np.lexsort((self.cells.source.column_of[tokens], pair))
            blank = np.zeros(len(extra), dtype=np.float32)
            before, after = np.append(before, blank)[order], np.append(after, new[extra])[order]
            touched = np.append(touched, np.ones(len(extra), dtype=bool))[order]
            index = np.append(index, np.full(len(extra), -1))[order]
            pair, tokens = pair[order], tokens[order]
        self.pair, self.tokens, self.index, self.touched = pair, tokens, index, touched
        self.before, self.after = before, after
        self.offsets = np.searchsorted(pair, np.arange(len(chosen) + 1))

    def _sample(self) -> np.ndarray:
        """Sample the perturbed genes, and as many others as there is room for, the same before and after."""
        source = self.cells.source
        keep = np.ones(len(self.tokens), dtype=bool)
        if source.room is None or np.diff(self.offsets).max(initial=0) <= source.room:
            return keep
        contents, seed, overflow = self.cells.contents[self.chosen], source.options.seed, source.tokenizer.overflow
        num_touched = np.bincount(self.pair[self.touched], minlength=len(self.chosen))
        for number in np.unique(num_touched).tolist():
            if number > source.room:
                raise ValueError(
                    f"{number} genes are perturbed together in a cell, and the context has room for {source.room}: "
                    "pass a larger max_length."
                )
            others = (num_touched == number)[self.pair] & ~self.touched
            rows = GeneRows(self.tokens, self.before, self.offsets).select(others)
            kept = kept_genes(rows, seed, source.room - number, overflow, contents=contents)
            if kept is not None:
                keep[others] = kept
        return keep

    def perturbed(self) -> tuple[EncodedCells, np.ndarray]:
        """Encode the perturbed cells; the second array has the index of each of their genes in the arrays here."""
        return self._encoded(self.after, np.ones(len(self.chosen), dtype=bool))

    def unperturbed(self, pairs: np.ndarray) -> tuple[EncodedCells, np.ndarray]:
        """Encode "before", in the form of `perturbed`, for the pairs that are True in `pairs`."""
        return self._encoded(self.before, pairs)

    def _encoded(self, counts: np.ndarray, pairs: np.ndarray) -> tuple[EncodedCells, np.ndarray]:
        there = np.flatnonzero((counts > 0) & pairs[self.pair])
        upto = np.searchsorted(self.pair[there], np.append(np.flatnonzero(pairs), len(pairs)))
        rows, chosen = GeneRows(self.tokens[there], counts[there], upto), self.chosen[pairs]
        drug_ids = None if self.cells.drug_ids is None else self.cells.drug_ids[chosen]
        kept = self.keep[there]
        return self.cells.source.encode(rows, kept, self.cells.numbers[chosen], drug_ids), there[kept]

    def hidden(self) -> tuple[np.ndarray, np.ndarray]:
        """Choose the genes that are hidden from the model and predicted: the half without the first perturbed gene.

        A perturbed gene is never hidden.

        Returns:
            `(total genes,)` bool, the hidden genes; `(pairs,)` bool, the pairs that need their own "before".
        """
        contents, seed = self.cells.contents[self.chosen], self.cells.source.options.seed
        seen = halves(np.arange(len(self.chosen)), self.members[:, 0], contents, seed)
        other = halves(self.pair, self.tokens, contents, seed) != seen[self.pair]
        own = np.bincount(self.pair[other & self.touched & (self.before > 0)], minlength=len(self.chosen)) > 0
        return other & ~self.touched & self.keep, own | self.own_before
