"""The compiled encoding of cells equals the tokenizer's own bit for bit, and leaves unusual cells to the tokenizer."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from cells import GENES, NUM_GENES, write_vocab
from scipy.sparse import csc_matrix, csr_matrix

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.compiled_encoding import compacted_rows, encode_compiled
from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.readers.anndata_inputs import AnnDataInput
from tahoex1_hf.cells.readers.base import gene_rows
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows
from tahoex1_hf.padding_tahoe_x1 import EncodedCells, concatenate_cells


@pytest.fixture(autouse=True)
def compiled() -> None:
    compilation.use_now()


def encode_chunk(
    ours: TahoeX1Tokenizer, matrix: Any, genes: GeneMatch, drugs: Any = None, first_cell: int = 0, seed: int = 0
) -> EncodedCells:
    """Return an input's cells, encoded in the way that is used for many cells."""
    rows, _ = gene_rows(matrix, genes, first_cell, ours)
    known = ours.convert_ids_to_tokens(int(np.flatnonzero(ours.is_gene)[0]))
    adata = anndata.AnnData(np.ones((matrix.shape[0], 1)), var={"gene": [known]})
    cells = AnnDataInput(adata, ours, GeneOptions("gene"))
    drug_ids = None if drugs is None else ours.drug_ids(drugs, matrix.shape[0])
    return ChunkEncoder(cells, EncodeOptions(ours, seed=seed)).encode(rows, drug_ids, first_cell)


DRUGS = {"<pad>": 0, "aspirin": 1}


def tokenizer(folder: Path, **settings: Any) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(folder, drug_token=True)), **{"context_length": 12, **settings})


def counts_of(num_cells: int, seed: int = 0, largest: int = 700) -> csr_matrix:
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, largest, (num_cells, NUM_GENES)) * (
        rng.random((num_cells, NUM_GENES)) < rng.random((num_cells, 1))
    )
    dense[3] = 0
    return csr_matrix(dense.astype(np.float32))


def assert_same(ours: EncodedCells, theirs: EncodedCells) -> None:
    for name in ("input_ids", "expression_values", "offsets", "drug_ids", "cell_numbers", "empty_cells"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        if getattr(ours, name) is not None:
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each use of the tokenizer's own encoding."""
    calls: list[int] = []
    real = TahoeX1Tokenizer.encode_rows

    def counting(self: TahoeX1Tokenizer, *args: Any, **kwargs: Any) -> EncodedCells:
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TahoeX1Tokenizer, "encode_rows", counting)
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"right_binning": True, "num_bins": 7},
        {"overflow": "first"},
        {"overflow": "highest"},
        {"context_length": None},
        {"context_length": 3},
        {"value_encoding": "raw"},
    ],
)
def test_equals_the_tokenizers_own(tmp_path: Path, settings: dict[str, Any], watched: list[int]) -> None:
    ours = tokenizer(tmp_path, **settings)
    matrix = counts_of(50)
    genes = ours.match_genes([*GENES[:-2], "ENSG99999999998", "ENSG99999999999"])
    for seed, first_cell in ((0, 0), (5, 10**9)):
        fast = encode_chunk(ours, matrix, genes, seed=seed, first_cell=first_cell)
        assert not watched
        assert_same(fast, ours.encode_counts(matrix, genes, seed=seed, first_cell=first_cell))
        watched.clear()
    assert 3 in fast.empty_cells


def test_rows_of_tokens(tmp_path: Path, settings_of_rows: dict[str, Any]) -> None:
    ours = tokenizer(tmp_path, drug_to_id=DRUGS, **settings_of_rows)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, NUM_GENES, 30)
    genes = ours.match_genes(GENES).token_ids
    tokens = np.concatenate([rng.permutation(genes)[:n] for n in lengths])  # in no order
    rows = GeneRows(
        tokens.astype(np.uint16),
        rng.integers(1, 400, len(tokens)).astype(np.float32),
        np.concatenate([[0], np.cumsum(lengths)]),
    )
    for drug_ids in (None, np.arange(30) % 2):
        expected = ours.encode_rows(rows, drug_ids=drug_ids, first_cell=7, seed=3)
        found = encode_compiled(ours, rows, drug_ids, first_cell=7, seed=3)
        assert found is not None
        assert_same(found, expected)
    fractions = rows._replace(counts=rows.counts * np.float32(0.3))
    assert encode_compiled(ours, fractions) is None


@pytest.fixture(params=[{}, {"context_length": None}, {"overflow": "first"}, {"overflow": "highest"}])
def settings_of_rows(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    matrix, genes = counts_of(400), ours.match_genes(GENES)
    starts = range(0, 400, 20)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: encode_chunk(ours, matrix[i : i + 20], genes, first_cell=i), starts))
    assert_same(concatenate_cells(parts), ours.encode_counts(matrix, genes))


