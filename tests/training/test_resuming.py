"""A run that was ended at any moment goes on as if nothing had happened: same curve, same weights, bit for bit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from killed_runs import killed, same_weights
from safetensors.torch import load_file
from training_runs import ROOT, curve, finished, run, status

from tahoex1_hf.runs.checkpoints import is_whole, last_whole, remove_old, seal

LIMITED = ROOT / "tests" / "support" / "limited_run.py"


@pytest.mark.parametrize(("kind", "step"), [("single", 5), ("ddp", 8), ("fsdp", 6)])
def test_killed_and_uninterrupted_runs_are_equal(kind: str, step: int, training_dataset: Path, tmp_path: Path) -> None:
    finished(kind, tmp_path / "whole", training_dataset)
    killed(kind, tmp_path / "killed", training_dataset, "SIGKILL", step)
    assert status(tmp_path / "killed")["status"] == "running"
    log = finished(kind, tmp_path / "killed", training_dataset)
    assert f"checkpoint-{(step - 1) // 3 * 3}" in log
    assert status(tmp_path / "killed")["status"] == "finished"
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_sigterm_saves_the_present_step_and_exits_with_its_own_code(training_dataset: Path, tmp_path: Path) -> None:
    finished("single", tmp_path / "whole", training_dataset)
    assert killed("single", tmp_path / "asked", training_dataset, "SIGTERM", 4) == 75
    assert status(tmp_path / "asked") == {"status": "preempted", "step": 4}
    assert is_whole(tmp_path / "asked" / "checkpoint-4")
    finished("single", tmp_path / "asked", training_dataset)
    assert curve(tmp_path / "asked") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "asked", tmp_path / "whole")


def test_sigterm_at_one_process_ends_all_at_the_same_step(training_dataset: Path, tmp_path: Path) -> None:
    killed("ddp", tmp_path / "asked", training_dataset, "SIGTERM", 4)
    assert status(tmp_path / "asked") == {"status": "preempted", "step": 4}
    assert {"0-progress.json", "1-progress.json"} <= set(os.listdir(tmp_path / "asked" / "checkpoint-4"))


def test_other_numbers_of_processes_see_the_same_cells(training_dataset: Path, tmp_path: Path) -> None:
    without_dropout = {"model__expression_encoder_dropout": 0.0}
    finished("single", tmp_path / "whole", training_dataset, **without_dropout)
    killed("ddp", tmp_path / "killed", training_dataset, "SIGKILL", 6, **without_dropout)
    log = finished("single", tmp_path / "killed", training_dataset, **without_dropout)
    assert "is of 2 processes, this run has 1" in log
    last, whole = curve(tmp_path / "killed")[-1], curve(tmp_path / "whole")[-1]
    assert last["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_do_not_change_the_result(kind: str, training_dataset: Path, tmp_path: Path) -> None:
    without_dropout = {"model__expression_encoder_dropout": 0.0}
    finished("single", tmp_path / "single", training_dataset, **without_dropout)
    finished(kind, tmp_path / kind, training_dataset, **without_dropout)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in (kind, "single"))
    # Keys' biases add the same to every key of a query, which softmax takes out again: their gradients are rounding
    # errors, of which Adam makes whole steps.
    for name in theirs.keys() - {f"tahoe.layers.{layer}.self_attn.k_proj.bias" for layer in range(2)}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
    for line, expected in zip(curve(tmp_path / kind), curve(tmp_path / "single"), strict=True):
        assert line == pytest.approx(dict(expected), rel=1e-4, abs=1e-6)
    if kind == "fsdp":
        shards = list((tmp_path / kind / "checkpoint-6" / "pytorch_model_fsdp_0").glob("*.distcp"))
        sizes = [shard.stat().st_size for shard in shards]
        assert len(shards) == 2
        assert max(sizes) < 0.7 * sum(sizes), sizes


def test_a_checkpoint_cut_short_is_not_resumed_from(training_dataset: Path, tmp_path: Path) -> None:
    finished("single", tmp_path / "whole", training_dataset)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    newest = last_whole(tmp_path / "cut")
    assert newest is not None
    assert newest.name == "checkpoint-8"
    with (newest / "optimizer.pt").open("rb+") as file:
        file.truncate(1000)
    (tmp_path / "cut" / "model.safetensors").unlink()
    log = finished("single", tmp_path / "cut", training_dataset)
    assert "checkpoint-8 was cut short" in log
    assert "checkpoint-6" in log
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_whole_checkpoints(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(bytes(step))
    assert last_whole(tmp_path) is None
    for step in (2, 9):
        seal(tmp_path / f"checkpoint-{step}")
    assert last_whole(tmp_path) == tmp_path / "checkpoint-9"
    remove_old(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]
    (tmp_path / "checkpoint-9" / "weights").unlink()
    assert last_whole(tmp_path) is None


def test_a_full_disk_leaves_the_last_checkpoint(training_dataset: Path, tmp_path: Path) -> None:
    # The limit on file sizes stands for the disk's end: the optimizer's state is twice the weights.
    finished("single", tmp_path / "run", training_dataset, max_steps=3)
    size = (tmp_path / "run" / "checkpoint-3" / "model.safetensors").stat().st_size
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    done = run("single", tmp_path / "run", training_dataset, LIMITED, {"LIMIT": str(int(size * 1.3))}, max_steps=6)
    assert done.returncode != 0
    assert "could not be written" in " ".join(done.stderr.split())
    assert last_whole(tmp_path / "run") is None
    finished("single", tmp_path / "run", training_dataset, max_steps=6)


def test_not_a_number_ends_the_run(training_dataset: Path, tmp_path: Path) -> None:
    done = run("single", tmp_path, training_dataset, learning_rate="1e30", warmup_fraction=0)
    assert done.returncode != 0
    assert "gradient's norm is" in " ".join(done.stderr.split())
    assert all(is_whole(folder) for folder in tmp_path.glob("checkpoint-*"))


def test_another_dataset_is_refused(training_dataset: Path, tmp_path: Path) -> None:
    finished("single", tmp_path, training_dataset, max_steps=3)
    done = run("single", tmp_path, training_dataset, max_steps=6, seed=5)
    assert done.returncode != 0
    assert "was made with other seed" in " ".join(done.stderr.replace("│", "").split())
    assert json.loads((tmp_path / "checkpoint-3" / "progress.json").read_text())["data"]["seed"] == 0
