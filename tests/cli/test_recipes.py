"""Recipes are found by name in the package, in a user's own file, and at their earlier paths."""

from pathlib import Path

import pytest
import yaml
from helpers import REPO_ROOT
from typer.testing import CliRunner, Result

from tahoex1_hf.cli.app import app
from tahoex1_hf.common.recipes import FOLDERS, find_recipe, packaged_recipes, read_recipe
from tahoex1_hf.data.config import read_config, with_overrides
from tahoex1_hf.finetuning.config import read_finetune_config
from tahoex1_hf.training.config import read_pretrain_config

ALL = {name: path for command in FOLDERS for name, path in packaged_recipes(command).items()}
CLONE = REPO_ROOT / "examples" / "configs"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["recipes", *arguments])


def test_every_recipe_has_a_line_of_its_own() -> None:
    assert len(ALL) == sum(len(packaged_recipes(command)) for command in FOLDERS), "two recipes have one name"
    lines = run().output.splitlines()
    assert [line.split()[1] for line in lines] == list(ALL)
    for line in lines:
        title = line.split(maxsplit=2)[2]
        assert title.endswith((".", ":")), line
        assert len(line) <= 130, line


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_is_printed_as_it_is(name: str) -> None:
    assert run(name).output == ALL[name].read_text()


def test_an_unknown_name_is_an_error_that_lists_the_names(tmp_path: Path) -> None:
    assert "it is one of 1_3b, 3b-stage1" in run("7b").output
    result = CliRunner().invoke(app, ["pretrain", "7b", f"output_dir={tmp_path}"])
    assert result.exit_code == 2
    assert "neither a file nor one of the recipes for pretrain: 1_3b, 3b-stage1" in " ".join(result.output.split())


def test_recipes_by_name_and_by_file_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO_ROOT)
    mine = tmp_path / "mine.yaml"
    mine.write_text(run("70m").output)
    assert read_pretrain_config("70m") == read_pretrain_config(mine) == read_pretrain_config(ALL["70m"])
    mine.write_text(run("classification").output)
    assert read_finetune_config("classification") == read_finetune_config(mine)
    mine.write_text(run("census").output)
    assert read_config("census") == read_config(mine)


def test_a_file_takes_precedence_over_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("debug", "pretrain") == ALL["debug"]
    Path("debug").write_text("seed: 1\n")
    assert read_recipe("debug", "pretrain") == {"seed": 1}


@pytest.mark.parametrize(
    ("folder", "command"), [("pretrain", "pretrain"), ("finetune", "finetune"), ("data", "prepare")]
)
def test_earlier_paths_still_work(folder: str, command: str) -> None:
    found = {path.stem: path.read_text() for path in (CLONE / folder).glob("*.yaml")}
    assert found == {name: path.read_text() for name, path in packaged_recipes(command).items()}


def test_files_of_the_clone_are_left_out_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that a recipe names for a first try must not get in the way of a user's own cells."""
    monkeypatch.chdir(tmp_path)
    own = ["data=cells.h5ad", "label=kind", "output_dir=out"]
    config = read_finetune_config("classification", [*own, "model=base"])
    assert (config.model, config.gene_symbols) == ("base", None)
    with pytest.raises(ValueError, match="model"):
        read_finetune_config("classification", own)
    monkeypatch.chdir(REPO_ROOT)
    assert read_finetune_config("classification").gene_symbols == "examples/pbmc68k_symbol_to_ensembl.csv"
    mine = tmp_path / "mine.yaml"  # a user's own file is taken as it is
    mine.write_text(yaml.safe_dump({"model": "examples/nowhere"}))
    assert read_recipe(mine, "finetune") == {"model": "examples/nowhere"}


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
def test_files_other_than_recipes_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.yaml (is not YAML|must hold keys and values)"):
        read_recipe(tmp_path / "wrong.yaml", "pretrain")


@pytest.mark.parametrize("text", ['files: ["a\\udcff"]', '"a\\udcff": 1', 'a: {b: "\\udcff"}'])
def test_text_that_is_no_text_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.yaml holds '.*udcff', which is no valid Unicode text"):
        read_recipe(tmp_path / "wrong.yaml", "prepare")
    with pytest.raises(ValueError, match=r"the command line holds 'output_dir=.udcff'"):
        with_overrides({}, ["output_dir=\udcff"])
