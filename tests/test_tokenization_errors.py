"""Every error and every warning of the cell tokenizer says what is wrong and what to do."""

import json
import logging

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from tahoex1_hf import TahoeX1Tokenizer


@pytest.fixture
def vocab_file(golden):
    return golden / "b_3b_like_chem" / "model" / "vocab.json"


@pytest.fixture
def drug_table(golden):
    return json.loads((golden / "b_3b_like_chem" / "model" / "drug_to_id_pad.json").read_text())


@pytest.fixture
def tokenizer(vocab_file, drug_table):
    return TahoeX1Tokenizer(vocab_file, drug_to_id=drug_table)


@pytest.fixture
def ids(tokenizer):
    return [token for token in tokenizer.get_vocab() if token.startswith("ENSG")][:20]


@pytest.fixture
def counts():
    return np.random.default_rng(0).integers(0, 30, (8, 20)).astype(np.float32)


@pytest.fixture
def adata(counts, ids):
    adata = ad.AnnData(counts)
    adata.var_names = ids
    return adata


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="tahoex1_hf")
    return caplog


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_encoding": "rank"}, r"value_encoding='rank': pass one of \('bins', 'log1p', 'raw'\)"),
        ({"overflow": "random"}, r"overflow='random': pass one of \('sample', 'first', 'highest'\)"),
        ({"num_bins": 2}, "num_bins=2: pass a whole number of at least 3"),
        ({"num_bins": 10**30}, "num_bins=10{30}: pass at most 1048576"),
        ({"num_bins": 51.0}, "num_bins=51.0: pass a whole number"),
        ({"num_bins": True}, "num_bins=True: pass a whole number"),
        ({"context_length": 2}, "context_length=2: .*at least 3, or None for whole cells"),
        ({"context_length": "all"}, "context_length='all': .*None"),
        ({"target_sum": 0}, "target_sum=0: pass a positive number"),
        ({"target_sum": float("nan")}, "target_sum=nan: pass a positive number"),
        ({"pad_value": 0.0}, "pad_value=0.0: pass a negative number"),
        ({"right_binning": 1}, "right_binning=1: pass True or False"),
        ({"first_gene_raw": "no"}, "first_gene_raw='no': pass True or False"),
        ({"drug_to_id": ["a"]}, r"drug_to_id=\['a'\]: pass a dict name -> id with distinct ids"),
        ({"drug_to_id": {"<pad>": 0, "a": 1, "b": 1}}, "distinct ids"),
        ({"drug_to_id": {"<pad>": 0, "a": "1"}}, "distinct ids"),
        ({"unknown_drugs": "skip"}, r"unknown_drugs='skip': pass one of \('pad', 'error'\)"),
        ({"drug_to_id": {"a": 1}}, "a table with id 0, for cells without a drug"),
        ({"pad_token": "[PAD]"}, r"pad_token='\[PAD\]' is not in .*vocab.json: name the token that it has"),
        ({"cls_token": "[CLS]"}, r"cls_token='\[CLS\]' is not in"),
        (
            {"mask_token": "<mask>"},
            "'<mask>'.* cannot be added: the model has embeddings for its vocabulary file only",
        ),
        ({"padding_side": "left"}, 'padding_side="left": <cls> and <drug> must stay first'),
        ({"max_length": 1024}, "max_length= is not an option of TahoeX1Tokenizer: use context_length="),
        ({"n_bins": 51}, "n_bins= is not an option .*use num_bins="),
        ({"value_encodings": "raw"}, "use value_encoding="),
        ({"drugs_to_id": {}}, "use drug_to_id="),
    ],
)
def test_wrong_settings(vocab_file, options, message):
    with pytest.raises(ValueError, match=message):
        TahoeX1Tokenizer(vocab_file, **options)


def test_transformers_own_settings_pass(vocab_file):
    tokenizer = TahoeX1Tokenizer(vocab_file, model_max_length=7, verbose=True, clean_up_tokenization_spaces=False)
    assert tokenizer.model_max_length == 7


