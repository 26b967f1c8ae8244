# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches for pretraining from counts of cells: values, sampling, targets, drugs, padding or packing."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tahoex1_hf.cells import kernels
from tahoex1_hf.cells.ragged import RowViews
from tahoex1_hf.encoding_tahoe_x1 import GeneRows, cell_streams, content_numbers, unit_quantiles
from tahoex1_hf.padding_tahoe_x1 import padded_length

if TYPE_CHECKING:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

_ENCODINGS = {"bins": kernels.BINS, "log1p": kernels.LOG1P, "raw": kernels.RAW}


def share_room(room: int, absent_targets: float) -> tuple[int, float]:
    """Return the most genes of its own that a cell keeps, and the number of absent genes for each of them.

    Args:
        room: Most genes of a cell.
        absent_targets: Share of them that the cell does not express.

    Raises:
        ValueError: If this is no share, or leaves no room.
    """
    if not 0 <= absent_targets < 1:
        raise ValueError(f"absent_targets={absent_targets}: pass a share of at least 0 and below 1.")
    ratio = absent_targets / (1 - absent_targets)
    own = int(room / (1 + ratio))
    own -= own + int(ratio * own + 0.5) > room  # rounding may add one gene too many
    if own < 1:
        raise ValueError(f"absent_targets={absent_targets} leaves no room for a cell's own genes among {room}.")
    return own, ratio


def _as_compiled(values: np.ndarray) -> np.ndarray:
    """Return tokens or counts in a form for which the loops are compiled: numba takes 2 to 5 s for each.

    Arrays that can be written to, such as those of lists, and those of files, which cannot, are types of their own.
    """
    view = (values.astype(np.int32) if values.dtype == np.int64 else values).view()
    view.flags.writeable = False
    return view


