"""A run that was killed goes on with the same command, measures no drug again, and writes the same bytes."""

import signal
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from planted_screens import MECHANISMS, write_screen

from tahoex1_hf.signatures import building, querying
from tahoex1_hf.signatures.building import make_signatures
from tahoex1_hf.signatures.querying import query_signatures

KILLED = Path(forked.SUPPORT) / "killed_answer.py"
OPTIONS: dict[str, Any] = {"line": "line", "plate": "plate", "permutations": 49, "progress": False}


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("screen") / "screen.parquet"
    return write_screen(path, MECHANISMS, 3.0, cells=20, controls=40)


def kill(after: int, *arguments: object) -> None:
    command = [sys.executable, KILLED, "signatures", *arguments, "--permutations", 49, "-q"]
    done = forked.run(command, forked.environment(KILL_AFTER=str(after)))
    assert done.returncode == -signal.SIGKILL, done.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def counted(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Any]:
    """Return a list that grows with each drug that is measured."""
    measure, measured = module._of_drug, []

    def counting(*arguments: Any) -> Any:
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(module, "_of_drug", counting)
    return measured


def test_killed_signatures_and_queries_go_on(screen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_signatures(screen, tmp_path / "whole", **OPTIONS)
    output, parts = tmp_path / "made", tmp_path / "made.parts"
    kill(3, screen, "--output", output, "--line", "line", "--plate", "plate")
    assert not output.exists()
    assert len(list(parts.glob("drug-*"))) == 3
    with pytest.raises(ValueError, match=r"made.parts holds an unfinished run with other settings .seed.*--restart"):
        make_signatures(screen, output, seed=1, **OPTIONS)
    with monkeypatch.context() as patch:
        measured = counted(patch, building)
        make_signatures(screen, output, **OPTIONS)
        assert len(measured) == len(MECHANISMS) - 3
    assert files(output) == files(tmp_path / "whole")

    new = write_screen(tmp_path / "new.parquet", {"x": "A", "y": "B", "z": ""}, 3.0, seed=3, cells=20, controls=40)
    query_signatures(new, output, tmp_path / "answer", permutations=49, progress=False)
    kill(2, "query", new, "--signatures", output, "--output", tmp_path / "asked")
    with monkeypatch.context() as patch:
        measured = counted(patch, querying)
        query_signatures(new, output, tmp_path / "asked", permutations=49, progress=False)
        assert len(measured) == 1
    assert files(tmp_path / "asked") == files(tmp_path / "answer")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "made", "new.parquet", "answer", "asked"}


def test_other_settings_begin_anew_where_that_is_asked_for(screen: Path, tmp_path: Path) -> None:
    kill(1, screen, "--output", tmp_path / "made", "--line", "line", "--plate", "plate")
    made = make_signatures(screen, tmp_path / "made", seed=1, restart=True, **OPTIONS)
    make_signatures(screen, tmp_path / "whole", seed=1, **OPTIONS)
    assert files(tmp_path / "made") == files(tmp_path / "whole")
    assert len(made.table) == 2 * len(MECHANISMS)
