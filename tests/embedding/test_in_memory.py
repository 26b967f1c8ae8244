"""embed_anndata gives the original's recorded embeddings, which depend on nothing but the cells."""

import copy
import logging
import threading
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GOLDEN
from scipy.sparse import csc_matrix, csr_matrix

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_anndata
from tahoex1_hf.cells import compilation
from tahoex1_hf.encoding_tahoe_x1 import sample_seed
from tahoex1_hf.inference.encoder import CellEncoder, GeneMeans, choose_dtype, length_sorted_batches
from tahoex1_hf.original.convert import convert_original_folder

KEY = "X_tahoe_x1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that loads a converted golden checkpoint, by variant."""
    loaded = {}

    def load(variant: str) -> tuple[TahoeX1Model, TahoeX1Tokenizer]:
        if variant not in loaded:
            folder = tmp_path_factory.mktemp("converted") / variant
            convert_original_folder(GOLDEN / variant / "model", folder)
            loaded[variant] = (TahoeX1Model.from_pretrained(folder), TahoeX1Tokenizer.from_pretrained(folder))
        return loaded[variant]

    return load


def golden_cells(variant: str) -> anndata.AnnData:
    return anndata.read_h5ad(GOLDEN / variant / "adata.h5ad")


def embedded(adata: anndata.AnnData, checkpoint, **options) -> np.ndarray:
    # Without this the function takes bfloat16 on CPUs that are fast at it.
    options = {"dtype": "float32", **options}
    embed_anndata(adata, *checkpoint, gene_id_column="ensembl_id", progress=False, **options)
    return adata.obsm[options.get("key_added", KEY)]


def test_equals_the_originals_cell_and_gene_embeddings(checkpoint) -> None:
    adata, expected = golden_cells("a_70m_like"), np.load(GOLDEN / "a_70m_like" / "emb_flash.npz")
    cells = embedded(adata, checkpoint("a_70m_like"), gene_embeddings=True)
    assert cells.dtype == np.float32
    assert np.abs(cells - expected["cell_embs"]).max() < 1e-6
    tokenizer = checkpoint("a_70m_like")[1]
    # The file's rows are in the order of vocab.json, as get_vocab() is.
    row_of = {token: row for row, token in enumerate(tokenizer.get_vocab())}
    genes = expected["gene_embs"][[row_of[gene] for gene in adata.var["ensembl_id"]]]
    expressed = ~np.isnan(genes).any(1)
    assert 0 < expressed.sum() < len(genes)
    np.testing.assert_allclose(adata.varm[KEY][expressed], genes[expressed], atol=1e-5, rtol=0)
    # The original's benchmarks put TE in place of NaN: tests/inference/test_gene_embeddings.py.
    assert adata.uns["tahoe_x1"]["genes_not_expressed"].tolist() == adata.var_names[~expressed].tolist()
    embedded(adata, checkpoint("a_70m_like"), gene_embeddings="TE")
    np.testing.assert_array_equal(adata.varm[KEY][~expressed], adata.varm[f"{KEY}_TE"][~expressed])


def test_three_kinds_of_gene_embeddings(checkpoint) -> None:
    adata = golden_cells("a_70m_like")[:, :100].copy()
    adata.var.loc[adata.var_names[:2], "ensembl_id"] = ["unknown", "another"]
    embedded(adata, checkpoint("a_70m_like"), gene_embeddings="EA,te,GE", key_added="X_mine")
    assert set(adata.varm) == {"X_mine", "X_mine_TE", "X_mine_GE"}
    for slot in adata.varm.values():
        assert slot.dtype == np.float32
        assert np.isnan(slot[:2]).all()
        assert np.isfinite(slot[2:]).all()
    assert adata.uns["mine"]["gene_embeddings"] == "GE,TE,EA"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("given", "number"), [(0, 0), (1, 1), (2, 2), (3, 3), (-1, 3), (-3, 1), (-4, 0), (None, 3)])