def test_drug_table_without_drug_token(golden):
    with pytest.raises(ValueError, match=r"drug_to_id needs the token '<drug>', which .* lacks: use the vocabulary"):
        TahoeX1Tokenizer(golden / "a_70m_like" / "model" / "vocab.json", drug_to_id={"<pad>": 0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["a"], "must hold a JSON object token -> id"),
        ({"<pad>": "0"}, "must hold a JSON object token -> id"),
        ({"<pad>": -1}, "ids from 0"),
        ({"<pad>": 0, "<cls>": 0}, "same id to several tokens"),
        ({"<pad>": 0, "ENSG00000000001": 1}, "cls_token='<cls>' is not in"),
    ],
)
def test_wrong_vocabularies(tmp_path, content, message):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        TahoeX1Tokenizer(path)


@pytest.mark.parametrize("path", ["no/such/vocab.json", None])
def test_missing_vocabulary(path):
    with pytest.raises(ValueError, match=r"is not a file: pass the path of the model's vocab.json"):
        TahoeX1Tokenizer(path)


def test_no_token_can_be_added(tokenizer):
    with pytest.raises(ValueError, match=r"\['<new>'\] cannot be added"):
        tokenizer.add_tokens(["<new>"])
    assert len(tokenizer) == 604


# Inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", ["some text", ["two", "texts"], None, {"a": 1}, [[0, 1, 2]], [1, 2], 5])
def test_text_and_other_things(tokenizer, cells):
    with pytest.raises(TypeError, match=r"reads cells, not text: .*AnnData.*gene_ids=.*\(genes, counts\) pairs"):
        tokenizer(cells)


@pytest.mark.parametrize("method", ["encode", "tokenize"])
def test_text_methods(tokenizer, method):
    with pytest.raises(TypeError, match="reads cells, not text"):
        getattr(tokenizer, method)("some text")


def test_misplaced_arguments(tokenizer, adata, counts, ids):
    with pytest.raises(ValueError, match="gene_ids= is missing: pass the Ensembl id of every column"):
        tokenizer(counts)
    with pytest.raises(ValueError, match=r"an AnnData .see gene_id_column=. or pairs bring their genes"):
        tokenizer(adata, gene_ids=ids)
    with pytest.raises(ValueError, match="pairs bring their genes"):
        tokenizer([(ids, counts[0])], gene_ids=ids)
    for option in ({"layer": "counts"}, {"gene_id_column": "x"}):
        with pytest.raises(ValueError, match="are for an AnnData: pass gene_ids= with a matrix"):
            tokenizer(counts, gene_ids=ids, **option)
    with pytest.raises(TypeError, match="unexpected keyword argument 'truncate'"):
        tokenizer(counts, gene_ids=ids, truncate=True)


def test_wrong_shapes(tokenizer, counts, ids):
    genes = tokenizer.match_genes(ids)
    with pytest.raises(ValueError, match=r"shape \(8, 19\), but 20 gene ids were matched"):
        tokenizer.encode_counts(counts[:, 1:], genes)
    for call in (lambda: tokenizer.encode_counts(counts[0], genes), lambda: tokenizer(counts[0], gene_ids=ids)):
        with pytest.raises(ValueError, match=r"one cell: counts.reshape\(1, -1\)"):
            call()
    with pytest.raises(TypeError, match="counts have dtype complex64"):
        tokenizer(counts.astype(np.complex64), gene_ids=ids)
    with pytest.raises(ValueError, match=r"cells\[1\]: genes of shape \(2,\) and counts of shape \(3,\)"):
        tokenizer([(ids[:1], [1]), (ids[:2], [1, 2, 3])])
    with pytest.raises(ValueError, match=r"cells\[0\]: genes of shape \(\)"):
        tokenizer([(ids[0], 3)])


