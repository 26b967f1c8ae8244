"""Test the cell tokenizer: every way to hand in cells, sampling, drugs, saving and padding."""

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from golden_tokenizers import VARIANTS, examples, make, same_batch
from transformers import AutoTokenizer, DataCollatorWithPadding

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


@pytest.fixture
def tokenizer(golden):
    return make(golden)


@pytest.fixture
def adata(golden):
    return ad.read_h5ad(golden / "a_70m_like" / "adata.h5ad")


def tokens_of(tokenizer):
    return [token for token in tokenizer.get_vocab() if token.startswith("ENSG")]


def same(one, other):
    """Assert that two encodings hold the same cells."""
    for name in ("input_ids", "expression_values", "offsets", "cell_numbers", "empty_cells"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_array_equal(one.drug_ids, other.drug_ids)


# Ways to hand in cells ----------------------------------------------------------------------------


def as_pairs(matrix, gene_ids):
    dense = sp.csr_matrix(matrix).toarray()
    gene_ids = np.asarray(gene_ids)
    return [(gene_ids[row != 0], row[row != 0]) for row in dense]


FORMS = {
    "csr_matrix": sp.csr_matrix,
    "csr_array": sp.csr_array,
    "csc": sp.csc_matrix,
    "csc_array": sp.csc_array,
    "coo": sp.coo_matrix,
    "dense": lambda matrix: matrix.toarray(),
    "fortran": lambda matrix: np.asfortranarray(matrix.toarray()),
    "np.matrix": lambda matrix: matrix.todense(),
    "torch": lambda matrix: torch.from_numpy(matrix.toarray()),
    "frame": lambda matrix: pd.DataFrame(matrix.toarray()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context_length", [None, 64])
def test_every_form_of_a_matrix_gives_the_same_cells(golden, adata, form, context_length):
    tokenizer = make(golden, context_length=context_length)
    ids = adata.var["ensembl_id"]
    wanted = tokenizer(adata, gene_id_column="ensembl_id")
    known = adata.X[:, adata.var["id_in_vocab"].to_numpy() >= 0]
    longest = (known != 0).sum(axis=1).max() + 1
    assert longest > 64
    assert max(map(len, wanted["input_ids"])) == (context_length or longest)
    assert len(wanted["input_ids"]) == 50
    matrix = FORMS[form](adata.X)
    same_batch(tokenizer(matrix, gene_ids=ids), wanted)
    same(
        tokenizer.encode_counts(matrix, tokenizer.match_genes(ids)),
        tokenizer.encode_counts(adata.X, tokenizer.match_genes(ids)),
    )


@pytest.mark.parametrize("context_length", [None, 64])
def test_pairs_backed_files_and_stored_disorder_give_the_same_cells(golden, adata, tmp_path, context_length):
    tokenizer = make(golden, context_length=context_length)
    ids = adata.var["ensembl_id"]
    wanted = tokenizer(adata, gene_id_column="ensembl_id")
    same_batch(tokenizer(as_pairs(adata.X, ids)), wanted)
    tokens = tokenizer.match_genes(ids).token_ids
    same_batch(tokenizer(as_pairs(adata.X[:, tokens >= 0], tokens[tokens >= 0])), wanted)

    for name, matrix in (("csr", adata.X), ("csc", adata.X.tocsc()), ("dense", adata.X.toarray())):
        ad.AnnData(matrix, var=adata.var).write_h5ad(tmp_path / f"{name}.h5ad")
        backed = ad.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        assert backed.isbacked
        same_batch(tokenizer(backed, gene_id_column="ensembl_id"), wanted)
        backed.file.close()

    # Columns within a row in any order, explicit zeros, entries stored in two parts.
    rng = np.random.default_rng(0)
    coo = adata.X.tocoo()
    rows = np.concatenate([coo.row, coo.row, [0, 0]])
    columns = np.concatenate([coo.col, coo.col, [0, 1]])
    half = np.floor(coo.data / 2)
    data = np.concatenate([half, coo.data - half, [0, 0]])
    order = rng.permutation(len(rows))
    order = order[np.argsort(rows[order], kind="stable")]
    indptr = np.searchsorted(rows[order], np.arange(51))
    messy = sp.csr_matrix((data[order], columns[order], indptr), shape=adata.shape)
    assert not messy.has_canonical_format
    before = [part.copy() for part in (messy.data, messy.indices, messy.indptr)]
    same_batch(tokenizer(messy, gene_ids=ids), wanted)
    for part, copy in zip((messy.data, messy.indices, messy.indptr), before, strict=True):
        np.testing.assert_array_equal(part, copy)


def test_pieces_give_the_same_cells(golden, monkeypatch, caplog):
    tokenizer = make(golden, "b_3b_like_chem", context_length=64)
    drugs = [f"Drug {1 + i % 7}" if i % 3 else None for i in range(50)]
    adata = ad.read_h5ad(golden / "b_3b_like_chem" / "adata.h5ad")
    empty_cell = np.arange(50) == 19
    adata.X = sp.csr_matrix(adata.X.multiply(~empty_cell[:, None]))
    whole = tokenizer(adata, gene_id_column="ensembl_id", drugs=drugs, first_cell=7)
    monkeypatch.setattr("tahoex1_hf.tokenization_tahoe_x1._CHUNK_ELEMENTS", 600 * 8)
    same_batch(tokenizer(adata, gene_id_column="ensembl_id", drugs=drugs, first_cell=7), whole)
    reports = [record.getMessage() for record in caplog.records if "express no gene" in record.getMessage()]
    assert len(reports) == 2
    assert all("1 of 50 cells" in report and "[26]" in report for report in reports)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint64", "int8", "int64", "float16", "float64", "bool"])
def test_count_types(tokenizer, dtype):
    # Unsigned counts must not wrap the -2 of special tokens around, as they do in the original.
    dense = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, (5, 40))
    ids = tokens_of(tokenizer)[:40]
    wanted = tokenizer(dense.astype(np.float32), gene_ids=ids)
    for matrix in (dense.astype(dtype), as_pairs(dense, ids)):
        got = tokenizer(matrix, gene_ids=ids if isinstance(matrix, np.ndarray) else None)
        same_batch(got, wanted)
    if dtype != "float16":  # scipy has no sparse float16
        same_batch(tokenizer(sp.csr_matrix(dense.astype(dtype)), gene_ids=ids), wanted)
    assert all(values[0] == -2 for values in wanted["expression_values"])


def test_the_callers_data_stay_as_they_are(golden, adata):
    tokenizer = make(golden, context_length=30)
    before = adata.copy()
    matrix = adata.X.copy()
    for array in (adata.X.data, adata.X.indices, adata.X.indptr):
        array.setflags(write=False)
    tokenizer(adata, gene_id_column="ensembl_id", padding=True, return_tensors="pt")
    assert (adata.X != matrix).nnz == 0
    pd.testing.assert_frame_equal(adata.var, before.var)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    raw = make(golden, value_encoding="raw", context_length=None)
    encoded = raw.encode_counts(adata.X, raw.match_genes(adata.var["ensembl_id"]))
    encoded.expression_values[:] = 0
    assert (adata.X != matrix).nnz == 0


def test_layer_and_gene_symbols(tokenizer, adata):
    table = dict(adata.var["ensembl_id"])
    wanted = tokenizer(adata, gene_id_column="ensembl_id")
    adata.layers["counts"] = adata.X
    adata.X = None
    same_batch(tokenizer(adata, layer="counts", gene_symbols=table), wanted)
    same_batch(tokenizer(as_pairs(adata.layers["counts"], adata.var_names), gene_symbols=table), wanted)


def test_single_cells_and_no_cells(tokenizer, adata):
    ids = adata.var["ensembl_id"]
    genes = tokenizer.match_genes(ids)
    whole = tokenizer.encode_counts(adata.X, genes)
    for i in (0, 17, 49):
        alone = tokenizer.encode_counts(adata.X[i], genes, first_cell=i)
        np.testing.assert_array_equal(alone.input_ids, whole.input_ids[whole.offsets[i] : whole.offsets[i + 1]])
    for empty in (adata[:0], np.zeros((0, 600), np.float32), []):
        options = {"gene_id_column": "ensembl_id"} if isinstance(empty, ad.AnnData) else {}
        options = {"gene_ids": ids} if isinstance(empty, np.ndarray) else options
        assert tokenizer(empty, **options)["input_ids"] == []
        assert tokenizer(empty, **options, padding=True, return_tensors="pt")["input_ids"].shape == (0, 0)


# Genes --------------------------------------------------------------------------------------------


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="tahoex1_hf")
    return caplog


def test_match_genes_counts_what_it_finds(tokenizer, log):
    a, b, c = tokens_of(tokenizer)[:3]
    vocabulary = tokenizer.get_vocab()
    match = tokenizer.match_genes([b, "ENSG99999999999", a + ".12", a, "<pad>", "<cls>", c])
    assert match.token_ids.dtype == np.int64
    assert match.token_ids.tolist() == [vocabulary[b], -1, vocabulary[a], vocabulary[a], -1, -1, vocabulary[c]]
    assert (match.num_genes, match.num_matched, match.num_unknown, match.num_duplicates) == (7, 3, 3, 1)
    assert match.unknown_examples == ("ENSG99999999999", "<pad>", "<cls>")
    assert "3 of 7 genes are not in the vocabulary" in log.text
    assert "1 gene columns repeat another" in log.text


def test_few_known_genes_are_a_warning(tokenizer, log):
    a, b = tokens_of(tokenizer)[:2]
    tokenizer.match_genes([a, b, "ENSG99999999999"])
    assert [record.levelname for record in log.records] == ["INFO"]
    tokenizer.match_genes([a, "ENSG99999999998", "ENSG99999999999"])
    assert log.records[-1].levelname == "WARNING"


def test_junk_tokens_are_no_genes(golden):
    tokenizer = make(golden, "c_glu_post_gqa_avgpool")
    genes = tokens_of(tokenizer)
    assert tokenizer.match_genes(["<junk3>", *genes]).token_ids[0] == -1
    assert tokenizer.match_genes(genes).num_unknown == 0


@pytest.mark.parametrize("value_encoding", ["raw", "bins"])
def test_duplicate_genes_are_added_up_at_the_first_place(golden, value_encoding):
    tokenizer = make(golden, value_encoding=value_encoding)
    a, b, c = tokens_of(tokenizer)[:3]
    counts = np.array([[0, 2, 5, 3], [1, 2, 5, 3], [0, 0, 5, 0]])
    names = [a + ".1", b, c, a + ".2"]
    vocabulary = tokenizer.get_vocab()
    # In cell 0 only the second column of gene a is expressed; the gene still takes the place of the first column.
    wanted = [([a, b, c], [3, 2, 5]), ([a, b, c], [4, 2, 5]), ([c], [5])]
    batch = tokenizer(wanted)
    for matrix in (counts, sp.csr_matrix(counts), sp.csc_matrix(counts)):
        same_batch(tokenizer(matrix, gene_ids=names), batch)
    same_batch(tokenizer(counts, gene_ids=["x", b, c, "y"], gene_symbols={"x": a, "y": a}), batch)
    assert batch["input_ids"][0] == [tokenizer.cls_token_id, *(vocabulary[gene] for gene in (a, b, c))]
    # Within a pair, a gene takes the place of its first mention.
    same_batch(tokenizer([([a, b, c, a + ".7"], [1, 2, 5, 2])]), tokenizer([([a, b, c], [3, 2, 5])]))


def test_values_are_encoded_over_the_known_genes_of_the_whole_cell(golden):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, (4, 60))
    cut, whole = make(golden, context_length=20), make(golden, context_length=None)
    known = tokens_of(cut)[:50]
    names = [*known, *(f"ENSG9{i:010d}" for i in range(10))]
    all_genes = whole(counts[:, :50], gene_ids=known)
    same_batch(whole(counts, gene_ids=names), all_genes)
    sampled = cut(counts, gene_ids=names)
    for i in range(4):
        value_of = dict(zip(all_genes["input_ids"][i], all_genes["expression_values"][i], strict=True))
        assert [value_of[token] for token in sampled["input_ids"][i]] == sampled["expression_values"][i]