def test_hidden_layer_is_that_of_the_models_hidden_states(checkpoint, monkeypatch, given, number, pooling) -> None:
    model, tokenizer = checkpoint("a_70m_like")
    monkeypatch.setattr(model.config, "cell_pooling", pooling)
    adata = golden_cells("a_70m_like")[:6].copy()
    embedded(adata, (model, tokenizer), hidden_layer=given, gene_embeddings=True)
    cells = tokenizer.encode_counts(adata.X, tokenizer.match_genes(adata.var["ensembl_id"]))
    means = GeneMeans(np.arange(603), 603, 64, torch.device("cpu"))
    for cell in range(6):
        batch = cells.padded([cell], pad_token_id=tokenizer.pad_token_id, pad_value=tokenizer.pad_value)
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states[number]
        means.add(batch["input_ids"], hidden)
        pooled = hidden[0, 0] if pooling == "cls" else hidden[0].mean(0)
        np.testing.assert_allclose(adata.obsm[KEY][cell], pooled / pooled.norm(), atol=1e-6, rtol=0)
    genes = means.means(tokenizer.match_genes(adata.var["ensembl_id"]).token_ids)
    expressed = ~np.isnan(genes).any(1)
    np.testing.assert_allclose(adata.varm[KEY][expressed], genes[expressed], atol=1e-5, rtol=0)
    assert adata.uns["tahoe_x1"]["hidden_layer"] == number
    assert len(model.layers) == 3  # the model that was given is as it was


def test_hidden_layer_without_context_and_with_padding(checkpoint, caplog) -> None:
    reference = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), hidden_layer=2)
    model, tokenizer = checkpoint("a_70m_like")
    try:
        model.set_attn_implementation("eager")  # on padded rows
        eager = embedded(golden_cells("a_70m_like"), (model, tokenizer), hidden_layer=2)
    finally:
        model.set_attn_implementation("sdpa")
    np.testing.assert_allclose(eager, reference, atol=1e-6, rtol=0)
    assert "same embedding" not in caplog.text
    with caplog.at_level(logging.WARNING):
        cells = embedded(golden_cells("a_70m_like"), (model, tokenizer), hidden_layer=0)
    assert "gives every cell the same embedding" in caplog.text
    np.testing.assert_allclose(cells, cells[:1].repeat(50, 0), atol=1e-6, rtol=0)


def test_drug_model_with_unknown_drugs_equals_the_original(checkpoint) -> None:
    adata, expected = golden_cells("b_3b_like_chem"), np.load(GOLDEN / "b_3b_like_chem" / "emb_flash.npz")
    cells = embedded(adata, checkpoint("b_3b_like_chem"), drugs=[None] * adata.n_obs)
    difference = np.abs(cells - expected["cell_embs"]).max(1)
    # In each of its batches of 8 the original cuts one gene off the longest cell.
    genes = np.diff(adata.X.indptr)
    cut = [
        start + np.flatnonzero(genes[start : start + 8] == genes[start : start + 8].max()) for start in range(0, 50, 8)
    ]
    kept = np.setdiff1d(np.arange(50), np.concatenate(cut))
    assert len(kept) > 40
    assert difference[kept].max() < 1e-6


def test_drug_model_without_drugs_equals_the_original_with_its_first_gene_quirk(checkpoint) -> None:
    adata, expected = golden_cells("b_3b_like_chem"), np.load(GOLDEN / "b_3b_like_chem" / "emb_flash_nochem.npz")
    model, tokenizer = checkpoint("b_3b_like_chem")
    plain = embedded(adata, (model, tokenizer))
    try:
        tokenizer.first_gene_raw = True
        quirky = embedded(adata, (model, tokenizer))
    finally:
        tokenizer.first_gene_raw = False
    assert np.abs(quirky - expected["cell_embs"]).max() < 1e-6
    assert np.abs(plain - expected["cell_embs"]).max() > 1e-3


@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_does_not_depend_on_the_batches(checkpoint, batch_tokens: int) -> None:
    reference = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), gene_embeddings=True)
    adata = golden_cells("a_70m_like")
    cells = embedded(adata, checkpoint("a_70m_like"), batch_tokens=batch_tokens, gene_embeddings=True)
    np.testing.assert_allclose(cells, reference, atol=1e-6, rtol=0)


def test_does_not_depend_on_the_order_of_cells_and_genes(checkpoint) -> None:
    reference, adata = golden_cells("a_70m_like"), golden_cells("a_70m_like")
    random = np.random.default_rng(0)
    cells, genes = random.permutation(adata.n_obs), random.permutation(adata.n_vars)
    shuffled = adata[cells][:, genes].copy()
    embedded(reference, checkpoint("a_70m_like"), gene_embeddings=True)
    embedded(shuffled, checkpoint("a_70m_like"), gene_embeddings=True)
    np.testing.assert_allclose(shuffled.obsm[KEY], reference.obsm[KEY][cells], atol=2e-6, rtol=0)
    np.testing.assert_allclose(shuffled.varm[KEY], reference.varm[KEY][genes], atol=1e-5, rtol=0)


