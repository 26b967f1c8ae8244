"""All commands share help, messages, errors and interruption."""

import ast
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from helpers import GOLDEN, REPO_ROOT
from snippets import every_command
from typer.core import TyperOption
from typer.testing import CliRunner, Result

import tahoex1_hf
from tahoex1_hf.cli.app import app
from tahoex1_hf.cli.running import command

CELLS, MODEL = GOLDEN / "a_70m_like" / "adata.h5ad", REPO_ROOT / "examples" / "demo_checkpoint"
COMMANDS = {
    *("embed", "perturb", "predict", "prepare", "pretrain", "finetune", "recipes", "convert", "export"),
    *("annotate", "build-vocab", "drug-fingerprints", "evaluate", "verify-release", "index build", "index query"),
    *("signatures build", "signatures query", "impute", "report"),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def messages_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the logging that `--verbose` and `--quiet` change, since all tests of a process share it."""
    monkeypatch.setenv("TQDM_DISABLE", "")
    yield
    logging.getLogger("tahoex1_hf").setLevel(logging.NOTSET)


def test_every_command_has_the_shared_options() -> None:
    commands = every_command()
    assert set(commands) == COMMANDS
    for name, each in commands.items():
        options = {option for parameter in each.params for option in parameter.opts}
        assert {"--quiet", "--verbose", "--debug"} <= options, name
        # Typers before 0.22 keep no help of arguments.
        assert all(parameter.help for parameter in each.params if isinstance(parameter, TyperOption)), name
        assert run(*name.split(), "--help").exit_code == 0, name


def test_functions_that_commands_import_when_they_run_exist() -> None:
    """Otherwise only running a command would show that a function which it imports has moved."""
    for path in (REPO_ROOT / "tahoex1_hf" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tahoex1_hf"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{path.name} imports {alias.name} of {node.module}"


def test_public_names() -> None:
    assert set(tahoex1_hf.__all__) <= set(dir(tahoex1_hf))
    for name in tahoex1_hf.__all__:
        assert getattr(tahoex1_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tahoex1_hf.no_such_name


@pytest.mark.parametrize("first", ["from tahoex1_hf.cli import app", "import tahoex1_hf.cli.app"])
def test_the_app_is_found_in_the_package_too(first: str) -> None:
    code = f"{first}\nfrom tahoex1_hf.cli import app\nfrom tahoex1_hf.cli.app import app as same"
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    subprocess.run([sys.executable, "-c", f"{code}\nassert app is same, app"], env=environment, check=True)


def test_version() -> None:
    assert run("--version").output == f"tahoex1_hf {tahoex1_hf.__version__}\n"


def test_completion_knows_the_commands_and_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['tahoex1']; from tahoex1_hf.cli import app\n"
    code += "try: app(prog_name='tahoex1')\nfinally: assert 'torch' not in sys.modules, 'torch'"
    completion = {"_TAHOEX1_COMPLETE": "complete_bash", "COMP_WORDS": "tahoex1 pre", "COMP_CWORD": "1"}
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), **completion}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == {"predict", "prepare", "pretrain"}, done.stderr
    environment |= {"COMP_WORDS": "tahoex1 pretrain 3b", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == {"3b-stage1", "3b-stage2"}, done.stderr


@pytest.mark.parametrize("module", ["tahoex1_hf", "tahoex1_hf.cli"])
def test_the_package_can_be_run(module: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Usage: tahoex1 " in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not {"torch", "transformers", "numpy", "pydantic", "yaml"} & imported  # they make --help slow


# The rest, with a command made for it ------------------------------------------------------------------------------


def command_that(raises: BaseException | None, **settings: object) -> typer.Typer:
    made = typer.Typer()

    @made.command()
    @command(**settings)  # type: ignore[arg-type]
    def work() -> str:
        """Do something."""
        logging.getLogger("tahoex1_hf.test").info("a step is done")
        if raises is not None:
            raise raises
        return "Wrote it"

    return made


def test_an_interrupted_command_says_how_to_resume() -> None:
    result = CliRunner().invoke(command_that(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert result.output == "Stopped. The same command resumes the run.\n"


@pytest.mark.parametrize(
    ("error", "settings", "code", "message"),
    [
        (ValueError("seed=-1: pass 0 or more."), {}, 1, "Error: seed=-1: pass 0 or more.\n"),
        (FileNotFoundError("a.h5ad does not exist"), {"error_code": 2}, 2, "Error: a.h5ad does not exist\n"),
        (RuntimeError("shards differ"), {"errors": (RuntimeError,)}, 1, "Error: shards differ\n"),
        (
            ModuleNotFoundError("No module named 'rdkit'", name="rdkit"),
            {"extra": "drugs"},
            1,
            "Error: rdkit is missing: pip install 'tahoex1_hf[drugs]'.\n",
        ),
    ],
)
def test_errors_are_sentences(error: Exception, settings: dict[str, object], code: int, message: str) -> None:
    result = CliRunner().invoke(command_that(error, **settings))
    assert (result.exit_code, result.output) == (code, message)


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), KeyError("X"), ModuleNotFoundError("no", name="tahoex1_hf.nowhere")]
)
def test_what_no_one_foresaw_is_a_sentence_and_debug_shows_the_traceback(error: Exception) -> None:
    result = CliRunner().invoke(command_that(error))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert str(error) in result.output
    assert "--debug" in result.output or isinstance(error, ImportError)
    assert CliRunner().invoke(command_that(error), ["--debug"]).exception is error


def test_what_no_one_foresaw_names_the_files_of_the_command(tmp_path: Path) -> None:
    file, made = tmp_path / "cells.h5ad", typer.Typer()
    file.touch()

    @made.command()
    @command()
    def work(sources: list[str], table: Path) -> None:
        """Do something."""
        raise TypeError("an int is no str\nand so on")

    result = CliRunner().invoke(made, [str(file), "nowhere.csv"])
    assert result.output.startswith(f"Error: {file}: TypeError: an int is no str. ")


def test_a_commands_own_exit_code_is_kept() -> None:
    assert CliRunner().invoke(command_that(typer.Exit(75), errors=(RuntimeError,))).exit_code == 75


def test_quiet_and_verbose(caplog: pytest.LogCaptureFixture) -> None:
    assert CliRunner().invoke(command_that(None)).output == "Wrote it\n"
    assert CliRunner().invoke(command_that(None), ["--quiet"]).output == ""
    assert os.environ["TQDM_DISABLE"] == "1"
    caplog.clear()
    assert CliRunner().invoke(command_that(ValueError("wrong")), ["--verbose"]).exit_code == 1
    (record,) = [record for record in caplog.records if record.exc_info]
    assert isinstance(record.exc_info[1], ValueError)  # type: ignore[index]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_silences_the_bars_of_all_libraries(quiet: bool) -> None:
    """tqdm reads its variable when it is imported, which must not come before `--quiet` has set it."""
    code = f"""
import tahoex1_hf.cli.app
from tahoex1_hf.cli.running import set_up_logging
set_up_logging({quiet}, False)
import tahoex1_hf.common.progress
from tqdm.auto import tqdm
from transformers.utils import logging
assert [bar.disable for bar in (tqdm(range(1)), logging.tqdm(range(1)))] == [{quiet}] * 2
"""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_reported_in_a_sentence(tmp_path: Path) -> None:
    out = ["--device", "cuda"]
    for arguments in (
        ("embed", CELLS, tmp_path / "out.npy", "--model", MODEL, *out),
        ("perturb", CELLS, tmp_path / "out.csv", "--model", MODEL, "--genes", "all", *out),
        ("predict", CELLS, tmp_path / "out.h5ad", "--model", MODEL, *out),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        message = " ".join(result.output.split())
        assert "device='cuda' cannot be used" in message
        assert "pass cpu, or leave the device out" in message


def test_no_garbage_is_looked_for_while_modules_are_imported() -> None:
    code = """
import gc, sys
searches = []
gc.callbacks.append(lambda phase, info: searches.append(phase))
from tahoex1_hf.cli.running import quick_imports
gc.collect()
searches.clear()
with quick_imports():
    import xml.dom.minidom, tahoex1_hf.encoding_tahoe_x1
    assert not searches, searches
assert gc.isenabled() and gc.get_freeze_count() > 1000, gc.get_freeze_count()
gc.unfreeze()
gc.disable()
with quick_imports():
    import xml.dom.minidom
assert not gc.isenabled() and gc.get_freeze_count() == 0, gc.get_freeze_count()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
