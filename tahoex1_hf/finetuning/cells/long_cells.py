# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Split cells longer than the context into parts that together hold every gene once."""

import copy

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows, content_numbers, mix64
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


def split_long_cells(tokenizer: TahoeX1Tokenizer, rows: GeneRows, drug_ids: np.ndarray | None) -> EncodedCells:
    """Encode cells so that no gene is left out.

    A cell with more genes than the context has room for becomes several parts of about equal length. A hash of the
    cell's content and the gene decides which part a gene belongs to; the values are those of the whole cell.

    Args:
        tokenizer: Tokenizer of the model.
        rows: Genes and counts of the cells.
        drug_ids: Drugs of the cells, shape `(cells,)`; None for cells without a drug token.

    Returns:
        The encoded parts; `cell_numbers` is the row of the cell that each belongs to.
    """
    whole = copy.copy(tokenizer)
    whole.context_length = None
    cells = whole.encode_rows(rows, drug_ids=drug_ids, warn=lambda _: None)
    special = 1 if drug_ids is None else 2
    genes = cells.lengths - special
    if tokenizer.context_length is None or (genes <= tokenizer.context_length - special).all():
        return cells
    parts = np.maximum(1, -(-genes // (tokenizer.context_length - special)))
    first_part = np.concatenate([[0], np.cumsum(parts)])
    owner = np.repeat(np.arange(cells.num_cells), cells.lengths)
    is_gene = np.arange(len(owner)) - cells.offsets[owner] >= special
    owner = owner[is_gene]
    tokens, values = cells.input_ids[is_gene], cells.expression_values[is_gene]
    scores = mix64(mix64(content_numbers(rows))[owner] + tokens.astype(np.uint64))
    order = np.lexsort((scores, owner))
    starts = np.concatenate([[0], np.cumsum(genes)])[:-1]
    part = np.empty(len(owner), dtype=np.int64)
    part[order] = first_part[owner] + (np.arange(len(owner)) - starts[owner]) % parts[owner]
    order = np.argsort(part, kind="stable")
    lengths = np.bincount(part, minlength=first_part[-1]) + special
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.arange(len(part)) + special * (part[order] + 1)
    cell_of = np.repeat(np.arange(cells.num_cells), parts)
    heads = cells.offsets[:-1][cell_of]  # each part begins with its cell's special tokens
    input_ids = np.empty(offsets[-1], dtype=np.int64)
    expression_values = np.empty(offsets[-1], dtype=np.float32)
    for place in range(special):
        input_ids[offsets[:-1] + place] = cells.input_ids[heads + place]
        expression_values[offsets[:-1] + place] = cells.expression_values[heads + place]
    input_ids[places], expression_values[places] = tokens[order], values[order]
    drugs = None if drug_ids is None else drug_ids[cell_of]
    empty = np.flatnonzero(lengths == special)
    return EncodedCells(input_ids, expression_values, offsets, drugs, cell_of, empty)
