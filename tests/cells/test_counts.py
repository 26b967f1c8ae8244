"""Counts are found where they are, rounded where arithmetic left errors, and told from what only looks like them."""

import logging
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from cells import make_cells, write_vocab
from scipy.sparse import csc_matrix, csr_matrix

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.counts import doubt, without_noise
from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.encoding_tahoe_x1 import GeneRows


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path)), context_length=None)


def encoded(cells: CellInput) -> list[bytes]:
    cells.sort_by_cell()
    chunks = list(ChunkEncoder(cells, EncodeOptions(cells.tokenizer)).chunks(0, cells.num_cells))
    return [part for chunk in chunks for part in (chunk.input_ids.tobytes(), chunk.expression_values.tobytes())]


def logarithms(matrix: csr_matrix) -> csr_matrix:
    return matrix.multiply(1e4 / matrix.sum(1)).log1p().tocsr().astype(np.float32)


def with_counts_in(*places: str, form: Callable = csr_matrix) -> anndata.AnnData:
    """Cells with logarithms in X, and counts in layers or raw."""
    adata = make_cells(20)
    counts = form(adata.X)
    if "raw" in places:
        adata.raw = anndata.AnnData(counts, var=adata.var)
    adata.X = logarithms(adata.X)
    for name in places:
        if name != "raw":
            adata.layers[name] = counts
    return adata


@pytest.mark.parametrize(
    "places", [("counts",), ("raw_counts",), ("raw",), ("counts", "raw"), ("raw_counts", "counts")]
)
@pytest.mark.parametrize("form", [csr_matrix, csc_matrix, lambda matrix: matrix.toarray()])
def test_counts_are_taken_from_where_they_are(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, places: tuple, form: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    adata, path = with_counts_in(*places, form=form), tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    expected = encoded(open_cells(make_cells(20), tokenizer))
    first = "counts" if "counts" in places else places[0]
    sources = {"memory": adata, "file": path}
    if form is not csc_matrix:
        sources["backed"] = anndata.read_h5ad(path, backed="r")
    for name, each in sources.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "tahoex1_hf"):
            cells = open_cells(each, tokenizer, spool=tmp_path / "spool")
        assert encoded(cells) == expected
        assert cells.counts_from == ("raw/X" if first == "raw" else f"layers/{first}")
        (record,) = [record for record in caplog.records if "X holds no counts" in record.message]
        assert record.levelno == (logging.INFO if name == "file" else logging.WARNING)
        assert ("raw" if first == "raw" else f'layer="{first}"') in record.message