def test_drugs(tmp_path: Path, watched: list[int]) -> None:
    ours = tokenizer(tmp_path, drug_to_id=DRUGS)
    matrix, genes = counts_of(20), ours.match_genes(GENES)
    for drugs in ("aspirin", ["aspirin", None] * 10):
        fast = encode_chunk(ours, matrix, genes, drugs=drugs)
        assert not watched
        assert_same(fast, ours.encode_counts(matrix, genes, drugs=drugs))
        watched.clear()
    with pytest.raises(ValueError, match="is not in the drug table"):
        encode_chunk(ours, matrix, genes, drugs="water")


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float64])
def test_types_of_counts(tmp_path: Path, dtype: Any, watched: list[int]) -> None:
    ours = tokenizer(tmp_path)
    matrix, genes = counts_of(20).astype(dtype), ours.match_genes(GENES)
    fast = encode_chunk(ours, matrix, genes)
    assert not watched
    assert_same(fast, ours.encode_counts(matrix, genes))


def unsorted(matrix: csr_matrix) -> csr_matrix:
    matrix = matrix.copy()
    matrix.indices[:2] = matrix.indices[:2][::-1]
    matrix.has_sorted_indices = False
    return matrix


@pytest.mark.parametrize("change", [csc_matrix, lambda m: m.toarray(), unsorted], ids=["csc", "dense", "unsorted"])
def test_other_matrices_give_the_same_rows(tmp_path: Path, change: Any) -> None:
    ours = tokenizer(tmp_path)
    matrix, genes = change(counts_of(20)), ours.match_genes(GENES)
    rows, _ = gene_rows(matrix, genes, 0, ours)
    # Sorted here, since the compiled way makes no rows of an unsorted matrix.
    same = csr_matrix(matrix)
    assert change is not unsorted or compacted_rows(same, genes, np.uint16) is None
    same.has_sorted_indices = False
    same.sort_indices()
    found = compacted_rows(same, genes, np.uint16)
    assert found is not None
    for ours_, theirs in zip(rows[:3], found[0][:3], strict=True):
        np.testing.assert_array_equal(ours_, theirs)
        assert ours_.dtype == theirs.dtype
    assert_same(encode_chunk(ours, matrix, genes), ours.encode_counts(matrix, genes))


def test_fractions_are_left_to_the_tokenizer(tmp_path: Path, watched: list[int]) -> None:
    ours = tokenizer(tmp_path)
    matrix, genes = counts_of(20) * np.float32(0.3), ours.match_genes(GENES)
    assert_same(encode_chunk(ours, matrix, genes), ours.encode_counts(matrix, genes))
    assert len(watched) == 2


@pytest.mark.parametrize("settings", [{"value_encoding": "log1p"}, {"first_gene_raw": True}])
def test_other_settings_are_left_to_the_tokenizer(
    tmp_path: Path, settings: dict[str, Any], watched: list[int]
) -> None:
    ours = tokenizer(tmp_path, **settings)
    matrix, genes = counts_of(20), ours.match_genes(GENES)
    assert_same(encode_chunk(ours, matrix, genes), ours.encode_counts(matrix, genes))
    assert len(watched) == 2


def test_the_tokenizer_reports_wrong_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = tokenizer(tmp_path)
    genes = ours.match_genes(GENES)
    bad = counts_of(20)
    bad.data[5] = -1
    with pytest.raises(ValueError, match="negative"):
        encode_chunk(ours, bad, genes)
    with pytest.raises(ValueError, match="shape"):
        encode_chunk(ours, bad[:, :5], genes)
    with pytest.raises(ValueError, match="seed=-1"):
        encode_chunk(ours, counts_of(20), genes, seed=-1)


def test_a_damaged_matrix_is_not_read_beyond_its_genes(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    for column in (10**8, -(10**8)):
        bad = counts_of(20)
        bad.indices[7] = column
        with pytest.raises(IndexError):  # raised by numpy in the tokenizer's own encoding
            encode_chunk(ours, bad, ours.match_genes(GENES))


def test_real_cells(shared_data: Any, watched: list[int]) -> None:
    heart = anndata.read_h5ad(shared_data("h5ad/heart_san_1000_native_ensembl.h5ad"))
    ours = TahoeX1Tokenizer(str(shared_data("tahoe/vocab.json")))
    genes = ours.match_genes(heart.var_names)
    matrix = csr_matrix(heart.X)
    matrix.sort_indices()
    fast = encode_chunk(ours, matrix, genes, seed=3)
    assert not watched
    assert_same(fast, ours.encode_counts(matrix, genes, seed=3))


def test_the_lowest_scores_are_found() -> None:
    """Of random scores, which differ in the first bits, and of those of counts, which begin with the same ones."""
    from tahoex1_hf.cells.kernels import _lowest

    random = np.random.default_rng(0)
    for number in (1, 2, 255, 3000):
        spread = random.integers(0, 2**64, number, dtype=np.uint64)
        counts = ~random.geometric(0.7, number).astype(np.float32).view(np.uint32)
        alike = counts.astype(np.uint64) << np.uint64(32) | random.permutation(number).astype(np.uint64)
        for scores in (spread, alike, alike // np.uint64(2**34)):  # of the last, many are equal
            for room in {1, number // 2 + 1, number}:
                found = _lowest(scores, number, room, np.empty(256, np.int32), np.empty(number, np.uint64))
                assert found == np.sort(scores)[room - 1]