def test_does_not_depend_on_the_chunks_even_when_genes_are_sampled(checkpoint, monkeypatch) -> None:
    reference = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), max_length=64, seed=3)
    monkeypatch.setattr("tahoex1_hf.cells.encoding.CHUNK_CELLS", 7)
    chunked = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), max_length=64, seed=3)
    np.testing.assert_allclose(chunked, reference, atol=1e-6, rtol=0)
    other_seed = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), max_length=64, seed=4)
    assert np.abs(other_seed - reference).max() > 1e-3
    assert checkpoint("a_70m_like")[1].context_length == 1024


def test_does_not_depend_on_compiled_encoding(checkpoint, monkeypatch) -> None:
    whole = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), max_length=40)
    ready = threading.Event()
    ready.set()
    monkeypatch.setattr(compilation, "_ready", ready)
    monkeypatch.setattr("tahoex1_hf.cells.encoding.CHUNK_CELLS", 7)
    compiled = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), max_length=40)
    np.testing.assert_allclose(compiled, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("convert", [csr_matrix, csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.int64)])
def test_does_not_depend_on_how_the_counts_are_stored(checkpoint, convert) -> None:
    adata = golden_cells("a_70m_like")
    adata.X.data[:] = np.rint(adata.X.data) + 1
    reference = embedded(adata.copy(), checkpoint("a_70m_like"))
    other = anndata.AnnData(convert(adata.X), adata.obs, adata.var)
    np.testing.assert_array_equal(embedded(other, checkpoint("a_70m_like")), reference)


def test_changes_nothing_else(checkpoint) -> None:
    adata = golden_cells("a_70m_like")
    adata.layers["counts"], adata.uns["kept"] = adata.X.copy(), "as it was"
    before = adata.copy()
    embedded(adata, checkpoint("a_70m_like"), gene_embeddings=True)
    assert set(adata.obsm) == set(adata.varm) == {KEY}
    assert set(adata.uns) == {"kept", "tahoe_x1"}
    assert (adata.X != before.X).nnz == 0
    assert (adata.layers["counts"] != before.layers["counts"]).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)


def test_provenance_says_what_made_the_embeddings(checkpoint) -> None:
    adata = golden_cells("a_70m_like")
    embedded(adata, checkpoint("a_70m_like"), seed=5, max_length=100)
    provenance = adata.uns["tahoe_x1"]
    assert Path(provenance["model"]).name == "a_70m_like"
    assert provenance["matched_genes"] == 600
    assert (provenance["seed"], provenance["max_length"], provenance["dtype"]) == (5, 100, "float32")
    embedded(adata, checkpoint("a_70m_like"), key_added="X_mine")
    assert {"tahoe_x1", "mine"} <= set(adata.uns)


def test_an_empty_cell_is_embedded_and_reported(checkpoint, caplog) -> None:
    adata = golden_cells("a_70m_like")
    adata.X[3] = 0
    adata.X.eliminate_zeros()
    with caplog.at_level(logging.WARNING):
        cells = embedded(adata, checkpoint("a_70m_like"))
    assert np.isfinite(cells).all()
    assert adata.uns["tahoe_x1"]["cells_without_known_genes"] == 1
    assert "express no gene" in caplog.text


def test_bfloat16_is_close_to_float32(checkpoint) -> None:
    reference = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), dtype="float32")
    cells = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), dtype="bfloat16")
    assert (cells * reference).sum(1).min() > 0.999
    assert 0 < np.abs(cells - reference).max() < 2e-2


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
def test_types_are_torchs_too(checkpoint, name) -> None:
    if name == "int8":
        pytest.importorskip("torchao")
    reference = embedded(golden_cells("a_70m_like"), checkpoint("a_70m_like"), dtype=name)
    for dtype in (getattr(torch, name), f"torch.{name}"):
        adata = golden_cells("a_70m_like")
        np.testing.assert_array_equal(embedded(adata, checkpoint("a_70m_like"), dtype=dtype), reference)
    assert adata.uns["tahoe_x1"]["dtype"].startswith(name)


def test_weights_in_bfloat16_are_said_to_be(checkpoint, caplog) -> None:
    model, tokenizer = checkpoint("a_70m_like")
    adata = golden_cells("a_70m_like")
    with caplog.at_level(logging.WARNING):
        embedded(adata, (copy.deepcopy(model).to(torch.bfloat16), tokenizer), dtype="float32")
    assert "dtype=float32, but the model was loaded in torch.bfloat16, which is used" in caplog.text
    assert adata.uns["tahoe_x1"]["dtype"] == "bfloat16"


