# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""`TahoeX1Tokenizer.encode_counts` as a compiled loop without the GIL for the usual case: the same, bit for bit.

The usual case is a CSR matrix of whole counts, in column order, encoded as bins (or raw), with genes sampled or cut.
Everything else, what is wrong with the counts included, is the tokenizer's.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from tahoex1_hf.encoding_tahoe_x1 import EncodedCells, GeneMatch, concatenate_cells, mix64
from tahoex1_hf.tokenization_tahoe_x1 import DRUG_TOKEN, TahoeX1Tokenizer, report_empty

try:  # numba comes with the extra "data"
    from tahoex1_hf.data import kernels
    from tahoex1_hf.data.ragged import gather_rows

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
    num_threads: int = 1,
) -> EncodedCells:
    """Do what `tokenizer.encode_counts` does; the arguments are its own, and the number of threads.

    Raises:
        ValueError: as there.
    """
    encoded = None
    if _is_usual(tokenizer, counts, genes) and 0 <= first_cell < 2**63 and 0 <= seed < 2**63:
        drug_ids = None if drugs is None else tokenizer.drug_ids(drugs, counts.shape[0])
        bounds = np.linspace(0, counts.shape[0], num_threads + 1).astype(np.int64)
        ranges = list(pairwise(bounds))
        if num_threads == 1:
            parts = [_encode(tokenizer, counts, genes, drug_ids, first_cell, seed, ranges[0])]
        else:
            with ThreadPoolExecutor(num_threads) as pool:
                parts = list(
                    pool.map(lambda rows: _encode(tokenizer, counts, genes, drug_ids, first_cell, seed, rows), ranges)
                )
        good = [part for part in parts if part is not None]
        if len(good) == len(parts):
            encoded = good[0] if len(good) == 1 else concatenate_cells(good)
    if encoded is None:
        return tokenizer.encode_counts(counts, genes, drugs=drugs, first_cell=first_cell, seed=seed, source=source)
    report_empty(encoded)
    return encoded


def _is_usual(tokenizer: TahoeX1Tokenizer, counts: Any, genes: GeneMatch) -> bool:
    return (
        HAS_NUMBA
        and getattr(counts, "format", None) == "csr"
        and counts.shape[0] > 0
        and counts.shape[1] == genes.num_genes
        and counts.data.dtype.kind in "iuf"
        and not genes.num_duplicates
        and tokenizer.value_encoding in _ENCODINGS
        and tokenizer.overflow in ("sample", "first")
        and not tokenizer.first_gene_raw
    )


def _encode(
    tokenizer: TahoeX1Tokenizer,
    matrix: Any,
    genes: GeneMatch,
    drug_ids: np.ndarray | None,
    first_cell: int,
    seed: int,
    rows: tuple[int, int],
) -> EncodedCells | None:
    """Encode a range of rows; None where they are not the usual case after all."""
    start, stop = rows
    names = [str(tokenizer.cls_token), *([] if drug_ids is None else [DRUG_TOKEN])]
    special: list[int] = tokenizer.convert_tokens_to_ids(names)
    indptr = matrix.indptr[start : stop + 1]
    stored = np.diff(indptr).astype(np.int64)
    room = int(stored.max(initial=0))
    if tokenizer.context_length is not None:
        room = min(room, tokenizer.context_length - len(special))
    numbers = first_cell + np.arange(start, stop, dtype=np.int64)
    streams = mix64(mix64(np.array([seed], dtype=np.uint64)) + numbers.astype(np.uint64))
    most = np.minimum(stored, room) + len(special)
    starts = np.cumsum(most) - most
    input_ids = np.empty(most.sum(), dtype=np.int64)
    expression_values = np.empty(most.sum(), dtype=np.float32)
    lengths = np.empty(len(stored), dtype=np.int64)
    usual = kernels.encode_csr(
        indptr,
        matrix.indices,
        matrix.data,
        genes.token_ids.astype(np.int32),
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
        drug_ids=None if drug_ids is None else drug_ids[start:stop],
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
