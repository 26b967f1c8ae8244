"""`tahoex1 signatures` finds planted pairs of drugs in a screen of real cells too, and tells slips before its work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from embeddings import RECORD
from planted_screens import MECHANISMS, write_mechanisms, write_screen
from typer.testing import CliRunner

from tahoex1_hf.cli.app import app
from tahoex1_hf.signatures import building
from tahoex1_hf.signatures.building import make_signatures

COLUMNS: dict[str, Any] = {"line": "line", "plate": "plate", "progress": False}


def test_planted_pairs_are_found(tmp_path: Path) -> None:
    path = write_screen(tmp_path / "screen.parquet", MECHANISMS, 3.0)
    table = write_mechanisms(tmp_path / "moa.csv")
    arguments = [str(path), "--output", str(tmp_path / "out"), "--line", "line", "--plate", "plate"]
    result = CliRunner().invoke(
        app, ["signatures", *arguments, "--mechanisms", str(table), "--permutations", "399", "-q"]
    )
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out"
    assert {each.name for each in folder.iterdir()} == {
        *("embeddings.parquet", "signatures.csv", "pairs.csv", "map-embeddings.png"),
        *("report.json", "report.md", "scores.csv", "scores.png"),
    }
    found = pd.read_csv(folder / "signatures.csv").set_index(["drug", "line"])
    assert len(found) == 14
    for (drug, _), row in found.iterrows():
        real = MECHANISMS[drug] in ("A", "B")
        assert (row["q_value"] <= 0.01) == real
        assert (row["effect_lower"] > 0) == real or not real
        assert row["cells"] == 80 and row["controls"] == 240  # noqa: PT018
    pairs = pd.read_csv(folder / "pairs.csv").set_index(["drug", "rank"])
    for drug, other in (("a1", "a2"), ("a2", "a1"), ("b1", "b2"), ("b2", "b1")):
        best = pairs.loc[(drug, 1)]
        assert best["similar"] == other
        assert best["q_value"] <= 0.05
        assert best["lines_that_agree"] == 2
    assert (pairs.loc[["n1", "n2", "n3"], "q_value"] > 0.05).all()
    report = json.loads((folder / "report.json").read_text())
    scores = {each["metric"]: each["value"] for each in report["scores"]}
    assert scores["mechanism_auroc"] == 1
    assert scores["significant"] == pytest.approx((found["q_value"] <= 0.05).mean())
    stored = pq.read_table(folder / "embeddings.parquet")
    assert stored["shift"].type.list_size == 24
    assert json.loads(stored.schema.metadata[b"tahoex1_signatures"])["record"] == RECORD


def test_expression_of_real_cells_with_planted_shifts(tmp_path: Path, lung: anndata.AnnData) -> None:
    """Two drugs treble genes of real cells, one takes them down, one does nothing: the pair is found."""
    random = np.random.default_rng(0)
    most = np.argsort(-np.asarray(lung.X.sum(axis=0)).ravel())[:1500]
    cells = lung[lung.obs["protocol"] == lung.obs["protocol"].iloc[0], np.sort(most)].copy()
    drugs = random.choice(["DMSO_TF", "x1", "x2", "y", "z"], cells.n_obs, p=[0.4, 0.15, 0.15, 0.15, 0.15])
    strong = np.argsort(-np.asarray(cells.X.mean(axis=0)).ravel())[20:60]
    counts = cells.X.toarray()
    for drug in ("x1", "x2"):
        counts[np.ix_(drugs == drug, strong)] *= 3
    counts[np.ix_(drugs == "y", strong)] = np.floor(counts[np.ix_(drugs == "y", strong)] / 3)
    cells.X = counts
    cells.obs["drug"] = drugs
    left, sizes, _ = np.linalg.svd(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4), full_matrices=False)
    cells.obsm["X_tahoe_x1"] = (left * sizes)[:, :30].astype(np.float32)
    cells.uns["tahoe_x1"] = RECORD
    cells.write_h5ad(tmp_path / "cells.h5ad")
    made = make_signatures(
        tmp_path / "cells.h5ad", tmp_path / "out", line="cell_line", space="both", permutations=199, min_cells=6,
        progress=False,
    )  # fmt: skip
    pairs = made.pairs.set_index(["space", "drug", "rank"])
    for space in ("embeddings", "expression"):
        assert pairs.loc[(space, "x1", 1), "similar"] == "x2"
        assert pairs.loc[(space, "x2", 1), "similar"] == "x1"
    assert pairs.loc[("expression", "x1", 1), "q_value"] <= 0.05
    none = made.table[made.table["drug"] == "z"].set_index("space")
    assert (none["q_value"] > 0.05).all()
    assert "Reliability by embeddings is **" in made.text


@pytest.fixture
def lung(shared_data: Callable[[str], Path]) -> anndata.AnnData:
    return anndata.read_h5ad(shared_data("h5ad/lung_lines_sc_mixology.h5ad"))


def test_slips_are_told_before_any_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def computing(*_: Any, **__: Any) -> None:
        raise AssertionError("computed before the slip was told")

    monkeypatch.setattr(building, "_measure", computing)
    path = write_screen(tmp_path / "screen.h5ad", MECHANISMS, 1.0, cells=8, controls=30)
    output = tmp_path / "out"
    for options, said in (
        (
            {"drug": "compound"},
            r"drug=compound .--drug. is not a column of obs of .*there are drug, line, plate, dose",
        ),
        ({"plate": "well"}, r"plate=well .--plate. is not a column"),
        ({"control": "DMSO"}, r"control=DMSO .--control. is no value of drug of .*there are DMSO_TF, a1"),
        ({"plate": "dose"}, r"plate=dose .--plate. of .* has one value, 0.5: what a plate does cannot be told"),
        ({"min_cells": 31}, r"too few controls .DMSO_TF. for 4 of 4 lines on plates .L1 p1: 30; .*31 are needed"),
        ({"min_cells": 9}, r"no drug has 9 cells .* on a plate with controls"),
        ({"min_cells": 2}, r"min_cells=2 .--min-cells.: halves need two cells each"),
        ({"permutations": 5}, r"permutations=5 .--permutations."),
        ({"space": "pca"}, r"space=pca .--space.: pass one of embeddings, expression, both"),
        ({"key": "X_pca"}, r'it has no obsm."X_pca".; there is X_tahoe_x1'),
        ({"mechanisms": tmp_path / "none.csv"}, r"mechanisms=.*none.csv does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            make_signatures(path, output, **{**COLUMNS, **options})  # type: ignore[arg-type]
        assert not output.exists()
    with pytest.raises(ValueError, match="exists and holds no signatures: name a new folder"):
        make_signatures(path, tmp_path, **COLUMNS)
    assert {each.name for each in tmp_path.iterdir()} == {"screen.h5ad"}


def test_lines_with_few_controls_can_be_left_out(tmp_path: Path) -> None:
    from embeddings import write_embeddings
    from planted_screens import planted

    values, obs = planted({"a1": "A", "a2": "A"}, 3.0, controls=40, cells=20)
    kept = ~((obs["drug"] == "DMSO_TF") & (obs["line"] == "L2") & (obs["plate"] == "p1")).to_numpy()
    path = write_embeddings(tmp_path / "screen.parquet", values[kept], obs[kept].reset_index(drop=True))
    with pytest.raises(ValueError, match=r"for 1 of 4 lines on plates .L2 p1: 0.*--drop-few"):
        make_signatures(path, tmp_path / "out", **COLUMNS)
    made = make_signatures(path, tmp_path / "out", drop_few=True, permutations=19, **COLUMNS)
    assert made.table.set_index(["drug", "line"]).loc[("a1", "L2"), "plates"] == 1
    assert "1 of 4 lines on plates have fewer than 20 controls and are left out" in made.text