def test_wrong_token_ids(tokenizer):
    cls = tokenizer.cls_token_id
    with pytest.raises(ValueError, match=rf"genes holds {cls} \(<cls>\).*leave special tokens such as <cls> out"):
        tokenizer([([cls, 3], [-2, 1])])
    for wrong in (-1, 604):
        with pytest.raises(ValueError, match=f"genes holds {wrong} .None., which is not the token id of a gene"):
            tokenizer([([wrong, 3], [2, 1])])
    with pytest.raises(TypeError, match="genes have dtype float64: pass Ensembl ids or integer token ids"):
        tokenizer([([1.0, 3.0], [2, 1])])


@pytest.mark.parametrize("option", [{"seed": -1}, {"first_cell": -1}])
def test_wrong_numbers(tokenizer, counts, ids, option):
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"{name}=-1: pass a non-negative integer"):
        tokenizer(counts, gene_ids=ids, **option)


def test_wrong_output_options(tokenizer, counts, ids):
    with pytest.raises(ValueError, match="cells of different lengths: pass padding=True"):
        tokenizer(counts, gene_ids=ids, return_tensors="pt")
    with pytest.raises(ValueError, match=r'return_tensors=\'tf\': pass "pt", "np" or None'):
        tokenizer(counts, gene_ids=ids, return_tensors="tf", padding=True)
    with pytest.raises(ValueError, match="padding='left': pass True"):
        tokenizer(counts, gene_ids=ids, padding="left")
    with pytest.raises(ValueError, match="pad_to_multiple_of=8 needs padding=True"):
        tokenizer(counts, gene_ids=ids, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="pad_to_multiple_of=0: pass a positive number"):
        tokenizer(counts, gene_ids=ids, pad_to_multiple_of=0, padding=True)


