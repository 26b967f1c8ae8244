"""Several processes train one model: they end and resume together, and their number changes no result."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killed_runs import killed, same_weights
from safetensors.torch import load_file
from training_runs import curve, finished, status

from tahoex1_hf.runs.checkpoints import is_whole

WITHOUT_DROPOUT = {"model__expression_encoder_dropout": 0.0}


@pytest.mark.parametrize(("kind", "step"), [("ddp", 8), ("fsdp", 6)])
def test_killed_and_uninterrupted_runs_are_equal(
    kind: str, step: int, finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    killed(kind, tmp_path, training_dataset, "SIGKILL", step)
    assert status(tmp_path)["status"] == "running"
    log = finished(kind, tmp_path, training_dataset)
    assert f"checkpoint-{(step - 1) // 3 * 3}" in log
    assert status(tmp_path)["status"] == "finished"
    assert curve(tmp_path) == curve(finished_run(kind))
    assert same_weights(tmp_path, finished_run(kind))


def test_sigterm_at_one_process_ends_all_at_the_same_step(training_dataset: Path, tmp_path: Path) -> None:
    killed("ddp", tmp_path / "asked", training_dataset, "SIGTERM", 4)
    assert status(tmp_path / "asked") == {"status": "preempted", "step": 4}
    assert {"0-progress.json", "1-progress.json"} <= set(os.listdir(tmp_path / "asked" / "checkpoint-4"))


def test_a_process_that_dies_ends_the_run_and_harms_nothing(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    killed("ddp", tmp_path / "killed", training_dataset, "SIGKILL", 5, rank=1)
    folders = list((tmp_path / "killed").glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-3"]
    assert is_whole(folders[0])
    finished("ddp", tmp_path / "killed", training_dataset)
    assert same_weights(tmp_path / "killed", finished_run("ddp"))


def test_other_numbers_of_processes_see_the_same_cells(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    killed("ddp", tmp_path / "killed", training_dataset, "SIGKILL", 6, **WITHOUT_DROPOUT)
    log = finished("single", tmp_path / "killed", training_dataset, **WITHOUT_DROPOUT)
    assert "is of 2 processes, this run has 1" in log
    last, whole = curve(tmp_path / "killed")[-1], curve(finished_run("single", **WITHOUT_DROPOUT))[-1]
    assert last["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_do_not_change_the_result(kind: str, finished_run: Callable[..., Path]) -> None:
    several, single = (finished_run(name, **WITHOUT_DROPOUT) for name in (kind, "single"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (several, single))
    # The bias of the keys adds the same to all scores of a query, which softmax cancels: its gradients are rounding
    # errors, which Adam turns into whole steps.
    for name in theirs.keys() - {f"tahoe.layers.{layer}.self_attn.k_proj.bias" for layer in range(2)}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
    for line, expected in zip(curve(several), curve(single), strict=True):
        assert line == pytest.approx(dict(expected), rel=1e-4, abs=1e-6)
    if kind == "fsdp":
        shards = list((several / "checkpoint-6" / "pytorch_model_fsdp_0").glob("*.distcp"))
        sizes = [shard.stat().st_size for shard in shards]
        assert len(shards) == 2
        assert max(sizes) < 0.7 * sum(sizes), sizes