# Cells longer than the context --------------------------------------------------------------------


def test_overflow_keeps_order_and_length(golden, adata):
    whole = make(golden, context_length=None)(adata, gene_id_column="ensembl_id")
    for overflow in ("sample", "first", "highest"):
        cut = make(golden, context_length=64, overflow=overflow)(adata, gene_id_column="ensembl_id")
        for ids, all_ids in zip(cut["input_ids"], whole["input_ids"], strict=True):
            assert len(ids) == min(64, len(all_ids))
            places = [all_ids.index(token) for token in ids]
            assert places == sorted(places)
            assert places[0] == 0
            if overflow == "first":
                assert places == list(range(len(ids)))


@pytest.mark.parametrize("overflow", ["highest", "top"])  # its earlier name
def test_highest_keeps_the_highest_counts_and_of_equal_ones_the_lowest_tokens(golden, overflow):
    tokenizer = make(golden, value_encoding="raw", context_length=5, overflow=overflow)
    assert tokenizer.overflow == "highest"
    vocabulary = tokenizer.get_vocab()
    genes = sorted(tokens_of(tokenizer)[:8], key=vocabulary.get)
    counts = [1, 3, 2, 9, 2, 2, 1, 7]
    kept = {(vocabulary[genes[i]], counts[i]) for i in (1, 2, 3, 7)}
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [5, 4, 3, 2, 1, 0, 7, 6]):  # whatever the order of the genes
        batch = tokenizer([([genes[i] for i in order], [counts[i] for i in order])])
        assert batch["input_ids"][0][0] == tokenizer.cls_token_id
        assert set(zip(batch["input_ids"][0][1:], batch["expression_values"][0][1:], strict=True)) == kept


