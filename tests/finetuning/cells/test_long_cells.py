"""Cells longer than the context are split into parts."""

from pathlib import Path

import numpy as np
import pytest
from cells import GENES

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.finetuning.cells.long_cells import split_long_cells


@pytest.mark.parametrize("drugs", [False, True])
def test_parts_hold_every_gene_once(drugs: bool, tmp_path: Path) -> None:
    from cells import make_cells, write_vocab

    vocab = write_vocab(tmp_path, drug_token=True)
    tokenizer = TahoeX1Tokenizer(vocab, context_length=7, drug_to_id={"<pad>": 0, "aspirin": 1})
    whole = TahoeX1Tokenizer(vocab, context_length=None, drug_to_id={"<pad>": 0, "aspirin": 1})
    adata = make_cells(12)
    adata.X[3] = 0
    adata.X.eliminate_zeros()
    tokens = np.array([whole.get_vocab()[gene] for gene in GENES])
    from tahoex1_hf.encoding_tahoe_x1 import GeneRows

    rows = GeneRows(tokens[adata.X.indices], adata.X.data, adata.X.indptr.astype(np.int64))
    ids = np.arange(12) % 2 if drugs else None
    expected = whole.encode_rows(rows, drug_ids=ids)
    parts = split_long_cells(tokenizer, rows, ids)
    special = 2 if drugs else 1
    assert parts.lengths.max() <= 7
    assert (parts.input_ids[parts.offsets[:-1]] == tokenizer.cls_token_id).all()
    for number in range(12):
        own = slice(expected.offsets[number] + special, expected.offsets[number + 1])
        want = dict(zip(expected.input_ids[own].tolist(), expected.expression_values[own].tolist(), strict=True))
        mine = np.flatnonzero(parts.cell_numbers == number)
        found: list[tuple[int, float]] = []
        for part in mine:
            inside = slice(parts.offsets[part] + special, parts.offsets[part + 1])
            found += zip(parts.input_ids[inside].tolist(), parts.expression_values[inside].tolist(), strict=True)
        assert len(found) == len(want)  # each once
        assert dict(found) == want
        lengths = parts.lengths[mine]
        assert lengths.max() - lengths.min() <= 1
        if ids is not None and parts.drug_ids is not None:
            assert (parts.drug_ids[mine] == ids[number]).all()
    alone = split_long_cells(tokenizer, GeneRows(*[*rows[:2]], rows.offsets).select(rows.cells() == 5), ids)
    mine, here = parts.cell_numbers == 5, alone.cell_numbers == 5
    assert mine.sum() == here.sum() > 1
    take = np.concatenate([np.arange(parts.offsets[p], parts.offsets[p + 1]) for p in np.flatnonzero(mine)])
    other = np.concatenate([np.arange(alone.offsets[p], alone.offsets[p + 1]) for p in np.flatnonzero(here)])
    assert np.array_equal(parts.input_ids[take], alone.input_ids[other])  # whatever the other cells are
