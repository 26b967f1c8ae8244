"""Drugs that a model does not know get their fingerprint as a row of its drug table."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import GOLDEN
from finetuning_runs import labelled_cells, write_base
from safetensors.torch import load_file
from typer.testing import CliRunner

from tahoex1_hf import (
    TahoeX1ForSequenceClassification,
    TahoeX1Model,
    TahoeX1Tokenizer,
    embed_anndata,
    embed_files,
    predict_anndata,
)
from tahoex1_hf.cli.app import app
from tahoex1_hf.original.convert import convert_original_folder
from tahoex1_hf.original.reference import OriginalForward
from tahoex1_hf.runs.new_drugs import with_new_drugs

pytest.importorskip("rdkit", reason="rdkit is not installed (extra drugs)")

ASPIRIN, CAFFEINE = "CC(=O)OC1=CC=CC=C1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"
METHYL_ASPIRIN = "CC(=O)OC1=CC=CC=C1C(=O)OC"
GOLDEN_MODEL = GOLDEN / "b_3b_like_chem" / "model"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "3b"
    convert_original_folder(GOLDEN_MODEL, folder)
    return folder


def cells(drugs: list[str]) -> anndata.AnnData:
    found = anndata.read_h5ad(GOLDEN / "b_3b_like_chem" / "adata.h5ad")[: len(drugs)].copy()
    found.obs["drug"] = drugs
    return found


def write_table(path: Path, rows: list[tuple[Any, Any]], columns: tuple[str, str] = ("drug", "smiles")) -> Path:
    pd.DataFrame(rows, columns=list(columns)).to_csv(path, index=False)
    return path


def embedded(adata: anndata.AnnData, model: Any, **options: Any) -> np.ndarray:
    embed_anndata(adata, model, gene_id_column="ensembl_id", drugs="drug", dtype="float32", progress=False, **options)
    return adata.obsm["X_tahoe_x1"]


def fingerprint(smiles: str, bits: int) -> np.ndarray:
    """Return a fingerprint by another way into rdkit than the package's."""
    from rdkit.Chem import AllChem, MolFromSmiles, rdBase

    with rdBase.BlockLogs():  # it is an old way
        found = AllChem.GetMorganFingerprintAsBitVect(MolFromSmiles(smiles), 2, nBits=bits)
    return np.array(found, dtype=np.float32)


def by_the_original(adata: anndata.AnnData, rows: np.ndarray, ids: list[int]) -> np.ndarray:
    """Compute embeddings in plain torch, with further rows in the checkpoint's drug table."""
    tensors = load_file(GOLDEN_MODEL / "model.safetensors")
    table = "model.chem_encoder.embedding.weight"
    tensors[table] = torch.cat([tensors[table], torch.from_numpy(rows)])
    settings = yaml.safe_load((GOLDEN_MODEL / "model_config.yml").read_text())
    vocabulary = json.loads((GOLDEN_MODEL / "vocab.json").read_text())
    forward = OriginalForward(settings, vocabulary["<pad>"], tensors.__getitem__, set(tensors))
    # The tokens come from our tokenizer: the golden tests check those.
    tokenizer = TahoeX1Tokenizer.from_pretrained(GOLDEN_MODEL)
    encoded = tokenizer(
        adata, gene_id_column="ensembl_id", drugs=[""] * adata.n_obs, padding=True, return_tensors="pt"
    )
    genes, values = encoded["input_ids"], encoded["expression_values"]
    cell = forward(genes, values, torch.zeros_like(genes, dtype=torch.bool), torch.tensor(ids))["cell"]
    return torch.nn.functional.normalize(cell, dim=1).numpy()