class CellCollator:
    """Maker of batches of training cells.

    The tokenizer's settings decide how counts become values (bins, log1p or raw) and what happens to cells longer
    than the context, so training and inference agree. A cell's values depend on its counts alone, its sample and
    targets on its counts and its stream of random numbers; none of them on the batch, the order, padding or packing.

    Args:
        tokenizer: Tokenizer of the model, whose `overflow` must be `"sample"` or `"first"`.
        mlm_probability: Share of a cell's genes that are targets, rounded down; of several shares, one is taken at
            random for each cell; None for no targets. Every gene can be a target, special tokens cannot.
        context_length: Most tokens of a cell; by default the tokenizer's.
        packed: Whether to put all cells of a batch one after the other in one row (`cu_seq_lens_q`), without padding.
        unexpressed_padding: Whether to fill every cell up to the context with random genes that it does not express
            (value 0), instead of padding. (The original's `unexp_padding` fills up to the longest cell of the batch,
            which makes a cell depend on its batch.)
        absent_targets: Share of a cell's genes that it does not express, all of them targets (value 0), below 1. A
            cell keeps at most the rest of the context of its own genes, and `mlm_probability` is a share of these; so
            it sees only genes that it expresses, as when it is embedded.
        cell_targets: Genes that are predicted from the cell embedding: `"hidden"`, the targets, as in the original; or
            `"all"`, every gene of the vocabulary, expressed or not, whose values a batch then holds.
        pad_to_multiple_of: Number of which the padded length is a multiple.
        drug_token: Whether cells begin with `<cls>`, `<drug>`; by default if the tokenizer has drugs. The tokenizer's
            `unknown_drugs` decides about drugs that its table lacks.
        mask_value: Value of `expression_values` at targets, which the model does not read.
        seed: Seed of samples and targets for evaluations, in which the collator is called with rows of a dataset: they
            then follow from each cell's content and the seed alone. By default torch's generator makes new ones at
            each call.

    Raises:
        ValueError: For settings that cannot be used, or cannot be used together.
    """

    def __init__(
        self,
        tokenizer: "TahoeX1Tokenizer",
        *,
        mlm_probability: float | Sequence[float] | None = 0.5,
        context_length: int | None = None,
        packed: bool = False,
        unexpressed_padding: bool = False,
        absent_targets: float = 0.0,
        cell_targets: Literal["hidden", "all"] = "hidden",
        pad_to_multiple_of: int | None = None,
        drug_token: bool | None = None,
        mask_value: float = -1.0,
        seed: int | None = None,
    ) -> None:
        probabilities = np.atleast_1d(np.asarray([] if mlm_probability is None else mlm_probability, dtype=np.float64))
        if not all(0 < p <= 1 for p in probabilities) or (mlm_probability is not None and not len(probabilities)):
            raise ValueError(f"mlm_probability={mlm_probability!r}: pass numbers above 0 and up to 1, or None.")
        self.drug_token = tokenizer.drug_to_id is not None if drug_token is None else drug_token
        if self.drug_token and tokenizer.drug_to_id is None:
            raise ValueError("drug_token=True needs a tokenizer with drug_to_id: load that of a model with drugs.")
        length = tokenizer.context_length if context_length is None else context_length
        special = ["<cls>", "<drug>"] if self.drug_token else ["<cls>"]
        if length is None or length <= len(special):
            raise ValueError(f"context_length={length}: training needs a length above {len(special)}.")
        if tokenizer.overflow not in ("sample", "first"):
            raise ValueError(f'tokenizer.overflow={tokenizer.overflow!r}: set it to "sample" or "first" for training.')
        if tokenizer.first_gene_raw:
            raise ValueError(
                "tokenizer.first_gene_raw=True reproduces a fault of the original's inference, not of its training: "
                "set it to False."
            )
        if packed and (unexpressed_padding or pad_to_multiple_of):
            raise ValueError("packed=True leaves no padding: leave out unexpressed_padding and pad_to_multiple_of.")
        if absent_targets and (unexpressed_padding or mlm_probability is None):
            raise ValueError(
                "absent_targets adds targets of its own: leave out unexpressed_padding, and pass an mlm_probability."
            )
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed}: pass a non-negative integer, or None.")
        self.tokenizer, self.context_length, self.seed = tokenizer, length, seed
        self.packed, self.unexpressed_padding, self.pad_to_multiple_of = (
            packed,
            unexpressed_padding,
            pad_to_multiple_of,
        )
        if cell_targets not in ("hidden", "all"):
            raise ValueError(f'cell_targets={cell_targets!r}: pass "hidden" or "all".')
        self.absent_targets, self.cell_targets = absent_targets, cell_targets
        own, absent_ratio = share_room(length - len(special), absent_targets)
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[str(tokenizer.cls_token)], *([vocabulary["<drug>"]] if self.drug_token else [])]
        adds_genes = unexpressed_padding or absent_targets > 0
        self._settings = kernels.Settings(
            special_tokens=np.array(ids, dtype=np.int64),
            pad_token=vocabulary[str(tokenizer.pad_token)],
            pad_value=np.float32(tokenizer.pad_value),
            mask_value=np.float32(mask_value),
            room=own,
            sample=tokenizer.overflow == "sample",
            highest=False,
            encoding=_ENCODINGS[tokenizer.value_encoding],
            quantiles=unit_quantiles(tokenizer.num_bins - 1),
            right=tokenizer.right_binning,
            target_sum=float(tokenizer.target_sum),
            mask_probabilities=probabilities,
            unexpressed=np.flatnonzero(tokenizer.is_gene) if adds_genes else np.zeros(0, dtype=np.int64),
            absent_ratio=absent_ratio,
            num_tokens=max(vocabulary.values()) + 1,
        )

    def lengths(self, num_genes: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens of cells with `num_genes` genes, before padding."""
        if self.unexpressed_padding:
            return np.full(len(num_genes), self.context_length, dtype=np.int64)
        kept = np.minimum(num_genes, self._settings.room)
        if self.absent_targets:
            wanted = (self._settings.absent_ratio * kept + 0.5).astype(np.int64)
            kept += np.minimum(wanted, np.maximum(len(self._settings.unexpressed) - num_genes, 0))
        return kept + len(self._settings.special_tokens)

    def collate(
        self,
        parts: Sequence[tuple[np.ndarray, RowViews]],
        streams: np.ndarray,
        drug_ids: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Make a batch.

        Args:
            parts: Cells from one or more shards, each part after the `(cells,)` rows of its cells in the batch.
            streams: `(batch,)` uint64, where the random numbers of each cell start.
            drug_ids: `(batch,)` int64 ids of the drug table, 0 for no drug; needed with `drug_token`.

        Returns:
            `input_ids`, `expression_values` and, with targets, `target_mask` and `labels` (the targets' values, -100
            elsewhere), each `(batch, length)`, with `attention_mask` (bool); `drug_ids` `(batch,)` with `drug_token`;
            `cell_labels` `(batch, tokens of the vocabulary)` with `cell_targets="all"`.
            With `packed`, `(1, tokens)` each, with `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and
            `max_length_k` instead of the mask. The genes of a sampled cell are in no particular order.
        """
        num_cells = len(streams)
        num_genes = np.zeros(num_cells, dtype=np.int64)
        for rows, cells in parts:
            num_genes[rows] = cells.lengths
        lengths = self.lengths(num_genes)
        if self.packed:
            stops = np.cumsum(lengths)
            starts, shape = stops - lengths, (1, int(lengths.sum()))
        else:
            width = padded_length(lengths, self.pad_to_multiple_of)
            starts, shape = np.arange(num_cells) * width, (num_cells, width)
            stops = starts + width
        arrays = kernels.Output(
            input_ids=np.empty(shape, dtype=np.int64),
            expression_values=np.empty(shape, dtype=np.float32),
            target_mask=np.empty(shape, dtype=np.bool_),
            labels=np.empty(shape, dtype=np.float32),
            attention_mask=np.empty((0, 0) if self.packed else shape, dtype=np.bool_),
        )
        self._encode(parts, streams, starts, stops, self._settings, arrays)
        batch: dict[str, Any] = {"input_ids": arrays.input_ids, "expression_values": arrays.expression_values}
        if len(self._settings.mask_probabilities):
            batch |= {"target_mask": arrays.target_mask, "labels": arrays.labels}
        if self.packed:
            boundaries = np.concatenate([[0], stops]).astype(np.int32)
            batch |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        else:
            batch["attention_mask"] = arrays.attention_mask
        if self.cell_targets == "all":
            batch["cell_labels"] = self._values_of_all_genes(parts, streams, num_genes)
        if self.drug_token:
            if drug_ids is None:
                raise ValueError("drug_ids is missing: a collator with drug_token needs a drug, or 0, for each cell.")
            batch["drug_ids"] = np.ascontiguousarray(drug_ids, dtype=np.int64)
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.packed:
            longest = int(lengths.max(initial=0))
            tensors |= {"max_length_q": longest, "max_length_k": longest}
        return tensors

    def _values_of_all_genes(
        self, parts: Sequence[tuple[np.ndarray, RowViews]], streams: np.ndarray, num_genes: np.ndarray
    ) -> np.ndarray:
        """Return the values of whole cells by token id, 0 for absent genes, `(cells, tokens)`."""
        nothing = np.zeros(0, dtype=np.int64)
        settings = self._settings._replace(
            special_tokens=nothing, room=2**31, unexpressed=nothing, absent_ratio=0.0, mask_probabilities=np.zeros(0)
        )
        stops, total = np.cumsum(num_genes), int(num_genes.sum())
        whole = kernels.Output(
            input_ids=np.empty(total, dtype=np.int64),
            expression_values=np.empty(total, dtype=np.float32),
            target_mask=np.empty(total, dtype=np.bool_),
            labels=np.empty(total, dtype=np.float32),
            attention_mask=np.empty(0, dtype=np.bool_),
        )
        self._encode(parts, streams, stops - num_genes, stops, settings, whole)
        absent = np.where(self.tokenizer.is_gene, np.float32(0), np.float32(kernels.NO_LABEL))
        found = np.tile(absent, (len(num_genes), 1))
        found[np.repeat(np.arange(len(num_genes)), num_genes), whole.input_ids] = whole.expression_values
        return found

    def _encode(
        self,
        parts: Sequence[tuple[np.ndarray, RowViews]],
        streams: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        settings: kernels.Settings,
        arrays: kernels.Output,
    ) -> None:
        """Fill the arrays of a batch, in which each cell has the places from `starts` to `stops`."""
        flat = kernels.Output(*(array.reshape(-1) for array in arrays))
        for rows, cells in parts:
            kernels.encode_cells(
                _as_compiled(cells.genes),
                cells.gene_starts,
                _as_compiled(cells.counts),
                cells.count_starts,
                cells.counts.dtype == np.uint16,
                cells.lengths,
                streams[rows],
                starts[rows],
                stops[rows],
                settings,
                flat,
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of rows of a prepared dataset, with `genes`, `counts` and `drug`, as `datasets` gives them.

        Random numbers come from torch's default generator, which data loaders seed for each worker, or with `seed`
        from the cells alone. `CellBatches` makes such batches many times faster.

        Raises:
            ValueError: For rows without `genes` or `counts`, with arrays of different lengths, or with values that
                are not counts.
        """
        pairs = [self._checked(row, number) for number, row in enumerate(features)]
        lengths = np.array([len(tokens) for tokens, _ in pairs], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        genes = np.concatenate([np.zeros(0, dtype=np.int64), *(tokens for tokens, _ in pairs)])
        counts = np.concatenate([np.zeros(0, dtype=np.float32), *(values for _, values in pairs)])
        rows = GeneRows(genes, counts, np.append(starts, lengths.sum()))
        if self.seed is None:
            streams = torch.randint(2**63 - 1, (len(lengths),)).numpy().astype(np.uint64)
        else:
            streams = cell_streams(content_numbers(rows), self.seed)
        drugs = None
        if self.drug_token:
            drugs = self.tokenizer.drug_ids([row.get("drug") for row in features], len(features))
        numbers = np.arange(len(lengths))
        return self.collate([(numbers, RowViews.of(rows, numbers))], streams, drugs)

    def _checked(self, row: Mapping[str, Any], number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the genes and counts of a row, without stored zeros."""
        missing = [name for name in ("genes", "counts") if name not in row]
        if missing:
            raise ValueError(
                f"cell {number} has no {missing[0]!r}, only {sorted(row)}: pass rows of a prepared dataset."
            )
        genes, counts = np.asarray(row["genes"]), np.asarray(row["counts"], dtype=np.float32)
        if genes.shape != counts.shape or genes.ndim != 1:
            raise ValueError(
                f"cell {number} has genes of the shape {genes.shape} and counts of {counts.shape}: pass two lists of "
                "one length."
            )
        if not len(genes):
            return genes.astype(np.int64), counts
        if not (counts.min() >= 0 and counts.max() < np.inf):  # false for NaN too
            raise ValueError(f"cell {number} has a count that is negative, NaN or infinite: pass raw counts.")
        known = self.tokenizer.is_gene
        if genes.dtype.kind not in "iu" or genes.min() < 0 or genes.max() >= len(known) or not known[genes].all():
            raise ValueError(f"cell {number} has an id that is not a gene's: leave <cls> out, it is added here.")
        genes, counts = genes.astype(np.int64)[counts != 0], counts[counts != 0]
        # Genes are chosen by position; sorted, a seed chooses the same genes whatever their order.
        order = slice(None) if self.seed is None else np.argsort(genes)
        return genes[order], counts[order]
