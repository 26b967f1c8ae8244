"""`tahoex1 predict` writes the right files, and a cell's prediction depends on the cell alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from cells import GENES, as_mouse
from finetuning_runs import KINDS, labelled_cells, make_config, write_base
from helpers import tiny_model
from scipy.sparse import csc_matrix, csr_matrix
from typer.testing import CliRunner, Result

from tahoex1_hf import TahoeX1Config, TahoeX1ForSequenceClassification, TahoeX1Tokenizer
from tahoex1_hf.cli.app import app
from tahoex1_hf.encoding_tahoe_x1 import GeneRows, sample_seed
from tahoex1_hf.finetuning.cells.predicting import predict_anndata, predict_files
from tahoex1_hf.finetuning.cells.predictor import load_predictor
from tahoex1_hf.finetuning.running import finetune
from tahoex1_hf.hub.adapters import load_adapter
from tahoex1_hf.hub.models import without_peft

COLUMN = "tahoex1_kind"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write cells; many are longer than the fine-tuned models' context, and one has no known gene."""
    adata = labelled_cells(100)
    counts = adata.X.toarray()
    counts[7] = 0
    adata.X = csr_matrix(counts)
    adata.layers["counts"], adata.uns["note"] = adata.X.copy(), {"by": "someone"}
    adata.obsm["X_pca"] = np.ones((100, 2), dtype=np.float32)
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def tuned(base: Path, data: Path, folder: Path, **changes: Any) -> Path:
    usual = {"context_length": 16, "epochs": 6, "early_stopping_patience": None}
    assert finetune(make_config(base, data, folder, **{**usual, **changes})) == 0
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(base, data, tmp_path_factory.mktemp("adapters") / "kind")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def predict(source: Path, output: Path, *more: object) -> anndata.AnnData:
    result = run(source, output, "--dtype", "float32", *more)
    assert result.exit_code == 0, result.output
    return anndata.read_h5ad(output)


def probabilities(adata: anndata.AnnData, column: str = COLUMN) -> np.ndarray:
    return np.asarray(adata.obsm[f"{column}_probabilities"])


def test_output_is_the_input_plus_predictions(data: Path, adapter: Path, tmp_path: Path) -> None:
    before, source = data.read_bytes(), anndata.read_h5ad(data)
    result = predict(data, tmp_path / "out.h5ad", "--adapter", adapter)
    assert data.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out.h5ad"}
    pd.testing.assert_frame_equal(result.obs.drop(columns=COLUMN), source.obs)
    assert (result.X != source.X).nnz == 0
    assert (result.layers["counts"] != source.X).nnz == 0
    assert result.uns["note"] == {"by": "someone"}
    assert set(result.obsm) == {"X_pca", f"{COLUMN}_probabilities"}
    chances, facts = probabilities(result), result.uns[COLUMN]
    assert facts["classes"].tolist() == KINDS
    np.testing.assert_allclose(chances.sum(1), 1, atol=1e-6)
    predicted = result.obs[COLUMN]
    assert predicted.cat.categories.tolist() == KINDS
    assert predicted.tolist() == [KINDS[k] for k in chances.argmax(1)]
    assert (predicted.astype(str) == source.obs["kind"].astype(str)).mean() > 0.8  # it has learnt something
    assert facts["adapter"] == str(adapter)
    assert facts["label"] == "kind"
    assert facts["max_length"] == 16
    assert facts["cells_without_known_genes"] == 1


def test_predictions_equal_the_models(data: Path, adapter: Path, tmp_path: Path) -> None:
    """Each cell goes through `forward` alone, without our batching."""
    result = predict(data, tmp_path / "out.h5ad", "--adapter", adapter)
    model, tokenizer = load_adapter(adapter)
    counts = csr_matrix(anndata.read_h5ad(data).X)
    genes = tokenizer.match_genes(GENES)
    for row in (0, 7, 42, 99):
        cell = counts[row]
        tokens = genes.token_ids[cell.indices]
        encoded = tokenizer.encode_rows(GeneRows(tokens, cell.data, np.array([0, len(tokens)])), seed=0)
        batch = encoded.padded(pad_token_id=tokenizer.pad_token_id, pad_value=tokenizer.pad_value)
        with torch.no_grad():
            expected = model(**batch).logits.softmax(1)[0].numpy()
        np.testing.assert_allclose(probabilities(result)[row], expected, atol=1e-5)


