"""Folders are written whole or not at all, even by a process that is killed."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN, GOLDEN_VARIANTS
from transformers import AutoModel

from tahoex1_hf.original import convert as original_checkpoints
from tahoex1_hf.original.convert import convert_original_folder
from tahoex1_hf.original.writing import workspace

PLAIN, WITH_DRUGS = GOLDEN / "a_70m_like" / "model", GOLDEN / "b_3b_like_chem" / "model"
every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PLAIN, tmp_path / "source"))


def _killed_while_writing(destination: Path) -> None:
    from transformers import modeling_utils

    real, written = modeling_utils.safe_save_file, []

    def save(tensors: dict[str, torch.Tensor], path: str, **options: Any) -> None:
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        real(tensors, path, **options)

    modeling_utils.safe_save_file = save
    convert_original_folder(PLAIN, destination, max_shard_size=200_000)


def _killed_before_the_end(destination: Path) -> None:
    def verify(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    original_checkpoints.verify_conversion = verify  # type: ignore[assignment]
    convert_original_folder(PLAIN, destination)


@pytest.mark.parametrize("kill", [_killed_while_writing, _killed_before_the_end])
def test_killed_half_way(kill: Callable[[Path], None], tmp_path: Path) -> None:
    destination = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=kill, args=(destination,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not destination.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out-")
    assert any(path.stat().st_size for path in left.glob("result/model*.safetensors"))
    convert_original_folder(PLAIN, destination)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert AutoModel.from_pretrained(destination).config.num_hidden_layers == 3


def _overtaken(destination: Path, first: Path) -> None:
    with workspace(destination) as second:
        assert first.exists()
        assert second != first
        destination.mkdir()
        (destination / "came first").touch()


def test_a_living_conversion_is_left_alone(tmp_path: Path) -> None:
    with workspace(tmp_path / "out") as first:
        (first / "result" / "x").touch()
        with pytest.raises(FileExistsError, match="exists already"):
            _overtaken(tmp_path / "out", first)
        assert first.exists()
        shutil.rmtree(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "x"]
