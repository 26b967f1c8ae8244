"""Pairs of genes are compared with the sum of their shifts, as brute force has it."""

from itertools import combinations
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import GENES, make_cells, write_vocab
from helpers import tiny_config, tiny_model
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_anndata, perturb_genes
from tahoex1_hf.cli.app import app
from tahoex1_hf.perturbation.heat_map import _of_groups, plot_heat_map
from tahoex1_hf.perturbation.interactions import interaction


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = TahoeX1Tokenizer(write_vocab(folder / "vocab"))
    tiny_model(tiny_config(vocab_size=len(tokenizer)), TahoeX1Model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_cells(25, seed=4).write_h5ad(folder / "cells.h5ad")
    return folder


def mean_shift(counts: np.ndarray, genes: tuple[int, ...], folder: Path) -> np.ndarray:
    """Return the mean over all cells of what setting genes to 0 does to their embeddings."""
    without = counts.copy()
    without[:, list(genes)] = 0
    both = [anndata.AnnData(csr_matrix(each), var=pd.DataFrame(index=GENES)) for each in (counts, without)]
    before, after = (
        embed_anndata(each, folder, dtype="float32", device="cpu", progress=False, return_array=True) for each in both
    )
    return (after.astype(np.float64) - before).mean(axis=0)


def test_interactions_equal_brute_force(folder: Path, tmp_path: Path) -> None:
    arguments = ["perturb", folder / "cells.h5ad", tmp_path / "table.csv", "--model", folder, "--device", "cpu"]
    arguments += ["--genes", f"{GENES[2]},{GENES[9]},{GENES[33]}", "--pairs", tmp_path / "pairs.csv"]
    arguments += ["--heat-map", tmp_path / "map.png", "--null-genes", 5, "--most-null-genes", 5, "--min-cells", 3]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "map.png").stat().st_size > 1000
    table = pd.read_csv(tmp_path / "pairs.csv").set_index("gene")
    counts = anndata.read_h5ad(folder / "cells.h5ad").X.toarray()
    assert len(pd.read_csv(tmp_path / "table.csv")) == 6  # three genes and three pairs
    for pair in combinations((2, 9, 33), 2):
        shifts = [mean_shift(counts, genes, folder) for genes in (pair, pair[:1], pair[1:])]
        along, size = interaction(*shifts)
        row = table.loc["+".join(GENES[gene] for gene in pair)]
        assert row["interaction"] == pytest.approx(along, abs=2e-3)
        assert row["interaction_size"] == pytest.approx(size, abs=2e-3)
        assert size > 0.01  # otherwise, zeros would pass
        assert 0 < row["n_null"] <= 5
        assert row["p_value"] >= 1 / (1 + row["n_null"])
    assert (table["interaction_size"].diff().dropna() <= 0).all()


def test_interaction_of_shifts_that_are_known() -> None:
    first, second = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert interaction(first + second, first, second) == (0, 0)
    assert interaction(2 * (first + second), first, second) == pytest.approx((1, 1))
    assert interaction(np.zeros(2), first, second) == pytest.approx((-1, 1))
    assert interaction(first + second + [1, -1], first, second) == pytest.approx((0, 1))  # another direction
    assert np.isnan(interaction(first, np.zeros(2), np.zeros(2))).all()


@pytest.mark.parametrize("options", [{"genes": "all"}, {"genes": GENES[:1]}, {"genes": GENES[:3], "together": True}])
def test_pairs_that_cannot_be_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="name two genes or more"):
        perturb_genes(folder / "cells.h5ad", folder, pairs=True, progress=False, **options)


def test_heat_map_of_groups(tmp_path: Path) -> None:
    rows = [
        (group, gene, z, p, q) for group in ("B", "T") for gene, z, p, q in (("x", 4, 0.001, 0.01), ("y", -1, 0.1, 1))
    ]
    table = pd.DataFrame(rows, columns=["group", "gene", "z_score", "p_value", "q_value"])
    ((_, values, marked, genes, groups),) = _of_groups(table)
    assert (genes, groups) == (["x", "y"], ["B", "T"])
    assert values == pytest.approx(np.array([[3, 3], [-1, -1]]))
    assert marked.tolist() == [[True, True], [False, False]]
    plot_heat_map(table, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_heat_map(table.assign(p_value=np.nan), tmp_path / "map.png")
