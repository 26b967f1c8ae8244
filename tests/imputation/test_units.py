"""Predictions in bins become counts of the cell: what bins the counts, undone."""

from pathlib import Path

import numpy as np
import pytest
from cells import GENES, write_vocab

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.encoding_tahoe_x1 import GeneRows
from tahoex1_hf.imputation.units import as_counts, check_unit, unit_name

ROWS = GeneRows(np.arange(6), np.array([3, 1, 10, 7, 5, 8], dtype=np.float32), np.array([0, 4, 4, 6]))


def test_bins_are_places_among_the_cells_counts(tmp_path: Path) -> None:
    tokenizer = TahoeX1Tokenizer(str(write_vocab(tmp_path)))
    values = np.array([1, 50, 25.5, 99, 0.5, -3, 10, 1], dtype=np.float32)
    counts = as_counts(values, np.array([0, 0, 0, 0, 0, 0, 1, 2]), ROWS, tokenizer)
    np.testing.assert_allclose(counts, [1, 10, 5, 10, 0.5, 0, np.nan, 5], rtol=1e-6)
    assert unit_name("model", tokenizer) == "bins"


def test_distinct_counts_come_back_from_their_bins(tmp_path: Path) -> None:
    tokenizer = TahoeX1Tokenizer(str(write_vocab(tmp_path)))
    values = np.random.default_rng(0).permutation(60).astype(np.float32) + 1
    encoded = tokenizer.encode_rows(GeneRows(np.arange(3, 63), values, np.array([0, 60])))
    rows = GeneRows(np.arange(60), values, np.array([0, 60]))
    back = as_counts(encoded.expression_values[1:], np.zeros(60, dtype=int), rows, tokenizer)
    assert np.abs(back - values).max() < 59 / 49 + 1e-4  # the width of a bin
    assert len(GENES) == 60


def test_logarithms_and_raw_values(tmp_path: Path) -> None:
    vocab = str(write_vocab(tmp_path))
    log = TahoeX1Tokenizer(vocab, value_encoding="log1p")
    values = np.log1p(ROWS.counts[:4] / 21 * log.target_sum)
    np.testing.assert_allclose(as_counts(values, np.zeros(4, dtype=int), ROWS, log), ROWS.counts[:4], rtol=1e-5)
    raw = TahoeX1Tokenizer(vocab, value_encoding="raw")
    np.testing.assert_array_equal(as_counts(ROWS.counts, ROWS.cells(), ROWS, raw), ROWS.counts)
    assert unit_name("counts", log) == "counts of the cell"
    with pytest.raises(ValueError, match="unit='x'"):
        check_unit("x")
