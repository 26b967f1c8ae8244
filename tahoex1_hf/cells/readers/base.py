# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What all readers of cells share: their errors, and rows of a matrix as known genes and counts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.ragged import compact_csr
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, count_problem, matrix_rows, merge_repeats

if TYPE_CHECKING:
    import pandas as pd

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

INDEX = "_index"
"""Name under which the names of the cells (`obs_names`, barcodes) are asked for as a column."""

# Stored elements (of a sparse matrix) or places (of a dense one) that are read at once: about 100 MB with the arrays
# that are made of them on the way.
CHUNK_ELEMENTS = 4_000_000


class BadInput(ValueError):
    """A file that cannot be used as it is. The message names what is wrong and the way out, not the file."""


@dataclass
class CellChunk:
    """Some consecutive cells of a file.

    Attributes:
        rows: expressed genes of the vocabulary, each once per cell: token ids, float32 counts above zero, offsets.
        metadata: one row per cell, the columns that were asked for.
        unknown_counts: sum of the counts of genes that are not in the vocabulary, over the chunk.
    """

    rows: GeneRows
    metadata: "pd.DataFrame"
    unknown_counts: float

    def __post_init__(self) -> None:
        if len(self.metadata) != len(self.rows.offsets) - 1:
            raise ValueError(f"metadata has {len(self.metadata)} rows for {len(self.rows.offsets) - 1} cells.")


def chunk_of_matrix(
    matrix: Any, match: GeneMatch, metadata: "pd.DataFrame", first_cell: int, tokenizer: "TahoeX1Tokenizer"
) -> CellChunk:
    """Make a chunk of rows of a cells x genes matrix, sparse or dense.

    Raises:
        BadInput: for negative, NaN and infinite values.
    """
    if getattr(matrix, "format", None) == "csr" and not match.num_duplicates:
        chunk = _chunk_of_csr(matrix, match, metadata, len(tokenizer))
        if chunk is not None:
            return chunk
    rows, repeats = matrix_rows(matrix, match)
    check_counts(rows, first_cell, tokenizer)
    values = matrix.data if hasattr(matrix, "tocsr") else np.asarray(matrix)
    total = float(np.asarray(values, dtype=np.float64).sum())
    unknown = 0.0 if not match.num_unknown else total - float(rows.counts.astype(np.float64).sum())
    return CellChunk(merge_repeats(rows) if repeats else rows, metadata, unknown)


def _chunk_of_csr(matrix: Any, match: GeneMatch, metadata: "pd.DataFrame", num_tokens: int) -> CellChunk | None:
    """The same, in one pass, for rows in column order with counts that are good; None for others."""
    tokens = np.empty(matrix.nnz, dtype=np.uint16 if num_tokens <= 2**16 else np.int32)
    counts = np.empty(matrix.nnz, dtype=np.float32)
    offsets = np.empty(matrix.shape[0] + 1, dtype=np.int64)
    values = matrix.data if matrix.data.dtype.kind in "iuf" else matrix.data.astype(np.float32)
    in_order, unknown, good = compact_csr(
        matrix.indptr, matrix.indices, values, match.token_ids, tokens, counts, offsets
    )
    if not (in_order and good):
        return None
    return CellChunk(GeneRows(tokens[: offsets[-1]], counts[: offsets[-1]], offsets), metadata, unknown)


def check_counts(rows: GeneRows, first_cell: int, tokenizer: "TahoeX1Tokenizer") -> None:
    """Raise BadInput for values that cannot be counts: negative, NaN, infinite."""
    problem, _ = count_problem(rows, first_cell, _GeneNames(tokenizer))
    if problem is not None:
        raise BadInput(problem)


class _GeneNames(Mapping[int, str]):
    """Token id -> gene, looked up only where a message needs it."""

    def __init__(self, tokenizer: "TahoeX1Tokenizer") -> None:
        self.tokenizer = tokenizer

    def __getitem__(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self.tokenizer.vocab_size
