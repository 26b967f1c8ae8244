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
from tahoex1_hf.cells.encoding import EncodeOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.cli.app import app
from tahoex1_hf.perturbation.cells import PerturbationEncoder
from tahoex1_hf.perturbation.heat_map import _of_groups, plot_heat_map
from tahoex1_hf.perturbation.interactions import GROUPS, interaction, interaction_error
from tahoex1_hf.perturbation.measures import cell_groups
from tahoex1_hf.perturbation.tables import interval


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = TahoeX1Tokenizer(write_vocab(folder / "vocab"))
    tiny_model(tiny_config(vocab_size=len(tokenizer)), TahoeX1Model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_cells(25, seed=4).write_h5ad(folder / "cells.h5ad")
    return folder


def cell_shifts(counts: np.ndarray, genes: tuple[int, ...], folder: Path) -> np.ndarray:
    """Return what setting genes to 0 does to the embedding of each cell."""
    without = counts.copy()
    without[:, list(genes)] = 0
    both = [anndata.AnnData(csr_matrix(each), var=pd.DataFrame(index=GENES)) for each in (counts, without)]
    before, after = (
        embed_anndata(each, folder, dtype="float32", device="cpu", progress=False, return_array=True) for each in both
    )
    return after.astype(np.float64) - before


def group_of(cells: anndata.AnnData, folder: Path) -> np.ndarray:
    """Return the group of each cell."""
    tokenizer = TahoeX1Tokenizer.from_pretrained(folder)
    source = PerturbationEncoder(open_cells(cells, tokenizer), EncodeOptions(tokenizer))
    return cell_groups(source.read(np.arange(cells.n_obs)), GROUPS)


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
    members = np.eye(GROUPS)[group_of(anndata.read_h5ad(folder / "cells.h5ad"), folder)].T
    for pair in combinations((2, 9, 33), 2):
        shifts = [cell_shifts(counts, genes, folder) for genes in (pair, pair[:1], pair[1:])]
        along, size = interaction(*(each.mean(axis=0) for each in shifts))
        row = table.loc["+".join(GENES[gene] for gene in pair)]
        assert row["interaction"] == pytest.approx(along, abs=2e-3)
        assert row["interaction_size"] == pytest.approx(size, abs=2e-3)
        bounds = interval(along, *interaction_error(*(members @ each for each in shifts), members.sum(axis=1)))
        assert row[["lower", "upper"]].tolist() == pytest.approx([bounds["lower"], bounds["upper"]], abs=4e-3)
        assert bounds["upper"] - bounds["lower"] > 0.02
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


@pytest.mark.parametrize("planted", [0.0, -0.4, 0.6])
def test_intervals_hold_planted_interactions_as_often_as_they_say(planted: float) -> None:
    """Cells differ in how far each gene shifts them, and in what the pair does beyond the sum."""
    random, cells, width, held, times = np.random.default_rng(1), 150, 16, 0, 500
    means = random.normal(size=(2, width))
    for _ in range(times):
        first, second = (mean * random.gamma(4, 1 / 4, (cells, 1)) for mean in means)
        both = (1 + planted) * (first + second) + random.normal(scale=0.5, size=(cells, width))
        members = np.eye(GROUPS)[random.integers(0, GROUPS, cells)].T
        error = interaction_error(*(members @ each for each in (both, first, second)), members.sum(axis=1))
        found = interaction(*(each.mean(axis=0) for each in (both, first, second)))[0]
        bounds = interval(found, *error)
        held += bounds["lower"] <= planted <= bounds["upper"]
    # 95 % of 500 are 475; by chance, fewer than 455 or more than 492 come once in 10,000 times.
    assert 455 <= held <= 492


def test_intervals_need_groups_of_cells_and_a_sum() -> None:
    zeros, cells = np.zeros((4, 3)), np.array([5, 0, 3, 1])
    assert np.isnan(interaction_error(zeros, zeros, zeros, cells)[0])
    ones = np.ones((1, 3))
    assert np.isnan(interaction_error(ones, ones, ones, np.array([5]))[0])
    whole = cells[:, None] * np.arange(1.0, 4)
    assert interaction_error(1.5 * whole, whole, whole, cells) == (pytest.approx(0, abs=1e-12), 3)  # all cells alike


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
