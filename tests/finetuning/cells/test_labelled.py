"""A fine-tuning run reads the cells of a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cells import as_mouse
from finetuning_runs import (
    labelled_cells,
    make_config,
    write_base,
)
from scipy.sparse import csc_matrix

from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.finetuning.bases import load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import read_cells
from tahoex1_hf.finetuning.cells.labels import class_labels
from tahoex1_hf.finetuning.running import finetune


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    labelled_cells(120).write_h5ad(path)
    return path


def by_token(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and values of padded cells, sorted by token: the tokenizer keeps the order of the file."""
    ids, order = torch.as_tensor(batch["input_ids"]).sort(dim=1)
    return ids, torch.as_tensor(batch["expression_values"]).gather(1, order)


def test_cells_with_drugs(data: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "drug_base", num_drugs=4)
    cells = labelled_cells(60)
    drugs = ["", "aspirin", "caffeine", "taxol"]
    cells.obs["drug"] = [drugs[i % 4] for i in range(60)]
    cells.write_h5ad(tmp_path / "treated.h5ad")
    config = make_config(base, tmp_path / "treated.h5ad", tmp_path / "run", drugs="drug", epochs=1)
    read = read_cells(config, load_tokenizer(config), tmp_path)
    batch = read.batch(np.array([1, 4, 7]))
    assert batch["drug_ids"].tolist() == [1, 0, 3]
    assert (batch["input_ids"][:, 1] == load_tokenizer(config).get_vocab()["<drug>"]).all()
    expected = load_tokenizer(config)(cells[[1, 4, 7]], drugs="drug", padding=True, return_tensors="pt")
    for ours, theirs in zip(by_token(batch), by_token(expected), strict=True):
        assert torch.equal(ours, theirs)
    cells.obs["drug"] = cells.obs["drug"].astype(str).replace({"taxol": "DMSO_TF", "aspirin": "aspirin "})
    cells.write_h5ad(tmp_path / "unknown.h5ad")
    unknown = make_config(base, tmp_path / "unknown.h5ad", tmp_path / "run", drugs="drug", epochs=1)
    with pytest.raises(ValueError, match="'DMSO_TF' is not in the drug table"):
        read_cells(unknown, load_tokenizer(config), tmp_path)
    padded = unknown.model_copy(update={"unknown_drugs": "pad"})
    batch = read_cells(padded, load_tokenizer(config), tmp_path).batch(np.array([1, 4, 7]))
    assert batch["drug_ids"].tolist() == [1, 0, 0]
    assert finetune(config) == 0
    masked = make_config(
        base, tmp_path / "treated.h5ad", tmp_path / "mlm", task="masked_expression", label=None, epochs=1
    )
    assert finetune(masked) == 0


def test_cells_are_encoded_as_the_tokenizer_does_it(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path, context_length=12)  # cells have about 20 genes: they are sampled
    tokenizer = load_tokenizer(config)
    assert tokenizer.context_length == 12
    cells = read_cells(config, tokenizer, tmp_path)
    rows = np.array([7, 100, 2])
    some, alone = cells.encoded(rows), cells.encoded(rows[1:2])
    assert np.array_equal(some.input_ids[12:24], alone.input_ids)
    assert np.array_equal(some.expression_values[12:24], alone.expression_values)
    assert (cells.lengths[rows] == np.diff(some.offsets)).all()
    whole = load_tokenizer(make_config(base, data, tmp_path))
    every = read_cells(make_config(base, data, tmp_path), whole, tmp_path).encoded(rows)
    expected = whole(labelled_cells(120)[rows], padding=True, return_tensors="pt")
    ours = every.padded(pad_token_id=0, pad_value=whole.pad_value)
    for mine, theirs in zip(by_token(ours), by_token(expected), strict=True):
        assert torch.equal(mine, theirs)
    counts = cells.csr()
    assert counts.shape == (120, len(tokenizer))
    assert counts.sum() == labelled_cells(120).X.sum()


def test_counts_stored_by_gene_or_dense_are_the_same_cells(base: Path, data: Path, tmp_path: Path) -> None:
    expected = None
    for kind in ("csr", "csc", "dense", "compressed"):
        adata = labelled_cells(120)
        adata.X = {"csc": csc_matrix, "dense": lambda x: x.toarray()}.get(kind, lambda x: x)(adata.X)
        path = tmp_path / f"{kind}.h5ad"
        adata.write_h5ad(path, compression="gzip" if kind == "compressed" else None)
        config = make_config(base, path, tmp_path)
        cells = read_cells(config, load_tokenizer(config), tmp_path)
        encoded = cells.encoded(np.arange(120))
        expected = expected or encoded
        assert np.array_equal(encoded.input_ids, expected.input_ids)
        assert np.array_equal(encoded.expression_values, expected.expression_values)
        assert cells.names.tolist() == adata.obs_names.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{k}.h5ad" for k in ("compressed", "csc", "csr", "dense")
    ]


def test_cells_of_a_mouse_by_a_table_of_orthologues(base: Path, data: Path, tmp_path: Path) -> None:
    mouse, translated = as_mouse(labelled_cells(120), tmp_path)
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    configs = (make_config(base, data, tmp_path), make_config(base, tmp_path / "mouse.h5ad", tmp_path, **translated))
    human, read = (read_cells(config, load_tokenizer(config), tmp_path).encoded(np.arange(120)) for config in configs)
    assert np.array_equal(read.input_ids, human.input_ids)
    assert np.array_equal(read.expression_values, human.expression_values)


def test_the_order_of_genes_in_a_file_changes_no_bit(base: Path, data: Path, tmp_path: Path) -> None:
    cells = labelled_cells(120)
    order = np.random.default_rng(0).permutation(cells.n_vars)
    cells[:, order].copy().write_h5ad(tmp_path / "shuffled.h5ad")
    rows, batches = np.arange(0, 120, 7), []
    for path in (data, tmp_path / "shuffled.h5ad"):
        config = make_config(base, path, tmp_path, task="masked_expression", label=None, context_length=12)
        tokenizer = load_tokenizer(config)
        read = read_cells(config, tokenizer, tmp_path)
        collator = CellCollator(tokenizer, mlm_probability=0.5)
        batches.append({**read.batch(rows), **read.masked_batch(collator, rows, 0, 1)})
    assert batches[0].keys() == batches[1].keys()
    for name, tensor in batches[0].items():
        assert torch.equal(tensor, batches[1][name]), name


def test_classes_that_differ_in_blanks_or_case_alone_are_told_of(
    base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(base, data, tmp_path)
    named = class_labels(pd.Series(["T cell", "T cell ", "t  cell", "B", "B cell"] * 2), config)
    assert named.classes == ["B", "B cell", "T cell", "T cell ", "t  cell"]
    assert "'T cell'/'T cell '/'t  cell' are taken for classes of their own" in caplog.text
    caplog.clear()
    class_labels(pd.Series(["T cell", "B"] * 2), config)
    assert not caplog.text
