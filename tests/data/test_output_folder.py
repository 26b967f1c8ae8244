"""What the output folder of `prepare` may hold, and kills at every moment of emptying it and of beginning anew."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cells import make_cells, read_dataset, write_cells, write_vocab
from preparing import source

from tahoex1_hf.common.folders import Folder
from tahoex1_hf.data import output_folder
from tahoex1_hf.data.config import PrepareConfig, parse_config
from tahoex1_hf.data.output_folder import claim
from tahoex1_hf.data.preparation import _identity, prepare


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    path = write_cells(make_cells(30), tmp_path / "cells", "csr")
    vocab = write_vocab(tmp_path)
    return parse_config({"sources": [source(path)], "output": str(tmp_path / "out"), "vocab": str(vocab)}, "the test")


def dataset(folder: Path) -> Any:
    return read_dataset(folder).to_dict("list")


def same(one: Any, two: Any) -> bool:
    return json.dumps(one, default=lambda value: value.tolist()) == json.dumps(
        two, default=lambda value: value.tolist()
    )


def kill_after(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill when so many files or folders have been made, moved or removed."""
    calls = iter(range(10_000))

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) >= number:
                raise Killed
            return function(*arguments, **options)

        return call

    for owner, names in ((os, ("unlink", "rmdir", "mkdir", "replace")), (Path, ("touch", "unlink", "mkdir"))):
        for name in names:
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


def test_a_kill_at_any_moment_of_overwriting(
    tmp_path: Path, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder never says that it is complete when it is not, and the next run, with or without the option, ends."""
    prepare(config)
    out, whole = tmp_path / "out", dataset(tmp_path / "out")
    shutil.copytree(out, tmp_path / "copy")
    identity = _identity(config)
    for number in range(40):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "copy", out)
        with monkeypatch.context() as patch:
            kill_after(number, patch)
            try:
                claim(Folder(str(out)), identity, overwrite=True)
            except Killed:
                killed = True
            else:
                killed = False
        if (out / "manifest.json").is_file():
            assert same(dataset(out), whole), number
        else:
            assert claim(Folder(str(out)), identity, overwrite=False) is None, number
        if not killed:
            break
    assert not killed
    prepare(config)
    assert same(dataset(out), whole)


def test_a_kill_at_any_moment_of_beginning(
    tmp_path: Path, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_after(number, patch)
            with pytest.raises(Killed):
                prepare(config)
        prepare(config)
        assert len(read_dataset(tmp_path / "out")) == 30


def test_a_folder_that_says_complete_and_is_not(tmp_path: Path, config: PrepareConfig) -> None:
    """As an earlier version left it when it was killed while it removed."""
    prepare(config)
    whole = dataset(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "data")
    prepare(config)
    assert same(dataset(tmp_path / "out"), whole)


def test_all_was_done_but_removing_the_work_folder(tmp_path: Path, config: PrepareConfig) -> None:
    manifest = prepare(config)
    (tmp_path / "out" / ".prepare" / "pieces").mkdir(parents=True)
    state = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare(config) == manifest
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == state
    assert not (tmp_path / "out" / ".prepare").exists()


def test_the_manifest_names_no_paths_of_this_machine(tmp_path: Path, config: PrepareConfig) -> None:
    manifest = prepare(config)
    assert str(tmp_path) not in json.dumps(manifest)
    assert manifest["configuration"]["sources"][0]["paths"] == ["cells.h5ad"]
    assert manifest["configuration"]["vocab"] == "vocab.json"
    assert prepare(config) == manifest
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "cells.h5ad", tmp_path / "other")
    other = {"sources": [source(tmp_path / "other" / "cells.h5ad")], "output": config.output, "vocab": config.vocab}
    with pytest.raises(ValueError, match=r"other settings \(paths\)"):
        prepare(parse_config(other, "the test"))
    manifest = prepare(config.model_copy(update={"output": str(tmp_path / "full")}), full_paths=True)
    assert manifest["sources"][0]["files"][0]["path"] == str(tmp_path / "cells.h5ad")


def test_a_dataset_of_an_earlier_version(tmp_path: Path, config: PrepareConfig) -> None:
    """Its manifest has the whole paths in the settings, and no digest of them."""
    manifest = {**prepare(config), **_identity(config)}
    del manifest["identity_sha256"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(config) == manifest
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        prepare(config.model_copy(update={"seed": 5}))


def test_a_damaged_manifest_is_named(tmp_path: Path, config: PrepareConfig) -> None:
    (tmp_path / "out").mkdir()
    for text in ("{", "[]"):
        (tmp_path / "out" / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"out/manifest\.json"):
            prepare(config)


def test_strangers_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="not empty"):
        claim(Folder(str(tmp_path)), {"configuration": {}}, overwrite=True)
    assert output_folder.LOCK == ".prepare.lock"