def test_two_places_with_different_counts_are_asked_for(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    adata = with_counts_in("raw", "counts")
    adata.layers["counts"] = adata.layers["counts"] * 2
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for each in (adata, tmp_path / "cells.h5ad"):
        with pytest.raises(ValueError, match=r"X holds no counts.*which are not the same.*--layer.*'counts' or 'raw'"):
            open_cells(each, tokenizer)
        assert open_cells(each, tokenizer, GeneOptions(layer="raw")).counts_from == "raw/X"


def test_other_layers_are_not_taken_for_counts(tokenizer: TahoeX1Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    adata = with_counts_in("X_binned", "spliced")
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        cells = open_cells(adata, tokenizer)
        encoded(cells)
    (record,) = caplog.records  # once, however many chunks there are
    assert record.levelno == logging.WARNING
    assert "the values are not integers and look log-normalised" in record.message
    assert 'Raw counts seem to be in layer="X_binned" and in layer="spliced"' in record.message
    assert cells.counts_from == "X"


def test_counts_in_x_are_taken_whatever_else_there_is(
    tokenizer: TahoeX1Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    adata = make_cells(20)
    adata.layers["counts"] = adata.X * 2
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        assert encoded(open_cells(adata, tokenizer)) == encoded(open_cells(make_cells(20), tokenizer))
    assert not caplog.records


def test_x_is_taken_where_it_is_named(tokenizer: TahoeX1Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    cells = open_cells(with_counts_in("counts"), tokenizer, GeneOptions(layer="X"))
    assert cells.counts_from == "X"
    assert "look log-normalised" in caplog.text
    assert 'Raw counts seem to be in layer="counts"' in caplog.text


def test_without_x_the_counts_are_taken(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    adata = with_counts_in("counts")
    adata.X = None
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for each in (adata, tmp_path / "cells.h5ad"):
        assert encoded(open_cells(each, tokenizer)) == encoded(open_cells(make_cells(20), tokenizer))


# Rounding errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("size", [1e-6, 9e-4])
@pytest.mark.parametrize("form", [csr_matrix, lambda matrix: matrix.toarray()])
def test_rounding_errors_do_not_move_a_cell(
    tokenizer: TahoeX1Tokenizer,
    size: float,
    form: Callable,
    ready: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if ready:
        compilation.use_now()
    monkeypatch.setattr(compilation, "is_ready", lambda: ready)
    adata = make_cells(20)
    expected = encoded(open_cells(adata, tokenizer))
    noise = np.random.default_rng(0).uniform(-size, size, adata.shape).astype(np.float32)
    dense = adata.X.toarray()
    # Errors on zeros as well where all are stored, as decompositions leave them.
    adata.X = form(csr_matrix(dense + noise * (dense > 0))) if form is csr_matrix else dense + noise
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        assert encoded(open_cells(adata, tokenizer)) == expected
    assert not caplog.records


def test_a_cell_of_tiny_values_is_not_emptied() -> None:
    counts = np.array([2e-4, 9e-4, 3.0001, 1e-4], dtype=np.float32)
    rows = without_noise(GeneRows(np.array([5, 7, 5, 7]), counts, np.array([0, 2, 4])))
    assert rows.counts.tolist() == [*counts[:2].tolist(), 3.0]
    assert rows.offsets.tolist() == [0, 2, 3]


def test_a_cell_with_fractions_stays_as_it_is(tokenizer: TahoeX1Tokenizer) -> None:
    adata = make_cells(20)
    adata.X = adata.X.toarray()
    adata.X[3, adata.X[3] > 0] += 0.25
    adata.X[4, adata.X[4] > 0] += 1e-5
    rows = open_cells(adata, tokenizer).rows_at(np.arange(20))
    counts = np.split(rows.counts, rows.offsets[1:-1])
    assert (counts[3] % 1 == 0.25).all()
    assert (counts[4] % 1 == 0).all()
    assert (counts[5] == adata.X[5][adata.X[5] > 0]).all()


# What values look like --------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)
DEPTHS = RANDOM.integers(3000, 9000, 30)
SHARES = RANDOM.dirichlet(np.full(4000, 0.3))
COUNTS = csr_matrix(np.stack([RANDOM.multinomial(depth, SHARES) for depth in DEPTHS]).astype(np.float64))


def changed(change: Callable, scale: float | None = None) -> str | None:
    matrix = COUNTS.copy() if scale is None else csr_matrix(COUNTS.multiply(scale / DEPTHS[:, None]))
    matrix.data = change(matrix.data)
    matrix.eliminate_zeros()
    return doubt(matrix.data.astype(np.float32), matrix.indptr)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed(lambda x: x), None),
        (changed(np.log1p, 1e4), "look log-normalised. "),
        (changed(np.log1p), "look log-normalised. "),
        (changed(lambda x: np.log2(x + 1), 1e6), "look log-normalised (to base 2)"),
        (changed(lambda x: x, 1e4), "look normalised, without logarithm"),
        (changed(np.sqrt), "look like square roots of counts"),
        (changed(lambda x: x * RANDOM.uniform(0.8, 1, len(x))), "the values are not integers. The models"),
        (changed(np.rint, 1e6), "all cells have nearly the same sum, 1000"),
        (changed(lambda x: np.rint(np.log1p(x)), 1e4), "look like rounded logarithms"),
        (changed(np.sign), "all values are 1"),
    ],
)
def test_what_values_look_like(values: str | None, said: str | None) -> None:
    assert (values is None) if said is None else said in str(values)


def test_counts_of_the_same_sum_are_counts() -> None:
    same = csr_matrix(np.stack([RANDOM.multinomial(5000, SHARES) for _ in range(30)]))
    assert doubt(same.data, same.indptr) is None


def test_few_genes_are_no_evidence() -> None:
    assert doubt(np.ones(50), np.arange(0, 51, 10)) is None
    assert doubt(np.zeros(0), np.zeros(5, dtype=np.int64)) is None


def test_binary_values_are_warned_of_when_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    genes = [f"ENSG{i:011d}" for i in range(400)]
    tokenizer = TahoeX1Tokenizer(str(write_vocab(tmp_path, genes)), context_length=None)
    adata = make_cells(20, genes=genes)
    adata.X.data[:] = 1
    for source in (adata, tmp_path / "csc.h5ad"):
        caplog.clear()
        adata.X = csc_matrix(adata.X)
        adata.write_h5ad(tmp_path / "csc.h5ad")
        adata.X = csr_matrix(adata.X)
        with caplog.at_level(logging.WARNING, "tahoex1_hf"):
            encoded(open_cells(source, tokenizer, spool=tmp_path / "spool"))
        assert [record.message for record in caplog.records if "all values are 1" in record.message]