def test_a_new_drug_is_its_fingerprint_and_the_model_stays_as_it_is(converted: Path, tmp_path: Path) -> None:
    adata = cells(["new", " other ", "new", ""])
    rows = np.stack([fingerprint(ASPIRIN, 128), fingerprint(CAFFEINE, 128)])
    assert rows.sum() > 20
    expected = by_the_original(adata, rows, [20, 21, 20, 0])
    path = write_table(tmp_path / "mine.csv", [(" new", ASPIRIN), ("other", CAFFEINE), ("none", None)])
    before = {file.name: file.read_bytes() for file in converted.iterdir()}
    assert np.abs(embedded(adata, converted, drug_table=path) - expected).max() < 1e-6
    assert {file.name: file.read_bytes() for file in converted.iterdir()} == before
    facts = adata.uns["tahoe_x1"]
    assert (facts["drug_table"], facts["new_drugs"]) == ("mine.csv", 2)
    # A loaded model and its tokenizer stay as they are; a mapping does what a file does.
    model, tokenizer = TahoeX1Model.from_pretrained(converted), TahoeX1Tokenizer.from_pretrained(converted)
    smiles = {"new": ASPIRIN, "other": CAFFEINE}
    again = embedded(adata, model, tokenizer=tokenizer, drug_table=smiles)
    assert np.abs(again - expected).max() < 1e-6
    assert adata.uns["tahoe_x1"]["drug_table_digest"] == facts["drug_table_digest"]
    assert model.config.num_drugs == len(model.embeddings.drug_encoder.embedding.weight) == 20
    assert "new" not in (tokenizer.drug_to_id or {})
    taught, _, _ = with_new_drugs(model, tokenizer, smiles, "drug")
    assert taught.layers[0].mlp.up_proj.weight is model.layers[0].mlp.up_proj.weight
    without = embedded(adata, model, tokenizer=tokenizer, unknown_drugs="pad")
    assert np.abs(without - expected)[:3].max() > 0.01
    np.testing.assert_allclose(without[3], expected[3], atol=1e-6)


def test_a_similar_compound_gets_a_similar_vector(converted: Path) -> None:
    smiles = {"aspirin": ASPIRIN, "its ester": METHYL_ASPIRIN, "caffeine": CAFFEINE}
    tokenizer = TahoeX1Tokenizer.from_pretrained(converted)
    model, taught, _ = with_new_drugs(TahoeX1Model.from_pretrained(converted), tokenizer, smiles, "drug")
    with torch.no_grad():
        vectors = model.embeddings.drug_encoder(torch.tensor([taught.drug_table.find(name) for name in smiles]))
    near, far = (torch.dist(vectors[0], vectors[other]) for other in (1, 2))
    assert near < far


def test_the_models_own_drugs_keep_their_rows_unless_they_are_others(converted: Path) -> None:
    model, tokenizer = TahoeX1Model.from_pretrained(converted), TahoeX1Tokenizer.from_pretrained(converted)
    table = model.embeddings.drug_encoder.embedding.weight.detach()
    name = next(name for name, number in tokenizer.drug_to_id.items() if number == 3)
    table[3] = torch.from_numpy(fingerprint(ASPIRIN, 128)) + 0.1  # as training moves it
    taught, known, new = with_new_drugs(model, tokenizer, {f" {name} ": ASPIRIN}, "drug")
    assert taught is model
    assert known.drug_to_id == tokenizer.drug_to_id
    assert new is not None
    assert not new.fingerprints
    with pytest.raises(ValueError, match=f"knows a drug '{name}', whose row is not the fingerprint of this SMILES"):
        with_new_drugs(model, tokenizer, {name: CAFFEINE}, "drug")


