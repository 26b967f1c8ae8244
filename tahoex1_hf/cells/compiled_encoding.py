# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding of cells with compiled loops that release the GIL; results equal the tokenizer's, bit for bit.

The loops handle the usual case: whole counts in a CSR matrix whose columns are in order, encoded as bins or raw.
Several threads may encode different cells at the same time. The loops need numba, which the extra "data" installs.
"""

from typing import Any, cast

import numpy as np

from tahoex1_hf.cells import kernels
from tahoex1_hf.cells.counts import without_noise
from tahoex1_hf.cells.ragged import compact_csr
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, mix64, unit_quantiles
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import DRUG_TOKEN, TahoeX1Tokenizer

_ENCODINGS = {"bins": kernels.BINS, "raw": kernels.RAW}


def compacted_rows(matrix: Any, match: GeneMatch, dtype: type[np.generic]) -> tuple[GeneRows, float] | None:
    """Return the known genes of each row of a CSR matrix with their counts, in one pass.

    Args:
        matrix: `(cells, genes)` CSR matrix in which no two columns are the same gene.
        match: Token of every column.
        dtype: Type of the tokens.

    Returns:
        The rows, and the sum of the counts of unknown genes; None if columns are out of order or values are not
        counts.
    """
    tokens = np.empty(matrix.nnz, dtype=dtype)
    counts = np.empty(matrix.nnz, dtype=np.float32)
    offsets = np.empty(matrix.shape[0] + 1, dtype=np.int64)
    values = matrix.data if matrix.data.dtype.kind in "iuf" else matrix.data.astype(np.float32)
    good, whole, unknown = compact_csr(
        matrix.indptr, matrix.indices, values, match.token_ids.astype(np.int32), tokens, counts, offsets
    )
    if not good:
        return None
    rows = GeneRows(tokens[: offsets[-1]], counts[: offsets[-1]], offsets)
    return rows if whole else without_noise(rows), float(unknown)


def encode_compiled(
    tokenizer: TahoeX1Tokenizer,
    rows: GeneRows,
    drug_ids: np.ndarray | None = None,
    first_cell: int = 0,
    seed: int = 0,
) -> EncodedCells | None:
    """Encode cells like `tokenizer.encode_rows`, with the same arguments; a cell must not have a gene twice.

    Returns:
        The encoded cells, or None if the cells or the settings are not the usual case.
    """
    usual = (
        tokenizer.value_encoding in _ENCODINGS
        and not tokenizer.first_gene_raw
        and 0 <= first_cell < 2**63
        and 0 <= seed < 2**63
        and len(rows.offsets) > 1
    )
    if not usual:
        return None
    names = [str(tokenizer.cls_token), *([] if drug_ids is None else [DRUG_TOKEN])]
    special = cast(list[int], tokenizer.convert_tokens_to_ids(names))
    lengths = np.diff(rows.offsets).astype(np.int64)
    room = int(lengths.max(initial=0))
    if tokenizer.context_length is not None:
        room = min(room, tokenizer.context_length - len(special))
    numbers = first_cell + np.arange(len(lengths), dtype=np.int64)
    key = mix64(np.array([seed], dtype=np.uint64))[0]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, room) + len(special))])
    input_ids = np.empty(offsets[-1], dtype=np.int64)
    expression_values = np.empty(offsets[-1], dtype=np.float32)
    settings = _settings(tokenizer, special, room)
    if not kernels.encode_rows(
        rows.offsets, rows.tokens, rows.counts, key, settings, offsets[:-1], input_ids, expression_values
    ):
        return None
    return EncodedCells(
        input_ids=input_ids,
        expression_values=expression_values,
        offsets=offsets,
        drug_ids=drug_ids,
        cell_numbers=numbers,
        empty_cells=np.flatnonzero(lengths == 0),
    )


def _settings(tokenizer: TahoeX1Tokenizer, special: list[int], room: int) -> Any:
    return kernels.Settings(
        special_tokens=np.array(special, dtype=np.int64),
        pad_token=0,
        pad_value=np.float32(tokenizer.pad_value),
        mask_value=np.float32(0),
        room=room,
        sample=tokenizer.overflow == "sample",
        highest=tokenizer.overflow == "highest",
        encoding=_ENCODINGS[tokenizer.value_encoding],
        quantiles=unit_quantiles(tokenizer.num_bins - 1),
        right=tokenizer.right_binning,
        target_sum=float(tokenizer.target_sum),
        mask_probabilities=np.zeros(0),
        unexpressed=np.zeros(0, dtype=np.int64),
        absent_ratio=0.0,
        num_tokens=0,
    )
