"""`tahoex1 signatures query` finds the planted drug and its mechanism, and refuses what cannot be compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from embeddings import write_embeddings
from planted_screens import MECHANISMS, planted, write_mechanisms, write_screen
from typer.testing import CliRunner

from tahoex1_hf.cli.app import app
from tahoex1_hf.signatures import querying
from tahoex1_hf.signatures.building import make_signatures
from tahoex1_hf.signatures.querying import query_signatures


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("library")
    path = write_screen(place / "screen.parquet", MECHANISMS, 3.0)
    make_signatures(path, place / "signatures", line="line", plate="plate", permutations=19, progress=False)
    return place


def test_a_new_drug_is_like_those_of_its_mechanism(library: Path, tmp_path: Path) -> None:
    """Also in a line that the signatures lack: then those of all lines count."""
    values, obs = planted({"new": "A", "idle": ""}, 3.0, seed=3, lines=("L1", "L3"))
    cells = write_embeddings(tmp_path / "new.h5ad", values, obs, prefix="new-")
    table = write_mechanisms(tmp_path / "moa.csv")
    arguments = ["--signatures", str(library / "signatures"), "--output", str(tmp_path / "out")]
    arguments += ["--mechanisms", str(table), "--permutations", "499", "-q"]
    result = CliRunner().invoke(app, ["signatures", "query", str(cells), *arguments])
    assert result.exit_code == 0, result.output
    near = pd.read_csv(tmp_path / "out" / "neighbours.csv")
    mine = near[near["drug"] == "new"].set_index("rank")
    assert set(mine.loc[[1, 2], "similar"]) == {"a1", "a2"}
    assert (mine.loc[[1, 2], "q_value"] <= 0.05).all()
    assert (mine.loc[[1, 2], "lines_that_agree"] == 2).all()
    assert (near.loc[near["drug"] == "idle", "q_value"] > 0.05).all()
    enriched = pd.read_csv(tmp_path / "out" / "mechanisms.csv").set_index(["drug", "mechanism"])
    assert enriched.loc[("new", "A"), "auroc"] == 1
    assert enriched.loc[("new", "B"), "auroc"] == 0
    assert "| a1 | A |" in (tmp_path / "out" / "report.md").read_text()


def test_shared_controls_are_told(library: Path, tmp_path: Path) -> None:
    answer = query_signatures(
        library / "screen.parquet", library / "signatures", tmp_path / "out", permutations=19, progress=False
    )
    assert "controls are those of the signatures, by their names" in answer.text


def test_slips_are_told_before_any_computing(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def computing(*_: Any, **__: Any) -> None:
        raise AssertionError("computed before the slip was told")

    monkeypatch.setattr(querying, "_carry_out", computing)
    values, obs = planted({"new": "A"}, 1.0, cells=20, controls=20)
    odd = write_embeddings(tmp_path / "odd.parquet", values, obs, model="another/model")
    narrow = write_embeddings(tmp_path / "narrow.parquet", np.ascontiguousarray(values[:, :8]), obs)
    bare = write_embeddings(tmp_path / "bare.parquet", values, obs.drop(columns="line"))
    folder = library / "signatures"
    for cells, signatures, options, said in (
        (odd, folder, {}, "odd.parquet was made otherwise .model another/model where the others have owner/model"),
        (narrow, folder, {}, "narrow.parquet has 8 dimensions, and the others have 24"),
        (bare, folder, {}, r"line=line .--line. is not a column of obs of .*there are drug, plate, dose"),
        (odd, tmp_path / "none", {}, "signatures=.*none does not exist: make it by tahoex1 signatures"),
        (odd, tmp_path, {}, "holds no signatures of embeddings or expression"),
        (odd, folder, {"space": "expression"}, "holds no signatures of expression"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{said}"):
            query_signatures(cells, signatures, tmp_path / "out", progress=False, **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
