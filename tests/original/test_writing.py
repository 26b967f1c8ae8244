"""Folders are written whole or not at all, even by a process that is killed."""

import shutil
import signal
import sys
import textwrap
from pathlib import Path

import forked
import pytest
from helpers import GOLDEN, GOLDEN_VARIANTS
from transformers import AutoModel

from tahoex1_hf.original.convert import convert_original_folder
from tahoex1_hf.original.writing import workspace

PLAIN, WITH_DRUGS = GOLDEN / "a_70m_like" / "model", GOLDEN / "b_3b_like_chem" / "model"
every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PLAIN, tmp_path / "source"))


KILLED_WHILE_WRITING = """
    from transformers import modeling_utils

    real, written = modeling_utils.safe_save_file, []

    def save(tensors, path, **options):
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        real(tensors, path, **options)

    modeling_utils.safe_save_file = save
    convert.convert_original_folder(sys.argv[1], sys.argv[2], max_shard_size=200_000)
"""
KILLED_BEFORE_THE_END = """
    convert.verify_conversion = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    convert.convert_original_folder(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("script", [KILLED_WHILE_WRITING, KILLED_BEFORE_THE_END], ids=["writing", "before the end"])
def test_killed_half_way(script: str, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    head = "import os, signal, sys\nfrom tahoex1_hf.original import convert\n"
    # Not a fork of this process, whose threads may hold locks that the fork would wait for.
    ended = forked.run([sys.executable, "-c", head + textwrap.dedent(script), str(PLAIN), str(destination)])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
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
