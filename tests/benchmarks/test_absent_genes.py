"""The trial of absent genes prepares cells and sums up its results; what it trains is tested in tests/training."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from benchmarks import absent_genes
from tahoex1_hf.training.config import read_pretrain_config

GENES = [f"ENSG{number:011d}" for number in range(70)]


def test_the_vocabulary_has_the_genes_of_enough_cells(tmp_path: Path) -> None:
    counts = np.tile(np.arange(1, 71), (12, 1))
    counts[3:, 60:] = 0  # the last ten genes are in three cells of each file
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.h5ad")
        cells = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
        cells.var_names = GENES
        cells.obs_names = [f"{name}{number}" for number in range(12)]
        cells.write_h5ad(files[-1])
    absent_genes.make_dataset(tmp_path / "data", files, least_cells=7)
    tokens = json.loads((tmp_path / "data" / "vocab.json").read_text())
    assert [token for token in tokens if token.startswith("ENSG")] == GENES[:60]
    assert list(tokens)[:3] == ["<pad>", "<cls>", "<eoc>"]
    assert len(tokens) % 64 == 0
    manifest = json.loads((tmp_path / "data" / "cells" / "manifest.json").read_text())
    assert manifest["totals"]["cells_out"] == 24


def test_no_set_is_both_trained_on_and_tested() -> None:
    assert not set(absent_genes.CORPUS) & set(absent_genes.TESTS)


def test_trials_differ_in_their_targets_alone() -> None:
    given = {"absent_targets", "cell_targets", "value_encoding", "packed", "unexpressed_padding", "model"}
    usual = read_pretrain_config("absent-genes").model_dump()
    for changes in absent_genes.ARMS.values():
        trial = read_pretrain_config("absent-genes", [*absent_genes.PLAIN, *changes]).model_dump()
        assert {key for key in trial if trial[key] != usual[key]} <= given
    first = [arm for arm, seed in absent_genes.runs() if seed == 0]
    assert first == list(absent_genes.ARMS)  # a trial that is cut short has the same seeds of all


def test_the_table_has_intervals_over_seeds() -> None:
    names = list(absent_genes.ARMS)
    rows = [
        {"arm": names[0], "seed": seed, "cpu_seconds": 10.0, "gut_crohn_scp1884": value}
        for seed, value in enumerate((0.1, 0.2, 0.3))
    ]
    rows[0]["gut_crohn_scp1884 untrained"] = 0.05
    lines = absent_genes.table(rows).splitlines()
    # Student's t with two degrees of freedom: 4.303 x 0.1 / sqrt(3).
    assert lines[2] == f"| {names[0]} | 0.200 ± 0.248 | 3 | 10 |"
    assert lines[-1] == "| untrained, bins | 0.050 | 1 | 0 |"
    assert absent_genes.interval([0.1])[0] == pytest.approx(0.1)
