"""The notebooks run, offline, and what is stored in them is the output of such a run."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import FIRST_ENVIRONMENT, server, stand_in
from helpers import REPO_ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = REPO_ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
BADGE = re.compile(r"\(https://colab\.research\.google\.com/github/(\S+?)/blob/main/(\S+?)\)")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_all_five_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "annotate_by_reference",
        "embed_and_cluster",
        "finetune_and_publish",
        "in_silico_perturbation",
        "pretrain_small_model",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path: Path) -> None:
    """A notebook is valid, small, explained cell by cell, run in order, and shows a figure and no error."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    source = re.search(r"^url = https://github\.com/(\S+)$", (REPO_ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert source is not None
    badge = BADGE.search(notebook.cells[0].source)
    assert badge is not None
    assert badge.groups() == (source[1], path.relative_to(REPO_ROOT).as_posix())
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert f"github.com/{source[1]}" in cells[0].source
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
    assert notebook.cells[-1].source.startswith("## What could go wrong")


def store(notebook: Any, path: Path) -> None:
    """Write a notebook that was run, without the cell that the test put before it and without messages on stderr."""
    del notebook.cells[0]
    for number, cell in enumerate(code_of(notebook), start=1):
        cell.execution_count = number
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a client with one kernel for all notebooks, forked: imports take longer than a notebook's own work."""
    from traitlets.config import Config

    folder = tmp_path_factory.mktemp("k")  # paths of sockets must be short
    environment = {**FIRST_ENVIRONMENT, **stand_in(), "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment["TMPDIR"] = environment["IPYTHONDIR"] = str(folder)
    place = {"metadata": {"path": str(FOLDER)}}
    sockets = Config({"KernelManager": {"transport": "ipc", "ip": str(folder / "socket")}})  # files, no ports
    made = nbclient.NotebookClient(
        nbformat.v4.new_notebook(), timeout=600, resources=place, record_timing=False, config=sockets
    )
    made.create_kernel_manager().kernel_spec.argv[0] = str(server().python)
    with made.setup_kernel(env=environment):
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, client: Any) -> None:
    """Every cell runs where it lies, with nothing of the notebook before, and leaves no file in the repository."""
    there = {file for file in FOLDER.iterdir() if file.name != "__pycache__"}
    notebook = read(path)
    first = "%reset -f\nimport matplotlib.pyplot\n%matplotlib inline\nmatplotlib.pyplot.close('all')"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    client.nb = notebook
    client.execute(cleanup_kc=False)
    shown = [output for cell in code_of(notebook) for output in cell.outputs if "image/png" in output.get("data", {})]
    assert shown
    assert {file for file in FOLDER.iterdir() if file.name != "__pycache__"} == there
    if os.environ.get("TAHOEX1_STORE_NOTEBOOKS"):  # `make notebooks`
        store(notebook, path)
