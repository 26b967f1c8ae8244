"""The drug table holds numbers and fingerprints; `tahoex1 drug-fingerprints` makes it."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from tahoex1_hf.cli.vocabulary import drug_fingerprints as drug_fingerprints_command
from tahoex1_hf.data.fingerprints import drug_fingerprints

pytest.importorskip("rdkit", reason="rdkit is not installed (extra drugs)")

ASPIRIN, CAFFEINE = "CC(=O)OC1=CC=CC=C1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"


def table(path: Path, rows: list[tuple], columns: tuple[str, str] = ("drug", "canonical_smiles")) -> Path:
    pd.DataFrame(rows, columns=list(columns)).to_csv(path, index=False)
    return path


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("drug-fingerprints")(drug_fingerprints_command)
    return app


def test_the_drugs_of_tahoe_100m_give_its_table(tmp_path: Path, shared_data) -> None:
    expected = np.load(shared_data("tahoe/drug_morgan2_2048_rdkit.npz"))
    written = drug_fingerprints(shared_data("tahoe/drug_metadata.parquet"), tmp_path)
    table_bytes = (tmp_path / "drug_to_id_pad.json").read_bytes()
    assert table_bytes == shared_data("tahoe/drug_to_id_pad.json").read_bytes()
    assert list(written.drug_to_id) == expected["names"].tolist()
    assert written.without_smiles == ["Sacubitril/Valsartan", "Verteporfin"]
    fingerprints = np.load(tmp_path / "drug_fps_pad.npy")
    assert fingerprints.shape == (378, 2048)
    assert np.array_equal(fingerprints, expected["fps"])


def test_rows_are_in_table_order_behind_a_row_of_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("caffeine", CAFFEINE), ("water?", None), ("aspirin", ASPIRIN), ("caffeine", CAFFEINE), ("blank", "  ")]
    written = drug_fingerprints(table(tmp_path / "d.csv", rows), tmp_path / "out")
    assert written.drug_to_id == {"<pad>": 0, "caffeine": 1, "aspirin": 2}
    assert written.without_smiles == ["water?", "blank"]
    assert "water?, blank" in caplog.text
    fingerprints = np.load(tmp_path / "out" / "drug_fps_pad.npy")
    assert fingerprints.dtype == np.float32
    assert set(np.unique(fingerprints)) == {0, 1}
    assert fingerprints[0].sum() == 0
    alone = drug_fingerprints(table(tmp_path / "a.csv", [("aspirin", ASPIRIN)]), tmp_path / "alone")
    assert alone.drug_to_id["aspirin"] == 1
    assert np.array_equal(np.load(tmp_path / "alone" / "drug_fps_pad.npy")[1], fingerprints[2])
    assert not np.array_equal(fingerprints[1], fingerprints[2])


def test_radius_and_length_change_the_fingerprints(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [("aspirin", ASPIRIN)])
    sums = {}
    for radius in (0, 2):
        drug_fingerprints(path, tmp_path / str(radius), radius=radius, num_bits=4096)
        sums[radius] = np.load(tmp_path / str(radius) / "drug_fps_pad.npy").sum()
        assert np.load(tmp_path / str(radius) / "drug_fps_pad.npy").shape == (2, 4096)
    assert sums[0] < sums[2]
    with pytest.raises(ValueError, match="num_bits=0"):
        drug_fingerprints(path, tmp_path / "none", num_bits=0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [("aspirin", ASPIRIN), ("ring", "C1CC"), ("words", "see above")],
            "2 SMILES .*row 1, 'ring': 'C1CC'; row 2, 'words': 'see",
        ),
        ([("a", ASPIRIN), ("a", CAFFEINE)], f"'a' occurs twice, .*{CAFFEINE[:4]}"),
        ([("a", ASPIRIN), ("a ", CAFFEINE)], "'a' occurs twice, .*in row 1"),
        ([("<pad>", ASPIRIN)], "row 0 names a drug '<pad>'"),
        ([("a", ASPIRIN), (None, CAFFEINE)], "row 1 names no drug"),
        ([("a", None)], "no drug has a SMILES"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_and_nothing_is_written(
    tmp_path: Path, rows: list[tuple], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        drug_fingerprints(table(tmp_path / "d.csv", rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [("aspirin", ASPIRIN)], ("compound", "smiles"))
    with pytest.raises(ValueError, match=r"no column 'drug', only \['compound', 'smiles'\]"):
        drug_fingerprints(path, tmp_path / "out")
    written = drug_fingerprints(path, tmp_path / "out", drug_column="compound", smiles_column="smiles")
    assert written.drug_to_id == {"<pad>": 0, "aspirin": 1}


def test_other_drugs_replace_neither_file_of_a_table(tmp_path: Path) -> None:
    first = table(tmp_path / "d.csv", [("aspirin", ASPIRIN)])
    drug_fingerprints(first, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "drug_fps_pad.npy").unlink()
    other = table(tmp_path / "e.csv", [("caffeine", CAFFEINE)])
    with pytest.raises(FileExistsError, match=r"drug_to_id_pad\.json exists"):
        drug_fingerprints(other, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["drug_to_id_pad.json"]
    drug_fingerprints(first, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    drug_fingerprints(other, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "drug_to_id_pad.json").read_text()) == {"<pad>": 0, "caffeine": 1}


def test_without_rdkit_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: typer.Typer
) -> None:
    monkeypatch.setitem(sys.modules, "rdkit.Chem", None)
    path = table(tmp_path / "d.csv", [("aspirin", ASPIRIN)])
    with pytest.raises(ImportError, match=r"pip install 'tahoex1_hf\[drugs\]'"):
        drug_fingerprints(path, tmp_path / "out")
    result = CliRunner().invoke(app, ["drug-fingerprints", str(path), str(tmp_path / "out")])
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: Fingerprints need rdkit: pip install 'tahoex1_hf[drugs]'.\n",
    )


def test_command(tmp_path: Path, app: typer.Typer) -> None:
    path = table(tmp_path / "d.csv", [("aspirin", ASPIRIN)], ("compound", "smiles"))
    names = ["--drug-column", "compound", "--smiles-column", "smiles", "--num-bits", "64"]
    result = CliRunner().invoke(app, ["drug-fingerprints", str(path), str(tmp_path / "out"), *names])
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "out" / "drug_fps_pad.npy").shape == (2, 64)
    result = CliRunner().invoke(app, ["drug-fingerprints", str(path), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "no column 'drug'" in result.stderr
