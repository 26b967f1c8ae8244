"""More controls are measured where few match, all of them count, and stopping early or resuming changes nothing."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import write_vocab
from helpers import tiny_config, tiny_model
from scipy.sparse import csr_matrix

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, perturb_genes
from tahoex1_hf.perturbation.nulls import LEAST_POOL, Pools
from tahoex1_hf.perturbation.plan import Task

NAMES = [f"ENSG{number:011d}" for number in range(400)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(write_vocab(tmp_path_factory.mktemp("vocab"), genes=NAMES))


@pytest.fixture(scope="module")
def model(tokenizer: TahoeX1Tokenizer) -> TahoeX1Model:
    """A model in which the first gene's embedding is far longer than the others'."""
    model = tiny_model(tiny_config(vocab_size=len(tokenizer), gene_encoder_norm=False), TahoeX1Model)
    table = model.embeddings.gene_encoder.embedding.weight.data
    table[tokenizer.get_vocab()[NAMES[0]]] *= 40
    return model


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    """Cells, each of which expresses about 0.4 of the genes."""
    random = np.random.default_rng(2)
    counts = random.poisson(3, (26, 400)) * (random.random((26, 400)) < 0.4)
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=NAMES))


def run(adata: Any, model: Any, tokenizer: Any, genes: Any, **options: Any) -> pd.DataFrame:
    settings: dict[str, Any] = {"null_genes": 20, "device": "cpu", "progress": False, "min_cells": 5, **options}
    return perturb_genes(adata, model, tokenizer, genes, **settings).table.set_index("gene")


def test_planted_gene_gets_more_controls_and_others_do_not(
    adata: anndata.AnnData, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    genes = NAMES[:3]
    table = run(adata, model, tokenizer, genes, most_null_genes=300, partial=tmp_path / "journal")
    controls = [line for line in (tmp_path / "journal").read_text().splitlines()[1:] if '"control": true' in line]
    assert table["n_pooled"][NAMES[0]] == len(controls) >= 300
    assert table["n_null"].tolist() == [20, 20, 20]  # mean and standard deviation are those of the nearest
    assert table["p_value"][NAMES[0]] < 1e-4  # with 20 controls it could not be below 1/21
    assert table["q_value"][NAMES[0]] < 1e-3
    assert table["p_method"][NAMES[0]] == "tail"
    assert table["p_value"].iloc[1:].min() > 0.01
    assert (table["lower"] < table["cosine_distance"]).all()
    assert (table["cosine_distance"] < table["upper"]).all()
    # A run that was stopped between the rounds goes on to the same table.
    lines = (tmp_path / "journal").read_text().splitlines(keepends=True)
    (tmp_path / "journal").write_text("".join(lines[:60]))
    again = run(adata, model, tokenizer, genes, most_null_genes=300, partial=tmp_path / "journal")
    pd.testing.assert_frame_equal(again, table, rtol=1e-4)
    unremarkable = run(adata, model, tokenizer, NAMES[1:2], most_null_genes=300)
    assert unremarkable["n_pooled"].iloc[0] < 300


def test_no_more_controls_than_asked_for(adata: anndata.AnnData, model: Any, tokenizer: Any) -> None:
    table = run(adata, model, tokenizer, NAMES[:1], most_null_genes=0)
    assert table["n_pooled"].iloc[0] == 20
    assert table["p_value"].iloc[0] == pytest.approx(1 / 21)


def test_all_genes_stand_beside_all_others(adata: anndata.AnnData, model: Any, tokenizer: Any) -> None:
    table = run(adata, model, tokenizer, "all")
    assert (table["n_pooled"] == len(table) - 1).all()
    assert table["q_value"][NAMES[0]] < 1e-3
    assert table["q_value"].iloc[1:].min() > 0.01


def test_pools_hold_controls_of_as_many_genes_in_the_same_group() -> None:
    tested = [Task(0, (0,)), Task(1, (0,)), Task(0, (0, 1))]
    controls = {
        tested[0]: [Task(0, (n,), True) for n in range(2, 2 + LEAST_POOL)],
        tested[1]: [Task(1, (n,), True) for n in range(2, 12)],
        tested[2]: [Task(0, (n, n + 1), True) for n in range(2, 12)],
    }
    random = np.random.default_rng(0)
    every = [*tested, *(task for others in controls.values() for task in others)]
    finished = {task: {"cosine_distance": (random.random(), 0.1), "n_cells_changed": 9} for task in every}
    pools = Pools(finished, controls, lambda task: np.zeros(2), "cosine_distance")
    assert [pools.test(task, controls[task]).n_null for task in tested] == [LEAST_POOL, 10, 10]
    finished[tested[0]]["cosine_distance"] = (5.0, 0.1)
    finished[tested[1]] |= {"cosine_distance": (5.0, 0.1), "n_cells_changed": 2}
    finished[tested[2]]["cosine_distance"] = (-1.0, 0.1)
    assert pools.promising(controls, 3) == tested[:1]