def test_wrong_features(tokenizer, counts, ids):
    features = tokenizer(counts, gene_ids=ids)
    with pytest.raises(ValueError, match=r"encoded_inputs lacks \['expression_values'\]"):
        tokenizer.pad([{"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match="max_length=3 is shorter than a cell of"):
        tokenizer.pad(features, padding="max_length", max_length=3)
    with pytest.raises(ValueError, match="padding='left': pass True"):
        tokenizer.pad(features, padding="left")
    with pytest.raises(ValueError, match="is empty: pass at least one cell"):
        tokenizer.pad([])
    for name, column, message in (
        ("cell_type", ["B"] * 8, "cell_type is not made of numbers"),
        ("labels", [[1] * (n + 1) for n in range(8)], "labels has another length in each cell, .*TokenClassification"),
        ("attention_mask", [[1]] * 8, "attention_mask and input_ids of the same cell differ in length"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.pad({**features, name: column}, return_tensors="pt")


# Genes --------------------------------------------------------------------------------------------


def test_symbols(tokenizer, ids):
    with pytest.raises(
        ValueError, match=r"0 of 3 genes .*'TP53'.* look like gene symbols.*Pass Ensembl ids, or gene_symbols="
    ):
        tokenizer.match_genes(["TP53", "GAPDH", "MYC"])


def test_symbols_among_ensembl_ids(tokenizer, ids):
    # Ensembl's own symbol columns hold the id where a gene has no symbol.
    with pytest.raises(ValueError, match=r"2 of 5 genes .*look like gene symbols"):
        tokenizer.match_genes([*ids[:2], "TP53", "GAPDH", "MYC"])
    assert tokenizer.match_genes([*ids[:3], "ERCC-00002", "GFP"]).num_matched == 3


def test_symbols_in_an_anndata_name_the_right_column(tokenizer, adata, ids):
    adata.var["gene_id"] = [f"{name}.3" for name in ids]
    adata.var["chromosome"] = "chr1"
    adata.var_names = [f"SYM{i}" for i in range(20)]
    with pytest.raises(ValueError, match=r"var columns with Ensembl ids: \['gene_id'\]; pass gene_id_column="):
        tokenizer(adata)
    with pytest.raises(ValueError, match=r"gene symbols.*\['gene_id'\]; pass gene_id_column="):
        tokenizer(adata, gene_id_column="chromosome")
    assert tokenizer(adata, gene_id_column="gene_id")["input_ids"]


def test_other_species(tokenizer):
    with pytest.raises(ValueError, match=r"another species, and the vocabulary is human.*human orthologues"):
        tokenizer.match_genes(["ENSMUSG00000059552", "ENSMUSG00000057666.4", "Xkr4"])


def test_other_unknown_genes(tokenizer, ids):
    with pytest.raises(
        ValueError, match=r"'ENSG99999999999'.* are unknown, the vocabulary has .'ENSG.*Pass human Ensembl gene ids"
    ):
        tokenizer.match_genes(["ENSG99999999999"])
    with pytest.raises(ValueError, match="1 of 200 genes are in the vocabulary"):
        tokenizer.match_genes([ids[0], *(f"ENSG9{i:010d}" for i in range(199))])
    with pytest.raises(ValueError, match="gene_ids is empty"):
        tokenizer.match_genes([])
    with pytest.raises(ValueError, match="Pass human Ensembl gene ids"):
        tokenizer.match_genes(["TP53"], gene_symbols={"GAPDH": ids[0]})
    with pytest.raises(ValueError, match="gene symbols"):
        tokenizer([(["TP53", "MYC"], [1, 2])])
    with pytest.raises(TypeError, match="is one string: pass a sequence of gene ids"):
        tokenizer.match_genes("ENSG00000000003")


def test_missing_parts_of_an_anndata(tokenizer, adata):
    adata.layers["spliced"] = adata.X
    with pytest.raises(ValueError, match=r"layer='counts' is not in adata.layers: it has \['spliced'\]"):
        tokenizer(adata, layer="counts")
    with pytest.raises(ValueError, match=r"gene_id_column='ensembl' is not in adata.var: it has"):
        tokenizer(adata, gene_id_column="ensembl")
    adata.X = None
    with pytest.raises(ValueError, match=r"adata.X is empty: name the counts with layer=, one of \['spliced'\]"):
        tokenizer(adata)


# Drugs --------------------------------------------------------------------------------------------


def test_wrong_drugs(tokenizer, adata, vocab_file, counts, ids):
    with pytest.raises(
        ValueError, match=r"'Drug 1O' is not in the drug table; did you mean .*'Drug 1'.*tokenizer.drug_to_id"
    ):
        tokenizer(counts, gene_ids=ids, drugs="Drug 1O")
    strict = TahoeX1Tokenizer(vocab_file, drug_to_id=tokenizer.drug_to_id, unknown_drugs="error")
    with pytest.raises(
        ValueError,
        match=r"'Drog 3' is not in the drug table; did you mean 'Drug 3'.*: 'Drog 3' \(2\), 'x' \(1\)\..*pass None",
    ):
        strict(counts, gene_ids=ids, drugs=["Drug 1"] * 5 + ["Drog 3", "x", " Drog 3"])
    for wrong in (["Drug 1"] * 7, ["Drug 1"] * 9):
        with pytest.raises(ValueError, match=f"drugs has {len(wrong)} entries for 8 cells"):
            tokenizer(counts, gene_ids=ids, drugs=wrong)
    with pytest.raises(ValueError, match="has no drug table: use a drug model, or leave drugs out"):
        TahoeX1Tokenizer(vocab_file)(counts, gene_ids=ids, drugs="Drug 1")
    adata.obs["treatment"] = "Drug 1"
    adata.obs["Drug 2"] = 0
    with pytest.raises(
        ValueError,
        match=r"'treatmnt' is neither a column of adata.obs nor in the drug table; did you mean 'treatme",
    ):
        tokenizer(adata, drugs="treatmnt")
    with pytest.raises(ValueError, match=r"'Drug 2' is a column of adata.obs and a drug: pass a list"):
        tokenizer(adata, drugs="Drug 2")
    with pytest.raises(ValueError, match="no drug table"):
        TahoeX1Tokenizer(vocab_file)(adata, drugs="treatment")


# Counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.5, "negative values look scaled"),
        (np.nan, "NaN and infinite"),
        (np.inf, "NaN and infinite"),
        (-np.inf, "NaN and infinite"),
    ],
)
@pytest.mark.parametrize("value_encoding", ["bins", "log1p", "raw"])
def test_refused_counts(vocab_file, counts, ids, form, value, message, value_encoding):
    tokenizer = TahoeX1Tokenizer(vocab_file, value_encoding=value_encoding)
    counts[5, 3] = counts[6, 1] = value
    with pytest.raises(
        ValueError, match=f"counts: cell 5, gene {ids[3]} has the value {value}: {message}.* raw counts"
    ):
        tokenizer(form(counts), gene_ids=ids)
    with pytest.raises(ValueError, match=f"cell 105, gene {ids[3]}"):
        tokenizer.encode_counts(form(counts), tokenizer.match_genes(ids), first_cell=100)
    with pytest.raises(ValueError, match=f"cell 0, gene {ids[3]}"):
        tokenizer([(ids, counts[5])])


def test_counts_of_unknown_genes_are_not_checked(tokenizer, counts, ids):
    counts[0, 0] = np.nan
    assert tokenizer(counts, gene_ids=["unknown", *ids[1:]])


def test_refused_counts_of_an_anndata_name_the_raw_ones(tokenizer, adata):
    adata.layers["counts"] = adata.X.copy()
    adata.layers["logs"] = np.log1p(adata.X)
    adata.raw = adata
    adata.X = adata.X - 5.5
    with pytest.raises(
        ValueError,
        match=r'Raw counts seem to be in layer="counts" and in adata.raw .pass adata.raw.to_adata\(\).: pass that',
    ):
        tokenizer(adata)
    with pytest.raises(ValueError, match='Raw counts seem to be in layer="counts"'):
        tokenizer.encode_counts(adata.X, tokenizer.match_genes(adata.var_names), source=adata)
    adata.X, adata.layers["scaled"] = adata.layers["counts"], adata.X
    del adata.layers["counts"], adata.raw
    with pytest.raises(ValueError, match=r"seem to be in adata.X .leave out layer=.: pass that"):
        tokenizer(adata, layer="scaled")
    adata.X = adata.layers["scaled"]
    with pytest.raises(ValueError, match=r"no layer and no .raw with non-negative integers"):
        tokenizer(adata)


@pytest.mark.parametrize("value_encoding", ["bins", "log1p", "raw"])
def test_log_normalised_values_give_one_warning(vocab_file, adata, log, monkeypatch, value_encoding):
    monkeypatch.setattr("tahoex1_hf.tokenization_tahoe_x1._CHUNK_ELEMENTS", 40)  # two cells at a time
    tokenizer = TahoeX1Tokenizer(vocab_file, value_encoding=value_encoding)
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X / adata.X.sum(1, keepdims=True) * 1e4)
    tokenizer(adata)
    if value_encoding == "raw":
        assert not log.records
        return
    assert len(log.records) == 1
    assert "the values are not integers and look log-normalised" in log.text
    assert 'Raw counts seem to be in layer="counts": pass that' in log.text


def test_other_fractions_give_a_warning_too(tokenizer, counts, ids, log):
    tokenizer(counts + 0.5, gene_ids=ids)
    assert "the values are not integers. The models were trained on raw counts" in log.text
    log.clear()
    tokenizer(counts, gene_ids=ids)
    assert not log.records


def test_csc_gives_a_warning(tokenizer, counts, ids, log):
    tokenizer(sp.csc_matrix(counts), gene_ids=ids)
    assert "The matrix is CSC (by gene) and is converted to CSR" in log.text