def test_predictions_that_are_not_finite_name_the_cell(data: Path, adapter: Path) -> None:
    model, tokenizer = load_adapter(adapter)
    head = without_peft(model).classifier
    with torch.no_grad():
        for parameter in head.parameters():  # finite, and too large to compute with
            parameter.fill_(3e38)
    cells = anndata.read_h5ad(data)
    with pytest.raises(ValueError, match=rf"NaN or infinite values for cell '{cells.obs_names[0]}' \(number 0"):
        predict_anndata(cells, model, tokenizer=tokenizer, progress=False, dtype="float32")
    assert "tahoex1_kind" not in cells.obs


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_batches_change_nothing(data: Path, adapter: Path, tmp_path: Path, batch_tokens: int) -> None:
    expected = probabilities(predict(data, tmp_path / "a.h5ad", "--adapter", adapter))
    other = predict(data, tmp_path / "b.h5ad", "--adapter", adapter, "--batch-tokens", batch_tokens)
    np.testing.assert_allclose(probabilities(other), expected, atol=1e-6)


def test_order_and_other_cells_change_nothing(
    data: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = probabilities(predict(data, tmp_path / "a.h5ad", "--adapter", adapter))
    source = anndata.read_h5ad(data)
    assert (np.diff(source.X.indptr) > 15).any()  # cells of which genes are chosen
    order = np.random.default_rng(0).permutation(100)[:60]
    source[order].copy().write_h5ad(tmp_path / "shuffled.h5ad")
    monkeypatch.setattr("tahoex1_hf.cells.encoding.CHUNK_CELLS", 7)
    monkeypatch.setattr("tahoex1_hf.cells.readers.base._ELEMENTS_FOR_CHUNKS", 300)
    shuffled = predict(tmp_path / "shuffled.h5ad", tmp_path / "b.h5ad", "--adapter", adapter)
    np.testing.assert_allclose(probabilities(shuffled), expected[order], atol=1e-6)


@pytest.mark.parametrize("kind", ["csc", "dense", "layer"])
def test_counts_wherever_they_are(data: Path, adapter: Path, tmp_path: Path, kind: str) -> None:
    expected = probabilities(predict(data, tmp_path / "a.h5ad", "--adapter", adapter))
    source = anndata.read_h5ad(data)
    source.X = {"csc": csc_matrix, "dense": lambda x: x.toarray(), "layer": lambda x: x * 0}[kind](source.X)
    source.write_h5ad(tmp_path / "in.h5ad")
    options = ["--layer", "counts"] if kind == "layer" else []
    other = predict(tmp_path / "in.h5ad", tmp_path / "b.h5ad", "--adapter", adapter, *options)
    np.testing.assert_allclose(probabilities(other), expected, atol=1e-6)


def test_settings_of_the_training_are_used(base: Path, data: Path, tmp_path: Path) -> None:
    source = anndata.read_h5ad(data)
    source.var["id"], source.var_names = GENES, [f"name{i}" for i in range(len(GENES))]
    source.X = source.X * 0
    source.write_h5ad(tmp_path / "in.h5ad")
    folder = tuned(
        base, tmp_path / "in.h5ad", tmp_path / "model", layer="counts", gene_id_column="id", method="linear_probe"
    )
    here = predict(tmp_path / "in.h5ad", tmp_path / "a.h5ad", "--adapter", folder)
    # A file with another layout: without the training's settings, "" would be used.
    there = predict(data, tmp_path / "b.h5ad", "--adapter", folder, "--layer", "", "--gene-id-column", "")
    np.testing.assert_allclose(probabilities(there), probabilities(here), atol=1e-6)
    assert probabilities(here).std() > 0.05


def test_a_whole_model(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tuned(base, data, tmp_path / "model", method="full", epochs=1)
    found = predict(data, tmp_path / "a.h5ad", "--model", folder)
    # transformers alone wrote this folder, so the classes have names, but the label has none.
    model = TahoeX1ForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "plain")
    TahoeX1Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    plain = predict(data, tmp_path / "b.h5ad", "--model", tmp_path / "plain")
    np.testing.assert_allclose(probabilities(plain, "tahoex1_prediction"), probabilities(found), atol=1e-6)
    assert plain.uns["tahoex1_prediction"]["classes"].tolist() == KINDS


def test_a_number(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tuned(base, data, tmp_path / "model", task="regression", label="dose", method="linear_probe")
    found = predict(data, tmp_path / "a.h5ad", "--adapter", folder)
    assert found.obs["tahoex1_dose"].dtype == np.float32
    assert np.corrcoef(found.obs["tahoex1_dose"], found.obs["dose"])[0, 1] > 0.7
    assert 100 < found.obs["tahoex1_dose"].mean() < 200  # in the label's own unit
    assert set(found.obsm) == {"X_pca"}
    assert "classes" not in found.uns["tahoex1_dose"]


def test_predictions_equal_those_of_the_report(base: Path, data: Path, tmp_path: Path) -> None:
    """The command predicts for the test cells what the run predicted."""
    folder = tuned(base, data, tmp_path / "model", epochs=2)
    with np.load(folder / "result.npz") as arrays:
        rows, logits = arrays["test"], arrays["outputs"]
    found = predict(data, tmp_path / "a.h5ad", "--adapter", folder)
    expected = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_allclose(probabilities(found)[rows], expected, atol=1e-5)


def test_in_place_and_again(data: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    shutil.copyfile(data, path)
    first = predict(path, path, "--adapter", adapter)
    again = predict(path, path, "--adapter", adapter)
    np.testing.assert_array_equal(probabilities(again), probabilities(first))
    assert list(again.obs.columns) == list(first.obs.columns)
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_obs_of_an_old_anndata(data: Path, adapter: Path, tmp_path: Path) -> None:
    """anndata 0.7 kept categories apart; new columns are written as later versions do."""
    shutil.copyfile(data, tmp_path / "old.h5ad")
    source = anndata.read_h5ad(data)
    with h5py.File(tmp_path / "old.h5ad", "r+") as file:
        obs = file["obs"]
        codes, names = obs["kind/codes"][:], obs["kind/categories"].asstr()[:]
        del obs["kind"]
        obs["kind"] = codes
        obs["__categories/kind"] = names.astype(object)
        obs["__categories/kind"].attrs["ordered"] = False
        obs["kind"].attrs["categories"] = obs["__categories/kind"].ref
        obs.attrs["encoding-version"] = "0.1.0"
    result = predict(tmp_path / "old.h5ad", tmp_path / "out.h5ad", "--adapter", adapter)
    expected = predict(data, tmp_path / "new.h5ad", "--adapter", adapter)
    assert result.obs[COLUMN].tolist() == expected.obs[COLUMN].tolist()
    assert result.obs["kind"].tolist() == source.obs["kind"].tolist()
    assert result.obs_names.tolist() == source.obs_names.tolist()


@pytest.mark.parametrize("way", ["folder", "adapter", "whole"])
def test_cells_in_memory_are_predicted_like_those_of_a_file(
    way: str, data: Path, adapter: Path, tmp_path: Path
) -> None:
    expected = predict(data, tmp_path / "out.h5ad", "--adapter", adapter)
    adata = anndata.read_h5ad(data)
    options: dict[str, Any] = {"dtype": "float32", "progress": False}
    if way == "folder":
        assert predict_anndata(adata, adapter, **options) == COLUMN
        assert adata.obs[COLUMN].tolist() == expected.obs[COLUMN].tolist()
        assert adata.uns[COLUMN]["classes"].tolist() == KINDS
        assert adata.uns[COLUMN]["label"] == "kind"
        found = probabilities(adata)
        adata.write_h5ad(tmp_path / "written.h5ad")
    else:
        model, tokenizer = load_adapter(adapter)
        model = model if way == "adapter" else model.merge_and_unload()
        column = predict_anndata(adata, model, tokenizer=tokenizer, **options)
        assert column == "tahoex1_prediction"  # a loaded model does not name the label
        found = probabilities(adata, column)
        with pytest.raises(ValueError, match="tokenizer is missing"):
            predict_anndata(adata, model, **options)
    np.testing.assert_allclose(found, probabilities(expected), atol=1e-5)


def test_cells_of_a_mouse_by_a_table_of_orthologues(data: Path, adapter: Path, tmp_path: Path) -> None:
    expected = probabilities(predict(data, tmp_path / "a.h5ad", "--adapter", adapter))
    mouse, translated = as_mouse(anndata.read_h5ad(data), tmp_path)
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    options = [part for name, value in translated.items() for part in (f"--{name}", value)]
    found = predict(tmp_path / "mouse.h5ad", tmp_path / "b.h5ad", "--adapter", adapter, *options)
    np.testing.assert_array_equal(probabilities(found), expected)
    refused = run(tmp_path / "mouse.h5ad", tmp_path / "c.h5ad", "--adapter", adapter)
    assert refused.exit_code == 1
    assert "--species mouse" in " ".join(refused.output.split())


def test_samples_of_long_cells_are_averaged(data: Path, adapter: Path, tmp_path: Path) -> None:
    """What is written is the mean of the predictions for each sample, which the seed of each gives by itself."""
    found = predict(data, tmp_path / "a.h5ad", "--adapter", adapter, "--draws", 3)
    source, options = anndata.read_h5ad(data), {"dtype": "float32", "progress": False}
    one = source.copy()
    predict_anndata(one, adapter, **options)
    assert f"{COLUMN}_sd" not in one.obs
    predict_anndata(source, adapter, draws=3, **options)
    np.testing.assert_array_equal(probabilities(source), probabilities(found))
    deviations = source.obs[f"{COLUMN}_sd"].to_numpy()
    np.testing.assert_array_equal(deviations, found.obs[f"{COLUMN}_sd"])
    assert found.uns[COLUMN]["draws"] == 3
    long = np.diff(source.X.indptr) > 15
    assert 0 < long.sum() < len(long)
    np.testing.assert_array_equal(probabilities(source)[~long], probabilities(one)[~long])
    assert (deviations[~long] == 0).all()
    assert (deviations[long] > 0).mean() > 0.9
    samples = []
    for number in range(3):
        model, tokenizer = load_adapter(adapter)
        genes, counts = tokenizer.match_genes(GENES), csr_matrix(source.X)[long]
        tokens, keep = genes.token_ids[counts.indices], genes.token_ids[counts.indices] >= 0
        assert keep.all()
        rows = GeneRows(tokens, counts.data, counts.indptr.astype(np.int64))
        encoded = tokenizer.encode_rows(rows, seed=sample_seed(0, number))
        batch = encoded.padded(pad_token_id=tokenizer.pad_token_id, pad_value=tokenizer.pad_value)
        with torch.no_grad():
            samples.append(model(**batch).logits.double().softmax(1).numpy())
    np.testing.assert_allclose(probabilities(source)[long], np.mean(samples, 0), atol=1e-5)
    expected = np.sqrt(np.var(samples, 0, ddof=1).sum(1))
    np.testing.assert_allclose(deviations[long], expected, atol=1e-5)


def test_the_samples_of_a_number_are_averaged(data: Path, adapter: Path, tmp_path: Path) -> None:
    """A head of one output predicts a number, whose mean and deviation are written."""
    base = load_predictor(adapter)
    config = TahoeX1Config(**{**base.model.config.to_dict(), "num_labels": 1, "problem_type": "regression"})
    model = tiny_model(config, TahoeX1ForSequenceClassification)
    cells = anndata.read_h5ad(data)
    options = {"tokenizer": base.tokenizer, "dtype": "float32", "progress": False}
    column = predict_anndata(cells, model, draws=4, **options)
    assert cells.obs[column].dtype == cells.obs[f"{column}_sd"].dtype == np.float32
    long = np.diff(cells.X.indptr) > 15
    assert (cells.obs[f"{column}_sd"][long] > 0).mean() > 0.9
    again = cells.copy()
    predict_anndata(again, model, **options)
    off = np.abs(again.obs[column] - cells.obs[column])
    assert (off[~long] == 0).all()
    assert 0 < off[long].max() < 4 * cells.obs[f"{column}_sd"].max()


@pytest.mark.parametrize("overflow", ["highest", "first"])
def test_other_genes_of_long_cells(overflow: str, data: Path, adapter: Path, tmp_path: Path) -> None:
    found = predict(data, tmp_path / "a.h5ad", "--adapter", adapter, "--overflow", overflow)
    sampled = predict(data, tmp_path / "b.h5ad", "--adapter", adapter, "--overflow", "sample")
    assert found.uns[COLUMN]["overflow"] == overflow
    model, tokenizer = load_adapter(adapter)
    tokenizer.overflow = overflow
    cells = anndata.read_h5ad(data)
    predict_anndata(cells, model, tokenizer=tokenizer, dtype="float32", progress=False)
    expected = probabilities(cells, "tahoex1_prediction")
    np.testing.assert_allclose(probabilities(found), expected, atol=1e-6)
    assert np.abs(probabilities(sampled) - expected).max() > 1e-3
    refused = run(data, tmp_path / "c.h5ad", "--adapter", adapter, "--overflow", overflow, "--draws", 2)
    assert refused.exit_code == 1
    assert f"draws=2 averages random samples, and overflow='{overflow}' takes none" in refused.output


def test_the_size_of_a_base_by_name(base: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter's base may be one of several sizes in a folder or repository."""
    several = tmp_path / "several"
    shutil.copytree(base, several / "70m")
    write_base(several / "3b", hidden_size=64)
    expected = probabilities(predict(data, tmp_path / "a.h5ad", "--adapter", adapter))
    options = ["--adapter", adapter, "--base", several, "--size"]
    found = predict(data, tmp_path / "b.h5ad", *options, "70m")
    np.testing.assert_array_equal(probabilities(found), expected)
    model, _ = load_adapter(adapter, several, size="70m")
    assert model.config.hidden_size == 32
    cells = anndata.read_h5ad(data)
    predict_anndata(cells, adapter, base=several, size="70m", dtype="float32", progress=False)
    np.testing.assert_array_equal(probabilities(cells), expected)
    for size, message in (("3b", "another size or vocabulary"), ("1b", "has the sizes 3b, 70m")):
        refused = run(data, tmp_path / "c.h5ad", *options, size)
        assert refused.exit_code == 1
        assert message in " ".join(refused.output.split())
    loaded = TahoeX1ForSequenceClassification.from_pretrained(base, num_labels=3)
    for given in (
        lambda: predict_anndata(cells, model, size="70m"),
        lambda: load_adapter(adapter, loaded, size="70m"),
    ):
        with pytest.raises(ValueError, match="is loaded already: leave it out"):
            given()


# Errors -----------------------------------------------------------------------------------------------


def test_a_failure_leaves_nothing_behind(
    data: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("tahoex1_hf.finetuning.cells.prediction_output.PredictionWriter.finish", fail)
    result = run(data, tmp_path / "out.h5ad", "--adapter", adapter)
    assert result.exit_code == 1
    assert "Error: the disk is full" in result.output
    assert not list(tmp_path.iterdir())


def test_arguments_that_cannot_be_used(data: Path, adapter: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5ad"
    for arguments, message in (
        ([data, out], "pass --adapter, or --model"),
        ([data, out, "--adapter", adapter, "--model", base], "pass --adapter, or --model"),
        ([data, out, "--model", base, "--base", base], "--base goes with --adapter"),
        ([tmp_path / "no.h5ad", out, "--adapter", adapter], "does not exist"),
        ([data, tmp_path / "out.csv", "--adapter", adapter], "must be an .h5ad file"),
        ([data, tmp_path / "no" / "out.h5ad", "--adapter", adapter], "folder"),
        ([data, out, "--adapter", tmp_path / "nothing"], "neither a folder nor a Hub repository"),
        ([data, out, "--model", base], "has no head to predict with"),
        ([data, out, "--adapter", adapter, "--layer", "spliced"], "spliced"),
        ([data, out, "--adapter", adapter, "--gene-id-column", "ensembl"], "ensembl"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, arguments
        assert message in result.output.replace("\n", " "), result.output
        assert "Traceback" not in result.output
    assert not out.exists()


def test_an_adapter_of_another_task_or_size(base: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    record = json.loads((other / "finetuning.json").read_text())
    changed = {**record, "task": "masked_expression", "model_class": "TahoeX1ForPreTraining"}
    (other / "finetuning.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="was trained for masked_expression"):
        load_predictor(other)
    wider = write_base(tmp_path / "wider", hidden_size=64)
    with pytest.raises(ValueError, match="another size or vocabulary"):
        load_predictor(adapter, base=wider)
    assert TahoeX1Config.from_pretrained(base).hidden_size == 32


def test_a_progress_bar_counts_cells(data: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    assert predict_files(data, tmp_path / "out.h5ad", adapter, dtype="float32") == COLUMN
    assert "100/100" in capsys.readouterr().err
    predict_files(data, tmp_path / "out.h5ad", adapter, dtype="float32", progress=False)
    assert "Predicting" not in capsys.readouterr().err


def test_models_with_drugs(data: Path, tmp_path: Path) -> None:
    """A prediction uses the drug of the training; another drug changes it."""
    from cells import write_vocab
    from helpers import tiny_config

    vocab = write_vocab(tmp_path / "vocab", drug_token=True)
    tokenizer = TahoeX1Tokenizer(vocab, context_length=48, drug_to_id={"<pad>": 0, "aspirin": 1, "taxol": 2})
    drug_token = tokenizer.get_vocab()["<drug>"]
    config = tiny_config(
        vocab_size=len(tokenizer), num_drugs=3, drug_fingerprint_size=16, drug_token_id=drug_token, num_labels=3
    )
    model = tiny_model(config, TahoeX1ForSequenceClassification)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = [
        probabilities(
            predict(data, tmp_path / "out.h5ad", "--model", tmp_path / "model", "--drugs", drug), "tahoex1_prediction"
        )
        for drug in ("aspirin", "taxol", "aspirin")
    ]
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 1e-4
    cells = anndata.read_h5ad(data)
    cells.obs["drug"] = ["aspirin ", "DMSO_TF"] * (cells.n_obs // 2)
    cells.write_h5ad(tmp_path / "treated.h5ad")
    options = ["--model", tmp_path / "model", "--drugs", "drug"]
    refused = run(tmp_path / "treated.h5ad", tmp_path / "x.h5ad", *options)
    assert refused.exit_code == 1
    assert "'DMSO_TF' is not in the drug table" in refused.output
    padded = predict(tmp_path / "treated.h5ad", tmp_path / "out.h5ad", *options, "--unknown-drugs", "pad")
    np.testing.assert_array_equal(probabilities(padded, "tahoex1_prediction")[::2], found[0][::2])
