"""The hand-off to STATE: its split, layout and commands, and what is read back, with a stand-in for the program."""

import os
import sys
import tomllib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from typer.testing import CliRunner, Result

from tahoex1_hf.benchmarking.cells import read_cells
from tahoex1_hf.benchmarking.screens import Screen, read_screen
from tahoex1_hf.benchmarking.state import StateSplit, make_split
from tahoex1_hf.benchmarking.state_runs import StateRun
from tahoex1_hf.cli.app import app

LINES, GENES = ('k"562', "U87 MG", "A172"), 30

# It stands in for `python -m state`: it checks that it is given what STATE reads, and writes scores as cell-eval does.
STAND_IN = """
import os, sys
from pathlib import Path
assert "PYTHONPATH" not in os.environ
log = Path("calls.txt")
log.write_text((log.read_text() if log.exists() else "") + "\\x00".join(sys.argv[1:]) + "\\n")
kind = sys.argv[4]
if kind == "train":
    options = dict(each.split("=", 1) for each in sys.argv[5:])
    assert Path(options["data.kwargs.toml_config_path"]).is_file()
    Path(options["output_dir"], options["name"]).mkdir(exist_ok=True)
else:
    if Path("fail").exists():
        sys.exit("the weights are gone")
    folder = Path(sys.argv[sys.argv.index("--output-dir") + 1], "eval_last.ckpt")
    folder.mkdir()
    for number, line in enumerate(("A172", "k562")):
        text = "statistic,pearson_delta,mse\\ncount,3.0,3.0\\nmean,0.2%d,0.5\\n" % number
        (folder / (line + "_agg_results.csv")).write_text(text)
"""


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    obs = pd.DataFrame(
        [(name, line) for line in LINES for name in ("no 'guide'", *"ABCDEFGHIJ") for _ in range(4)],
        columns=["gene", "line"],
    )
    counts = random.poisson(2.0, (len(obs), GENES)).astype(np.float32)
    adata = anndata.AnnData(csr_matrix(counts), obs=obs)
    adata.obs_names = [f"cell{n}" for n in range(len(obs))]
    adata.var_names = [f"ENSG{n:011d}" for n in range(GENES)]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    return tmp_path / "screen.h5ad"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{tmp_path / "stand_in.py"}" "$@"\n')
    path.chmod(0o755)
    return path


def screen_of(cells: Path) -> Screen:
    return read_screen(read_cells(cells), "gene", "no 'guide'", "line")


def run(cells: Path, python: Path, output: Path, *more: str) -> Result:
    arguments = ["evaluate", "state", "--cells", cells, "--label", "gene", "--control", "no 'guide'", "--line", "line"]
    arguments += ["--source", "random=random", "--state-python", python, "--output", output, *more]
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_split_is_the_toml_that_state_reads(cells: Path, tmp_path: Path) -> None:
    split = make_split(screen_of(cells), ["U87 MG"], ['k"562'], 0)
    found = tomllib.loads(split.toml(tmp_path))
    assert found["datasets"] == {"screen": str(tmp_path.resolve())}
    assert found["training"] == {"screen": "train"}
    assert found["zeroshot"] == {"screen.U87 MG": "test"}
    parts = found["fewshot"]['screen.k"562']
    assert [len(parts["val"]), len(parts["test"])] == [1, 2]
    assert not set(parts["val"]) & set(parts["test"])
    assert set(parts["val"]) | set(parts["test"]) <= set("ABCDEFGHIJ")
    assert make_split(screen_of(cells), [], ['k"562'], 1).few_shot != split.few_shot
    assert StateSplit([], {}).toml(tmp_path).count("fewshot") == 0


@pytest.mark.parametrize(
    ("zero_shot", "few_shot", "message"),
    [
        (["HeLa"], [], "--zero-shot HeLa is no line"),
        ([], [], "needs a line to test on"),
        (["A172"], ["A172"], "cannot be both"),
        (list(LINES), [], "leaves no line to learn from"),
    ],
)
def test_splits_that_cannot_be_are_refused(
    cells: Path, zero_shot: list[str], few_shot: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_split(screen_of(cells), zero_shot, few_shot, 0)


def test_hand_off_and_report(cells: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "."))
    options = ("--zero-shot", "U87 MG", "--few-shot", "A172", "--steps", "7")
    result = run(cells, python, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    adata = anndata.read_h5ad(tmp_path / "out" / "data" / "screen.h5ad")
    assert adata.obs["perturbation"].astype(str).tolist() == read_cells(cells).adata.obs["gene"].astype(str).tolist()
    assert adata.obs["cell_type"].astype(str).tolist() == read_cells(cells).adata.obs["line"].astype(str).tolist()
    kept = adata.var["highly_variable"].to_numpy()
    assert adata.obsm["X_hvg"] == pytest.approx(adata.X.toarray()[:, kept])
    assert adata.obsm["X_random"].shape == (len(adata), 50)
    calls = [line.split("\x00") for line in (tmp_path / "out" / "calls.txt").read_text().splitlines()]
    assert [call[3] for call in calls] == ["train", "predict"] * 2
    assert "data.kwargs.control_pert='no \\'guide\\''" in calls[0]
    assert "training.max_steps=7" in calls[0]
    table = pd.read_csv(tmp_path / "out" / "scores.csv").set_index(["split", "method", "metric"])
    assert table.value["k562", "random", "pearson_delta"] == 0.21
    assert table.n["A172", "30 variable genes", "mse"] == 3
    assert "nothing about the embeddings" in (tmp_path / "out" / "report.md").read_text()
    # What is done is not repeated; other settings are.
    assert run(cells, python, tmp_path / "out", *options).exit_code == 0
    assert len((tmp_path / "out" / "calls.txt").read_text().splitlines()) == 4


def test_failures_of_state_are_told(cells: Path, python: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fail").touch()
    result = run(cells, python, tmp_path / "out", "--zero-shot", "A172")
    assert result.exit_code == 1
    assert "the weights are gone" in result.output
    missing = run(cells, tmp_path / "nothing", tmp_path / "out", "--zero-shot", "A172")
    assert "make an environment with `make evaluate`" in missing.output


def test_commands_are_lists_of_arguments(tmp_path: Path) -> None:
    command = StateRun(Path("python")).train("X_hvg", "a; rm -rf $HOME 'b'", tmp_path)
    assert "data.kwargs.control_pert='a; rm -rf $HOME \\'b\\''" in command