def test_sampling_depends_on_seed_and_content_alone(golden, adata):
    tokenizer = make(golden, context_length=32)
    genes = tokenizer.match_genes(adata.var["ensembl_id"])
    whole = tokenizer.encode_counts(adata.X, genes, seed=3)
    same(tokenizer.encode_counts(adata.X, genes, seed=3), whole)
    for size in (1, 8):
        ids, values = [], []
        for start in range(0, 50, size):
            part = tokenizer.encode_counts(adata.X[start : start + size], genes, first_cell=start, seed=3)
            ids.append(part.input_ids)
            values.append(part.expression_values)
        np.testing.assert_array_equal(np.concatenate(ids), whole.input_ids)
        np.testing.assert_array_equal(np.concatenate(values), whole.expression_values)
    assert (tokenizer.encode_counts(adata.X, genes, seed=4).input_ids != whole.input_ids).any()
    reversed_cells = tokenizer.encode_counts(adata.X[::-1], genes, seed=3)
    for row in range(50):
        mine, other = (
            encoded.input_ids[encoded.offsets[i] : encoded.offsets[i + 1]]
            for encoded, i in ((whole, row), (reversed_cells, 49 - row))
        )
        np.testing.assert_array_equal(mine, other)
    changed = adata.X[[0, 0]].astype(np.float32)
    changed[1, np.flatnonzero(changed[1].toarray())[0]] += 1  # one count more is another cell, and another sample
    twice = tokenizer.encode_counts(changed, genes)
    assert (np.diff(twice.input_ids.reshape(2, -1), axis=0) != 0).any()
    # The reverse order of the columns samples the same genes.
    mirrored = tokenizer.encode_counts(adata.X[:, ::-1], tokenizer.match_genes(adata.var["ensembl_id"][::-1]), seed=3)
    for a, b in zip(
        np.split(mirrored.input_ids, mirrored.offsets[1:-1]),
        np.split(whole.input_ids, whole.offsets[1:-1]),
        strict=True,
    ):
        assert a[1:][::-1].tolist() == b[1:].tolist()