@pytest.mark.parametrize(
    ("table", "drugs", "said"),
    [
        ({"new": ASPIRIN}, None, r"pass that, too"),
        ({"new": "C1CC", "other": "x"}, "drug", r"2 SMILES .*row 0, 'new': 'C1CC'; row 1, 'other': 'x'"),
        ({"<pad>": ASPIRIN}, "drug", r"row 0 names a drug '<pad>'"),
        ([("new", ASPIRIN), ("new ", CAFFEINE)], "drug", r"t.csv: 'new' occurs twice, .* in row 1,"),
        ([("new", ASPIRIN), (None, CAFFEINE)], "drug", r"t.csv: row 1 names no drug"),
        (("name", "smiles"), "drug", r"t.csv has no column 'drug', only \['name', 'smiles'\]"),
        (("drug", "structure"), "drug", r"t.csv has no column 'canonical_smiles' \(or 'smiles'\), only"),
    ],
)
def test_tables_that_cannot_be_used(converted: Path, tmp_path: Path, table: Any, drugs: Any, said: str) -> None:
    if isinstance(table, list):
        table = write_table(tmp_path / "t.csv", table)
    elif isinstance(table, tuple):
        table = write_table(tmp_path / "t.csv", [("new", ASPIRIN)], table)
    model, tokenizer = TahoeX1Model.from_pretrained(converted), TahoeX1Tokenizer.from_pretrained(converted)
    with pytest.raises(ValueError, match=said):
        with_new_drugs(model, tokenizer, table, drugs)


def test_the_command_says_what_is_wrong_and_a_resumed_run_heeds_the_table(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells(["new"] * 4).write_h5ad(tmp_path / "in.h5ad")
    path = write_table(tmp_path / "mine.csv", [("new", ASPIRIN)], ("drug", "canonical_smiles"))
    arguments = [tmp_path / "in.h5ad", tmp_path / "out.parquet", "--model", converted, "--drug-table", path]
    arguments += ["--gene-id-column", "ensembl_id", "--drugs", "drug", "--dtype", "float32"]

    def run(*more: object) -> Any:
        return CliRunner().invoke(app, ["embed", *map(str, [*arguments, *more])])

    with monkeypatch.context() as patch:  # all cells are embedded, and no output is written
        patch.setattr("tahoex1_hf.embedding.files._Run.write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert run().exit_code == 1
    write_table(path, [("new", CAFFEINE)])
    result = run()
    assert result.exit_code == 1
    assert "drug_table" in result.stderr
    assert run("--restart").exit_code == 0
    table = pq.read_table(tmp_path / "out.parquet")
    rows = np.stack(table["X_tahoe_x1"].to_pylist())
    expected = by_the_original(cells(["new"] * 4), fingerprint(CAFFEINE, 128)[None], [20] * 4)
    assert np.abs(rows - expected).max() < 1e-6
    facts = json.loads(pq.read_metadata(tmp_path / "out.parquet").metadata[b"tahoe_x1"])
    assert facts["drug_table"] == "mine.csv"
    other = GOLDEN / "a_70m_like" / "model"
    with pytest.raises(ValueError, match=r"mine.csv'?: this model has no drug encoder"):
        embed_files(tmp_path / "in.h5ad", tmp_path / "b.parquet", other, drugs="drug", drug_table=path)


def test_predictions_use_the_table_too(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", num_drugs=4)
    model = TahoeX1ForSequenceClassification.from_pretrained(base, num_labels=2)
    tokenizer = TahoeX1Tokenizer.from_pretrained(base)
    adata = labelled_cells(6)
    adata.obs["drug"] = ["new", "taxol"] * 3
    with pytest.raises(ValueError, match="'new' is not in the drug table"):
        predict_anndata(adata, model, tokenizer=tokenizer, drugs="drug", dtype="float32", progress=False)
    options: dict[str, Any] = {"tokenizer": tokenizer, "drugs": "drug", "dtype": "float32", "progress": False}
    column = predict_anndata(adata, model, drug_table={"new": ASPIRIN}, **options)
    first = adata.obsm[f"{column}_probabilities"].copy()
    assert adata.uns[column]["new_drugs"] == 1
    predict_anndata(adata, model, drug_table={"new": CAFFEINE}, **options)
    second = adata.obsm[f"{column}_probabilities"]
    assert np.array_equal(first[1::2], second[1::2])
    assert np.abs(first[::2] - second[::2]).min() > 1e-6
    assert model.config.num_drugs == 4
