"""Cells go through transformers' pipelines, and models take their code with them."""

import json
import sys
import textwrap
from pathlib import Path

import anndata as ad
import forked
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from elsewhere import run_elsewhere
from helpers import tiny_config
from hub_server import Hub, serve
from tiny_tokenizer import GENES, write_tokenizer
from transformers import AutoModel, AutoTokenizer, pipeline

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1ForSequenceClassification, embed_anndata
from tahoex1_hf import pipeline_tahoe_x1 as ours
from tahoex1_hf.configuration_tahoe_x1 import AUTO_MAP, CODE_FILES, CUSTOM_PIPELINES, TOKENIZER_AUTO_MAP


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with drugs, and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(folder, drug_to_id={"<none>": 0, "Aspirin": 1, "Ibuprofen": 2}, context_length=24)
    torch.manual_seed(0)
    drugs = {"num_drugs": 3, "drug_fingerprint_size": 8, "drug_token_id": 2}
    model = TahoeX1ForPreTraining(tiny_config(vocab_size=43, **drugs))
    torch.nn.init.normal_(model.tahoe.embeddings.drug_encoder.embedding.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    """Return nine cells of 2 to 34 genes, so that some are longer than the context, and a column of drugs."""
    random = np.random.default_rng(0)
    counts = np.zeros((9, 40), dtype=np.float32)
    for row in range(9):
        counts[row, random.choice(40, 2 + 4 * row, replace=False)] = random.integers(1, 50, 2 + 4 * row)
    adata = ad.AnnData(sp.csr_matrix(counts))
    adata.var_names = GENES
    adata.obs["treatment"] = ["Aspirin", "", "Ibuprofen"] * 3
    return adata


def pairs(adata: ad.AnnData) -> list[tuple[list[str], list[float]]]:
    rows = [adata.X[i] for i in range(adata.n_obs)]
    return [([GENES[column] for column in row.indices], row.data.tolist()) for row in rows]


# cell-embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"drugs": "treatment"}, {"drugs": "Aspirin", "seed": 3}], ids=str)
def test_embeddings_are_those_of_embed_anndata(checkpoint, adata, monkeypatch, settings) -> None:
    before = adata.copy()
    wanted = embed_anndata(adata, checkpoint, dtype="float32", return_array=True, progress=False, **settings)
    pipe = pipeline("cell-embedding", model=str(checkpoint), device="cpu")
    monkeypatch.setattr(ours, "_CHUNK_ELEMENTS", 160)  # four cells at a time
    found = pipe(adata, batch_size=3, **settings)
    assert (found.dtype, found.shape) == (np.float32, (9, 32))
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=0)
    assert not adata.obsm
    assert adata.obs.equals(before.obs)
    if settings.get("drugs") == "treatment":
        assert np.abs(found - pipe(adata)).max() > 1e-3


def test_other_forms_of_cells(checkpoint, adata) -> None:
    pipe = pipeline("cell-embedding", model=str(checkpoint), device="cpu", batch_size=2)
    wanted = pipe(adata)
    for form in (adata.X.toarray(), adata.X.tocsc()):
        np.testing.assert_allclose(pipe(form, gene_ids=GENES), wanted, atol=1e-6, rtol=0)
    np.testing.assert_allclose(pipe(pairs(adata)), wanted, atol=1e-6, rtol=0)
    np.testing.assert_allclose(pipe(pairs(adata)[4]), wanted[4:5], atol=1e-6, rtol=0)
    parts = pipe([adata[:2], adata[2:]])
    np.testing.assert_allclose(np.concatenate(parts), wanted, atol=1e-6, rtol=0)
    for wrong, error, message in (
        ({"inputs": "text"}, TypeError, "embeds cells: pass an AnnData"),
        ({"inputs": adata.X}, ValueError, "gene_ids= is missing"),
        ({"inputs": adata, "layer": "counts"}, ValueError, "layer='counts' is not in adata.layers"),
        ({"inputs": adata, "layr": "counts"}, TypeError, "has no setting 'layr'"),
    ):
        with pytest.raises(error, match=message):
            pipe(**wrong)


# Other pipelines ----------------------------------------------------------------------------------


