# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""`TahoeX1Tokenizer.encode_counts` as a compiled loop without the GIL for the usual case: the same, bit for bit.

The usual case is a CSR matrix of whole counts, in column order, encoded as bins (or raw), with genes sampled or cut.
Several threads may encode different rows at the same time.
Everything else, what is wrong with the counts included, is the tokenizer's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from tahoex1_hf.encoding_tahoe_x1 import EncodedCells, GeneMatch, GeneRows, mix64
from tahoex1_hf.tokenization_tahoe_x1 import DRUG_TOKEN, TahoeX1Tokenizer, report_empty

try:  # numba comes with the extra "data"
    from tahoex1_hf.cells import kernels
    from tahoex1_hf.cells.ragged import gather_rows

    HAS_NUMBA = True
except ImportError:
    HAS_NUMBA = False

_ENCODINGS = {"bins": 0, "raw": 2}  # of kernels


def encode_chunk(
    tokenizer: TahoeX1Tokenizer,
    counts: Any,
    genes: GeneMatch,
    *,
    drugs: str | Sequence[str | None] | None = None,
    first_cell: int = 0,
    seed: int = 0,
    source: Any = None,
) -> EncodedCells:
    """Do what `tokenizer.encode_counts` does; the arguments are its own.

    Raises:
        ValueError: as there.
    """
    usual = _knows(tokenizer, first_cell, seed) and (
        getattr(counts, "format", None) == "csr"
        and counts.shape[0] > 0
        and counts.shape[1] == genes.num_genes
        and counts.data.dtype.kind in "iuf"
        and not genes.num_duplicates
    )
    if usual:
        drug_ids = None if drugs is None else tokenizer.drug_ids(drugs, counts.shape[0])
        rows = _Rows(counts.indptr, counts.indices, counts.data, genes.token_ids.astype(np.int32), in_order=True)
        encoded = _encode(tokenizer, rows, drug_ids, first_cell, seed)
        if encoded is not None:
            report_empty(encoded)
            return encoded
    return tokenizer.encode_counts(counts, genes, drugs=drugs, first_cell=first_cell, seed=seed, source=source)


def encode_token_rows(
    tokenizer: TahoeX1Tokenizer,
    rows: GeneRows,
    drug_ids: np.ndarray | None = None,
    first_cell: int = 0,
    seed: int = 0,
) -> EncodedCells:
    """Do what `tokenizer.encode_rows` does, for cells in which every gene stands once; the arguments are its own.

    Raises:
        ValueError: as there.
    """
    encoded = None
    if _knows(tokenizer, first_cell, seed) and len(rows.offsets) > 1:
        every_token = np.arange(len(tokenizer), dtype=np.int32)
        table = _Rows(rows.offsets, rows.tokens, rows.counts, every_token, in_order=False)
        encoded = _encode(tokenizer, table, drug_ids, first_cell, seed)
    if encoded is None:
        encoded = tokenizer.encode_rows(rows, drug_ids=drug_ids, first_cell=first_cell, seed=seed)
    report_empty(encoded)
    return encoded


class _Rows(NamedTuple):
    """Rows of a CSR matrix."""

    indptr: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    token_ids: np.ndarray
    in_order: bool


def _knows(tokenizer: TahoeX1Tokenizer, first_cell: int, seed: int) -> bool:
    return (
        HAS_NUMBA
        and tokenizer.value_encoding in _ENCODINGS
        and tokenizer.overflow in ("sample", "first")
        and not tokenizer.first_gene_raw
        and 0 <= first_cell < 2**63
        and 0 <= seed < 2**63
    )


def _encode(
    tokenizer: TahoeX1Tokenizer, rows: _Rows, drug_ids: np.ndarray | None, first_cell: int, seed: int
) -> EncodedCells | None:
    """Encode rows; None where they are not the usual case after all."""
    names = [str(tokenizer.cls_token), *([] if drug_ids is None else [DRUG_TOKEN])]
    special = cast(list[int], tokenizer.convert_tokens_to_ids(names))
    stored = np.diff(rows.indptr).astype(np.int64)
    room = int(stored.max(initial=0))
    if tokenizer.context_length is not None:
        room = min(room, tokenizer.context_length - len(special))
    numbers = first_cell + np.arange(len(stored), dtype=np.int64)
    streams = mix64(mix64(np.array([seed], dtype=np.uint64)) + numbers.astype(np.uint64))
    most = np.minimum(stored, room) + len(special)
    starts = np.cumsum(most) - most
    input_ids = np.empty(most.sum(), dtype=np.int64)
    expression_values = np.empty(most.sum(), dtype=np.float32)
    lengths = np.empty(len(stored), dtype=np.int64)
    usual = kernels.encode_csr(
        rows.indptr,
        rows.columns,
        rows.counts,
        rows.token_ids,
        rows.in_order,
        streams,
        _settings(tokenizer, special, room),
        starts,
        input_ids,
        expression_values,
        lengths,
    )
    if not usual:
        return None
    if (lengths != most).any():  # some genes are unknown or have no count: close the gaps
        gapless = np.empty(lengths.sum(), dtype=np.int64), np.empty(lengths.sum(), dtype=np.float32)
        for source, target in zip((input_ids, expression_values), gapless, strict=True):
            gather_rows(source, starts, lengths, target)
        input_ids, expression_values = gapless
    return EncodedCells(
        input_ids=input_ids,
        expression_values=expression_values,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        drug_ids=drug_ids,
        cell_numbers=numbers,
        empty_cells=np.flatnonzero(lengths == len(special)),
    )


def _settings(tokenizer: TahoeX1Tokenizer, special: list[int], room: int) -> Any:
    return kernels.Settings(
        special_tokens=np.array(special, dtype=np.int64),
        pad_token=0,
        pad_value=np.float32(tokenizer.pad_value),
        mask_value=np.float32(0),
        room=room,
        sample=tokenizer.overflow == "sample",
        encoding=_ENCODINGS[tokenizer.value_encoding],
        quantiles=torch.linspace(0, 1, tokenizer.num_bins - 1, dtype=torch.float32).numpy(),
        right=tokenizer.right_binning,
        target_sum=float(tokenizer.target_sum),
        mask_probabilities=np.zeros(0),
        unexpressed=np.zeros(0, dtype=np.int64),
        num_tokens=0,
    )