def test_sampling_is_even(golden):
    tokenizer = make(golden, context_length=21, value_encoding="raw")
    ids = tokens_of(tokenizer)[:100]
    counts = np.random.default_rng(0).integers(1, 9, (4000, 100))  # no two cells are equal
    encoded = tokenizer.encode_counts(counts, tokenizer.match_genes(ids))
    times = np.bincount(encoded.input_ids, minlength=len(tokenizer))[tokenizer.convert_tokens_to_ids(ids)]
    # binomial(4000, 0.2): mean 800, standard deviation 25.3
    assert times.sum() == 4000 * 20
    assert np.abs(times - 800).max() < 5 * 25.3
    assert times.std() < 40


# Empty cells, drugs -------------------------------------------------------------------------------


def test_empty_cells_are_kept_and_reported(tokenizer, log):
    a, b = tokens_of(tokenizer)[:2]
    counts = np.array([[0, 0, 4], [1, 2, 0], [0, 0, 0]])
    names = [a, b, "ENSG99999999999"]
    encoded = tokenizer.encode_counts(counts, tokenizer.match_genes(names), first_cell=10)
    assert encoded.empty_cells.tolist() == [0, 2]
    assert encoded.lengths.tolist() == [1, 3, 1]
    assert encoded.cell_numbers.tolist() == [10, 11, 12]
    assert encoded.num_cells == 3
    assert "2 of 3 cells express no gene of the vocabulary" in log.text
    assert "[10, 12]" in log.text
    log.clear()
    batch = tokenizer(counts, gene_ids=names, padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [tokenizer.cls_token_id] + 2 * [tokenizer.pad_token_id]
    assert log.text.count("express no gene") == 1


def test_drugs(golden):
    tokenizer = make(golden, "b_3b_like_chem")
    genes = tokens_of(tokenizer)[:3]
    counts = np.arange(1, 10).reshape(3, 3)
    plain = tokenizer(counts, gene_ids=genes)
    assert "drug_ids" not in plain
    drug = tokenizer.convert_tokens_to_ids("<drug>")
    batch = tokenizer(counts, gene_ids=genes, drugs=["Drug 2", None, "Drug 1"])
    assert batch["drug_ids"] == [2, 0, 1]
    for i in range(3):
        assert batch["input_ids"][i] == [tokenizer.cls_token_id, drug, *plain["input_ids"][i][1:]]
        assert batch["expression_values"][i] == [-2, -2, *plain["expression_values"][i][1:]]
    assert tokenizer(counts, gene_ids=genes, drugs="Drug 2")["drug_ids"] == [2, 2, 2]
    for none in ("", [None, "", float("nan")], np.array([None, "", None]), pd.array([None, "", pd.NA])):
        assert tokenizer(counts, gene_ids=genes, drugs=none)["drug_ids"] == [0, 0, 0]
    short = make(golden, "b_3b_like_chem", context_length=4)
    assert [len(ids) for ids in short(counts, gene_ids=genes, drugs="Drug 1")["input_ids"]] == [4, 4, 4]
    padded = tokenizer(counts, gene_ids=genes, drugs="Drug 1", padding=True, return_tensors="pt")
    assert padded["drug_ids"].tolist() == [1, 1, 1]
    assert padded["drug_ids"].dtype == torch.int64


@pytest.fixture
def released_drugs(shared_data):
    """The drug table of the released model, and the drug of every sample of Tahoe-100M."""
    table = json.loads(shared_data("tahoe/drug_to_id_pad.json").read_text())
    return table, pd.read_parquet(shared_data("tahoe/sample_metadata.parquet"))["drug"].tolist()


def test_the_drugs_of_tahoe_100m(golden, released_drugs, caplog):
    """The table has 377 drugs, `<pad>` aside. The control and two drugs are not in it; two names end in a blank."""
    table, drugs = released_drugs
    assert (len(table), len(set(drugs))) == (378, 380)
    absent = ["DMSO_TF", "Sacubitril/Valsartan", "Verteporfin"]
    blank = {name for name in drugs if name != name.strip()}
    assert blank == {"Selinexor ", "Erdafitinib "}
    vocab = golden / "b_3b_like_chem" / "model" / "vocab.json"
    tokenizer = TahoeX1Tokenizer(vocab, drug_to_id=table)
    gene = tokenizer.convert_ids_to_tokens(int(np.flatnonzero(tokenizer.is_gene)[0]))
    cells = [([gene], [1])] * len(drugs)
    with caplog.at_level(logging.WARNING):
        found = tokenizer(cells, drugs=drugs)["drug_ids"]
    assert found == [0 if name in absent else table[name.strip()] for name in drugs]
    (record,) = caplog.records  # one warning, with names and cells
    for name in absent:
        assert f"{name!r} ({drugs.count(name)})" in record.getMessage()
    assert "Selinexor" not in record.getMessage()
    with caplog.at_level(logging.WARNING):
        tokenizer(cells[:9], drugs=["DMSO_TF"] * 9)  # the next batch of datasets.map
    assert len(caplog.records) == 1
    refuses = TahoeX1Tokenizer(vocab, drug_to_id=table, unknown_drugs="error")
    with pytest.raises(ValueError, match="'DMSO_TF' is not in the drug table"):
        refuses(cells, drugs=drugs)
    assert refuses(cells[:1], drugs="Erdafitinib")["drug_ids"] == [table["Erdafitinib"]]


def test_a_drug_for_all_cells_must_be_known(golden):
    vocab = golden / "b_3b_like_chem" / "model" / "vocab.json"
    tokenizer = TahoeX1Tokenizer(vocab, drug_to_id={"<pad>": 0, "Selinexor": 1})
    assert tokenizer.drug_ids("Selinexor ", 2).tolist() == [1, 1]
    with pytest.raises(ValueError, match="'Selinexer' is not in the drug table; did you mean 'Selinexor'"):
        tokenizer.drug_ids("Selinexer", 2)


def test_the_rule_for_unknown_drugs_is_saved(golden, tmp_path):
    vocab = golden / "b_3b_like_chem" / "model" / "vocab.json"
    TahoeX1Tokenizer(vocab, drug_to_id={"<pad>": 0}, unknown_drugs="error").save_pretrained(tmp_path)
    assert TahoeX1Tokenizer.from_pretrained(tmp_path).unknown_drugs == "error"


def test_drugs_of_an_anndata(golden):
    tokenizer = make(golden, "b_3b_like_chem")
    adata = ad.read_h5ad(golden / "b_3b_like_chem" / "adata.h5ad")[:4].copy()
    adata.obs["treatment"] = pd.Categorical(["Drug 1", None, "Drug 3", "Drug 1"])
    assert tokenizer(adata, gene_id_column="ensembl_id", drugs="treatment")["drug_ids"] == [1, 0, 3, 1]
    assert tokenizer(adata, gene_id_column="ensembl_id", drugs="Drug 2")["drug_ids"] == [2] * 4
    assert tokenizer(adata, gene_id_column="ensembl_id", drugs=adata.obs["treatment"])["drug_ids"] == [1, 0, 3, 1]


# Behaving like other tokenizers -------------------------------------------------------------------

OPTIONS = {
    "value_encoding": "log1p",
    "num_bins": 31,
    "right_binning": True,
    "target_sum": 5000,
    "context_length": 77,
    "overflow": "highest",
    "pad_value": -3,
    "first_gene_raw": True,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loader", [TahoeX1Tokenizer, AutoTokenizer])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"context_length": None}])
def test_saving_keeps_everything(golden, tmp_path, variant, loader, options):
    first = make(golden, variant, **options)
    first.save_pretrained(tmp_path / "1")
    second = loader.from_pretrained(tmp_path / "1")
    second.save_pretrained(tmp_path / "2")
    for tokenizer in (second, loader.from_pretrained(tmp_path / "2")):
        assert type(tokenizer) is TahoeX1Tokenizer
        for name in (*OPTIONS, "drug_to_id"):
            assert getattr(tokenizer, name) == getattr(first, name), name
        for name, value in options.items():
            assert getattr(tokenizer, name) == value
        assert tokenizer.get_vocab() == first.get_vocab()
        assert len(tokenizer) == len(first)
        assert tokenizer.all_special_tokens == first.all_special_tokens
        same_batch(tokenizer(examples(golden, variant)), first(examples(golden, variant)))
    saved = json.loads((tmp_path / "2" / "vocab.json").read_text())
    assert saved == json.loads((golden / variant / "model" / "vocab.json").read_text())
    changed = loader.from_pretrained(tmp_path / "1", context_length=9)
    assert changed.context_length == 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_vocabulary(golden, variant):
    tokenizer = make(golden, variant)
    vocabulary = json.loads((golden / variant / "model" / "vocab.json").read_text())
    assert len(tokenizer) == tokenizer.vocab_size == len(vocabulary)
    assert tokenizer.get_vocab() == vocabulary
    assert tokenizer.pad_token_id == vocabulary["<pad>"]
    assert tokenizer.cls_token_id == vocabulary["<cls>"]
    assert tokenizer.eos_token_id == vocabulary["<eoc>"]
    some = [*tokens_of(tokenizer)[:3], "<cls>"]
    assert tokenizer.convert_tokens_to_ids(some) == [vocabulary[token] for token in some]
    assert tokenizer.convert_ids_to_tokens([vocabulary[token] for token in some]) == some
    assert tokenizer.convert_tokens_to_ids(some[0]) == vocabulary[some[0]]
    tokenizer.get_vocab().clear()
    assert len(tokenizer.get_vocab()) == len(vocabulary)


def test_a_vocabulary_without_end_token(tmp_path):
    vocabulary = {"ENSG00000000001": 1, "<cls>": 2, "<pad>": 0}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = TahoeX1Tokenizer(tmp_path / "vocab.json")
    tokenizer.save_pretrained(tmp_path / "saved")
    for tok in (tokenizer, TahoeX1Tokenizer.from_pretrained(tmp_path / "saved")):
        assert tok.eos_token is None
        assert tok([(["ENSG00000000001"], [3])])["input_ids"] == [[2, 1]]


def test_outputs(tokenizer, adata):
    lists = tokenizer(adata[:4], gene_id_column="ensembl_id")
    lengths = [len(ids) for ids in lists["input_ids"]]
    assert len(set(lengths)) > 1
    assert lists["attention_mask"] == [[1] * n for n in lengths]
    torched = tokenizer(adata[:4], gene_id_column="ensembl_id", padding=True, return_tensors="pt")
    assert {name: tensor.dtype for name, tensor in torched.items()} == {
        "input_ids": torch.int64,
        "expression_values": torch.float32,
        "attention_mask": torch.int64,
    }
    assert torched["attention_mask"].sum(1).tolist() == lengths
    for i, n in enumerate(lengths):
        assert torched["input_ids"][i, :n].tolist() == lists["input_ids"][i]
        assert torched["expression_values"][i, :n].tolist() == lists["expression_values"][i]
        assert (torched["input_ids"][i, n:] == tokenizer.pad_token_id).all()
        assert (torched["expression_values"][i, n:] == -2).all()
    numpied = tokenizer(adata[:4], gene_id_column="ensembl_id", padding="longest", return_tensors="np")
    listed = tokenizer(adata[:4], gene_id_column="ensembl_id", padding=True)
    for name, tensor in torched.items():
        np.testing.assert_array_equal(numpied[name], tensor.numpy())
        assert listed[name] == tensor.tolist()
    wide = tokenizer(adata[:4], gene_id_column="ensembl_id", padding=True, pad_to_multiple_of=64, return_tensors="pt")
    assert wide["input_ids"].shape == (4, -(-max(lengths) // 64) * 64)
    alone = tokenizer(adata[:1], gene_id_column="ensembl_id", return_tensors="pt")
    assert alone["input_ids"].shape == (1, lengths[0])


def test_padded_rows_in_any_order(tokenizer, adata):
    genes = tokenizer.match_genes(adata.var["ensembl_id"])
    encoded = tokenizer.encode_counts(adata.X, genes)
    assert isinstance(encoded, EncodedCells)
    rows = [7, 3, 7]
    batch = encoded.padded(rows, pad_token_id=5, pad_value=-9)
    assert batch["input_ids"].shape == (3, encoded.lengths[rows].max())
    for place, row in enumerate(rows):
        start, stop = encoded.offsets[row : row + 2]
        n = stop - start
        assert batch["input_ids"][place, :n].tolist() == encoded.input_ids[start:stop].tolist()
        assert batch["expression_values"][place, :n].tolist() == encoded.expression_values[start:stop].tolist()
        assert (batch["input_ids"][place, n:] == 5).all()
        assert (batch["expression_values"][place, n:] == -9).all()
        assert batch["attention_mask"][place].sum() == n


def test_data_collator_with_padding(golden):
    tokenizer = make(golden, "b_3b_like_chem")
    cells = examples(golden, "b_3b_like_chem")
    lists = tokenizer(cells, drugs="Drug 4")
    features = [{name: lists[name][i] for name in lists} | {"label": i} for i in range(len(cells))]
    batch = DataCollatorWithPadding(tokenizer)(features)
    wanted = tokenizer(cells, drugs="Drug 4", padding=True, return_tensors="pt")
    for name in wanted:
        assert batch[name].dtype == wanted[name].dtype
        assert torch.equal(batch[name], wanted[name]), name
    assert batch["labels"].tolist() == list(range(len(cells)))
    fixed = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=100, pad_to_multiple_of=8)(features)
    assert fixed["input_ids"].shape == (6, 104)
    assert torch.equal(fixed["expression_values"][:, 100:], torch.full((6, 4), -2.0))
    assert torch.equal(tokenizer.pad(lists, return_tensors="pt")["input_ids"], wanted["input_ids"])
    # Features that are already padded keep their mask.
    again = tokenizer.pad(tokenizer(cells, padding=True), padding="max_length", max_length=80, return_tensors="pt")
    assert torch.equal(again["attention_mask"].sum(1), wanted["attention_mask"].sum(1) - 1)


# Real cells ---------------------------------------------------------------------------------------


def test_real_heart_cells(shared_data):
    path = shared_data("h5ad/heart_san_1000_native_ensembl.h5ad")
    tokenizer = TahoeX1Tokenizer(shared_data("tahoe/vocab.json"))
    backed = ad.read_h5ad(path, backed="r")
    batch = tokenizer(backed, padding=True, return_tensors="np")
    adata = ad.read_h5ad(path)
    match = tokenizer.match_genes(adata.var_names)
    assert match.num_unknown == match.num_duplicates == 0
    assert batch["input_ids"].shape == (1000, 1024)
    genes_per_cell = np.diff(adata.X.indptr)
    assert (batch["attention_mask"].sum(1) == np.minimum(genes_per_cell + 1, 1024)).all()
    values = batch["expression_values"][:, 1:]
    assert values.min() >= 1
    assert values.max() == 50
    same = tokenizer.encode_counts(adata.X[500:600], match, first_cell=500)
    np.testing.assert_array_equal(same.input_ids.reshape(100, -1), batch["input_ids"][500:600])