def test_feature_extraction_of_many_cells(checkpoint, adata) -> None:
    pipe = pipeline("feature-extraction", model=str(checkpoint), device="cpu")
    model, tokenizer = AutoModel.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(adata, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
    cells = [adata[i] for i in range(9)]
    for found in (pipe(pairs(adata), batch_size=4), pipe(cells), pipe(iter_cells for iter_cells in cells)):
        for row, features in enumerate(found):
            length = int(batch["attention_mask"][row].sum())
            np.testing.assert_allclose(np.array(features)[0, :length], wanted[row, :length], atol=1e-5)
    whole = pipe(adata, return_tensors=True, tokenize_kwargs={"padding": True})
    torch.testing.assert_close(whole, wanted, atol=1e-5, rtol=0)
    short = pipe(pairs(adata), truncation=True, tokenize_kwargs={"max_length": 8})
    assert [len(features[0]) for features in short] == [3, 7] + [8] * 7


def test_classification_of_cells(checkpoint, adata, tmp_path) -> None:
    names = {0: "B", 1: "T", 2: "NK"}
    model = TahoeX1ForSequenceClassification.from_pretrained(checkpoint, id2label=names)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    pipe = pipeline("text-classification", model=str(tmp_path), device="cpu")
    batch = pipe.tokenizer(adata, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval()(**batch).logits.softmax(1)
    for found in (pipe(pairs(adata), batch_size=4), pipe([adata[i] for i in range(9)])):
        assert [row["label"] for row in found] == [names[int(row.argmax())] for row in wanted]
        np.testing.assert_allclose([row["score"] for row in found], wanted.max(1).values, atol=1e-5)


# Code that travels --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_folder_with_code_is_a_pipeline_anywhere(checkpoint, adata, tmp_path) -> None:
    model, tokenizer = AutoModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "repo", with_code=True)
    tokenizer.save_pretrained(tmp_path / "repo", with_code=True)
    assert {path.name for path in (tmp_path / "repo").glob("*.py")} == set(CODE_FILES)
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    assert (config["auto_map"], config["custom_pipelines"]) == (AUTO_MAP, CUSTOM_PIPELINES)
    assert json.loads((tmp_path / "repo" / "tokenizer_config.json").read_text())["auto_map"] == TOKENIZER_AUTO_MAP
    wanted = pipeline("cell-embedding", model=str(checkpoint), device="cpu")(adata, drugs="treatment")
    here = pipeline(model=str(tmp_path / "repo"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(here(adata, drugs="treatment"), wanted, atol=1e-6, rtol=0)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    run_elsewhere(
        """
        import anndata, numpy
        from transformers import AutoConfig, pipeline
        pipe = pipeline(model="repo", trust_remote_code=True, device="cpu")
        assert type(pipe.model).__module__.startswith("transformers_modules."), type(pipe.model)
        numpy.save("found.npy", pipe(anndata.read_h5ad("cells.h5ad"), drugs="treatment"))
        pipe.model.save_pretrained("model")  # without the pipeline's file it names none
        assert not hasattr(AutoConfig.from_pretrained("model", trust_remote_code=True), "custom_pipelines")
        pipe.save_pretrained("again")
        assert pipeline(model="again", trust_remote_code=True, device="cpu").task == "cell-embedding"
        """,
        tmp_path,
    )
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), wanted, atol=1e-6, rtol=0)


def test_code_is_named_in_what_is_saved_with_it_alone(checkpoint, tmp_path) -> None:
    model, tokenizer = AutoModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "with", with_code=True)
        saved.save_pretrained(tmp_path / "without")
    assert not list((tmp_path / "without").glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" in json.loads((tmp_path / "with" / name).read_text())
        assert "auto_map" not in json.loads((tmp_path / "without" / name).read_text())
    # What was loaded with code, and trained further, takes it along: it would not load without.
    AutoModel.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "further")
    assert {path.name for path in (tmp_path / "further").glob("*.py")} == set(CODE_FILES)


def test_a_pipeline_saves_all_that_it_needs(checkpoint, adata, tmp_path) -> None:
    pipe = pipeline("cell-embedding", model=str(checkpoint), device="cpu")
    for number in range(2):  # what was loaded by its name in config.json can be saved again
        pipe.save_pretrained(tmp_path / str(number))
        assert {path.name for path in (tmp_path / str(number)).glob("*.py")} == set(CODE_FILES)
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["custom_pipelines"] == CUSTOM_PIPELINES
        pipe = pipeline(model=str(tmp_path / str(number)), trust_remote_code=True, device="cpu")
    assert pipe(adata).shape == (9, 32)


def test_pushing_with_code(checkpoint, tmp_path) -> None:
    hub, script = (
        Hub(),
        """
        import sys
        from transformers import AutoModel, AutoTokenizer
        import tahoex1_hf
        model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModel, AutoTokenizer))
        model.push_to_hub("someone/cells", with_code=True)
        tokenizer.push_to_hub("someone/cells", with_code=True)
        model.save_pretrained("cells", push_to_hub=True, repo_id="someone/saved", with_code=True)
    """,
    )
    with serve(hub):
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        environment = forked.environment(**online, HF_HOME=str(tmp_path / "home"))
        command = [sys.executable, "-c", textwrap.dedent(script), checkpoint]
        run = forked.run(command, environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    files = {"config.json", "model.safetensors", *CODE_FILES}
    assert {*files, "tokenizer_config.json", "vocab.json"} <= hub.repos["someone/cells"].keys()
    assert files <= hub.repos["someone/saved"].keys()