def test_embeddings_are_returned_and_nothing_is_written(checkpoint, tmp_path) -> None:
    adata = golden_cells("a_70m_like")
    wanted = embedded(adata.copy(), checkpoint("a_70m_like"))
    options = {"gene_id_column": "ensembl_id", "dtype": "float32", "progress": False, "return_array": True}
    found = embed_anndata(adata, *checkpoint("a_70m_like"), **options)
    assert (type(found), found.dtype) == (np.ndarray, np.float32)
    np.testing.assert_array_equal(found, wanted)
    assert not adata.obsm
    assert "tahoe_x1" not in adata.uns
    adata.write_h5ad(tmp_path / "cells.h5ad")
    view = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")[3:9]  # nothing could be written into it
    np.testing.assert_allclose(embed_anndata(view, *checkpoint("a_70m_like"), **options), wanted[3:9], atol=1e-6)
    with pytest.raises(ValueError, match="gene_embeddings='GE' are written into varm"):
        embed_anndata(adata, *checkpoint("a_70m_like"), **options, gene_embeddings="GE")


def test_deviations_are_returned_where_they_are_asked_for(checkpoint) -> None:
    adata = golden_cells("a_70m_like")
    options = {"gene_id_column": "ensembl_id", "dtype": "float32", "progress": False, "max_length": 64, "draws": 3}
    embeddings, deviations = embed_anndata(
        adata, *checkpoint("a_70m_like"), return_array=True, return_deviations=True, **options
    )
    assert "tahoe_x1_sd" not in adata.obs
    alone = embed_anndata(adata, *checkpoint("a_70m_like"), return_array=True, **options)
    with pytest.raises(ValueError, match="return_deviations goes with return_array=True"):
        embed_anndata(adata, *checkpoint("a_70m_like"), return_deviations=True, **options)
    embed_anndata(adata, *checkpoint("a_70m_like"), **options)
    for found in (embeddings, alone):
        np.testing.assert_array_equal(found, adata.obsm["X_tahoe_x1"])
    np.testing.assert_array_equal(deviations, adata.obs["tahoe_x1_sd"])
    assert deviations.dtype == np.float32
    assert deviations.max() > 0


def test_attention_backends_agree(checkpoint) -> None:
    model, tokenizer = checkpoint("a_70m_like")
    reference = embedded(golden_cells("a_70m_like"), (model, tokenizer))
    try:
        model.set_attn_implementation("eager")
        eager = embedded(golden_cells("a_70m_like"), (model, tokenizer))
    finally:
        model.set_attn_implementation("sdpa")
    np.testing.assert_allclose(eager, reference, atol=1e-6, rtol=0)


def test_an_interrupted_run_leaves_adata_as_it_was(checkpoint, monkeypatch) -> None:
    adata = golden_cells("a_70m_like")
    monkeypatch.setattr(CellEncoder, "begin", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embedded(adata, checkpoint("a_70m_like"))
    assert not adata.obsm
    assert not adata.uns


def test_errors_name_the_way_out(checkpoint) -> None:
    model, tokenizer = checkpoint("a_70m_like")
    adata = golden_cells("a_70m_like")
    with pytest.raises(ValueError, match=r"gene_id_column='id'.*'ensembl_id'"):
        embed_anndata(adata, model, tokenizer, gene_id_column="id", progress=False)
    wrong = {"batch_tokens": 0, "max_length": 2, "dtype": "float8", "hidden_layer": 4, "gene_embeddings": "XA"}
    for option, value in wrong.items():
        with pytest.raises(ValueError, match=option):
            embedded(adata, (model, tokenizer), **{option: value})
    for count in (49, 51):
        with pytest.raises(ValueError, match=f"drugs has {count} entries for 50 cells"):
            embedded(golden_cells("b_3b_like_chem"), checkpoint("b_3b_like_chem"), drugs=[None] * count)
    with pytest.raises(ValueError, match="different checkpoints"):
        embedded(adata, (model, checkpoint("b_3b_like_chem")[1]))
    assert not adata.obsm


def test_pooling_that_depends_on_padding_gives_a_warning(checkpoint, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        embedded(golden_cells("a_70m_like"), (checkpoint("a_70m_like")[0], checkpoint("a_70m_like")[1]))
        assert "mean_with_padding" not in caplog.text
        model, tokenizer = checkpoint("c_glu_post_gqa_avgpool")
        adata = golden_cells("a_70m_like")
        adata.var["known"] = [token for token in tokenizer.get_vocab() if token.startswith("ENSG")][:600]
        embed_anndata(adata, model, tokenizer, gene_id_column="known", progress=False)
    assert "mean_with_padding" in caplog.text


def test_batches_hold_every_cell_once_within_the_budget() -> None:
    lengths = np.array([5, 90, 17, 300, 17, 1, 44])
    batches = list(length_sorted_batches(lengths, 100))
    assert sorted(np.concatenate(batches)) == list(range(7))
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= 100 for rows in batches)


def test_auto_dtype_on_a_cpu_follows_the_hardware(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert choose_dtype("auto", cpu) == torch.bfloat16
    # As with ATEN_CPU_CAPABILITY=default, where torch's attention would end with an error.
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert choose_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert choose_dtype("auto", cpu) == torch.float32


def test_gene_means_equal_a_brute_force_loop() -> None:
    ids, hidden = torch.tensor([[1, 5, 3], [1, 3, 0]]), torch.randn(2, 3, 4)
    means = GeneMeans(np.array([3, -1, 5, 7, 3]), 10, 4, torch.device("cpu"))
    means.add(ids, hidden)
    result = means.means(np.array([3, -1, 5, 7, 3]))
    np.testing.assert_allclose(result[0], (hidden[0, 2] + hidden[1, 1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(result[0], result[4])
    np.testing.assert_allclose(result[2], hidden[0, 1], rtol=1e-6)
    assert np.isnan(result[[1, 3]]).all()


# Cells longer than the context ------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["sample", "highest"])
def test_a_cells_embedding_depends_on_the_cell_alone(checkpoint, overflow) -> None:
    """Not on its place, the other cells, the order of the genes, the batches, or what is compiled."""
    adata, model = golden_cells("a_70m_like"), checkpoint("a_70m_like")
    options = {"max_length": 40, "overflow": overflow}
    whole = embedded(adata.copy(), model, **options)
    order = np.random.default_rng(0).permutation(adata.n_obs)[:17]
    np.testing.assert_allclose(embedded(adata[order].copy(), model, **options), whole[order], atol=1e-6)
    genes = np.random.default_rng(1).permutation(adata.n_vars)
    np.testing.assert_allclose(embedded(adata[:, genes].copy(), model, **options), whole, atol=1e-6)
    np.testing.assert_allclose(embedded(adata.copy(), model, batch_tokens=100, **options), whole, atol=1e-6)
    assert np.abs(embedded(adata.copy(), model) - whole).max() > 1e-3  # genes were left out
    others = embedded(adata.copy(), model, seed=1, **options)
    assert np.array_equal(others, whole) == (overflow == "highest")


def test_means_over_samples_and_how_far_one_lies_from_them(checkpoint) -> None:
    adata, model = golden_cells("a_70m_like"), checkpoint("a_70m_like")
    lengths = np.asarray((adata.X > 0).sum(1)).ravel()
    context = int(np.median(lengths)) + 1
    fits = lengths <= context - 1
    assert 0 < fits.sum() < len(fits)
    found = embedded(adata, model, max_length=context, draws=4, seed=7, gene_embeddings=True)
    deviations = adata.obs["tahoe_x1_sd"].to_numpy()
    samples = []
    for number in range(4):
        one = golden_cells("a_70m_like")
        embedded(one, model, max_length=context, seed=sample_seed(7, number), gene_embeddings=number == 0)
        samples.append(one.obsm[KEY].astype(np.float64))
        if number == 0:
            np.testing.assert_array_equal(adata.varm[KEY], one.varm[KEY])
        assert "tahoe_x1_sd" not in one.obs
    means = np.mean(samples, axis=0)
    expected = np.sqrt(np.var(samples, axis=0, ddof=1).sum(1))
    np.testing.assert_allclose(found, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(deviations[~fits], expected[~fits], rtol=1e-4)
    assert (deviations[~fits] > 1e-3).all()
    assert (deviations[fits] == 0).all()
    np.testing.assert_array_equal(found[fits], samples[0][fits].astype(np.float32))  # one pass, the same bits


def test_options_for_long_cells_that_make_no_sense(checkpoint) -> None:
    adata, model = golden_cells("a_70m_like"), checkpoint("a_70m_like")
    for options, said in (
        ({"draws": 0}, "draws=0: pass the number of samples of a cell, at least 1"),
        ({"draws": 2, "overflow": "highest"}, "draws=2 averages random samples, and overflow='highest' takes none"),
        ({"overflow": "lowest"}, "overflow='lowest': pass one of"),
    ):
        with pytest.raises(ValueError, match=said):
            embedded(adata, model, **options)
    assert KEY not in adata.obsm


def test_gene_embeddings_of_counts_from_raw_have_no_place(checkpoint) -> None:
    adata = golden_cells("a_70m_like")
    adata.raw = adata.copy()
    adata = adata[:, :200].copy()
    with pytest.raises(ValueError, match=r"varm cannot hold gene embeddings of them: take adata.raw.to_adata"):
        embedded(adata, checkpoint("a_70m_like"), layer="raw", gene_embeddings=True)
