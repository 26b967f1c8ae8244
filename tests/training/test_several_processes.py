"""Several processes train one model: they end and resume together, and their number changes no result."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
from killed_runs import HELD, KILLED, killed, same_weights
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from training_runs import command, curve, environment, finished, run, status

from tahoex1_hf.runs.checkpoints import is_whole

WITHOUT_DROPOUT = {"model__expression_encoder_dropout": 0.0}


def same_but_for_rounding(several: Path, single: Path) -> None:
    """Compare weights and losses of runs that add the same numbers up in another order.

    A sum of a few hundred products in float32 is off by about sqrt(300) x 6e-8 = 1e-6 of its size, and so are losses.
    A weight moves by the learning rate, 1e-3 at most, times the quotient of two moments, which are as exact: in eight
    steps 8e-3 x 1e-6 and, where a gradient is small beside those that were added up, some hundred times as much.
    """
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (several, single))
    # The bias of the keys adds the same to all scores of a query, which softmax cancels: its gradients are rounding
    # errors, which Adam turns into whole steps.
    for name in theirs.keys() - {f"tahoe.layers.{layer}.self_attn.k_proj.bias" for layer in range(2)}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
    for line, expected in zip(curve(several), curve(single), strict=True):
        assert line == pytest.approx(dict(expected), rel=1e-4, abs=1e-6)


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
    shutil.copytree(finished_run("ddp", **WITHOUT_DROPOUT), tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "trainer_state.json").unlink()  # written again at the end
    log = finished("single", tmp_path / "run", training_dataset, **WITHOUT_DROPOUT)
    assert "checkpoint-3 is of 2 processes, this run has 1" in log
    last, whole = curve(tmp_path / "run")[-1], curve(finished_run("single", **WITHOUT_DROPOUT))[-1]
    assert last["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_processes_do_not_change_the_result(kind: str, finished_run: Callable[..., Path]) -> None:
    several = finished_run(kind, **WITHOUT_DROPOUT)
    same_but_for_rounding(several, finished_run("single", **WITHOUT_DROPOUT))
    if kind != "ddp":
        folder = several / "checkpoint-6" / "pytorch_model_fsdp_0"
        sizes = [shard.stat().st_size for shard in folder.glob("*.distcp")]
        assert max(sizes) < 0.7 * sum(sizes), sizes
        tensors = FileSystemReader(folder).read_metadata().state_dict_metadata
        assert len(tensors["model.tahoe.layers.0.self_attn.q_proj.weight"].chunks) == 2  # shards; of HSDP, with copies


def test_shards_are_resumed_by_another_number_of_processes(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    """Two copies of two shards, saved by four processes, become two shards of two."""
    shutil.copytree(finished_run("hsdp", **WITHOUT_DROPOUT), tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    log = finished("fsdp", tmp_path / "run", training_dataset, **WITHOUT_DROPOUT)
    assert "checkpoint-3 is of 4 processes, this run has 2" in log
    same_but_for_rounding(tmp_path / "run", finished_run("single", **WITHOUT_DROPOUT))


def test_torchrun_restarts_a_run_of_which_a_process_died(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    python, *rest = command("single", tmp_path / "run", training_dataset, KILLED)
    # By itself torchrun keeps its store for the next try (torch 2.13), in which the addresses of dead ones are.
    variables = {"KILL_AT": "5", "KILL_SIGNAL": "SIGKILL", "KILL_RANK": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = forked.launch_as_a_user([python, *launcher, *rest], {**environment("fsdp"), **variables})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-3" in done.stderr
    assert status(tmp_path / "run")["status"] == "finished"
    assert curve(tmp_path / "run") == curve(finished_run("fsdp"))
    assert same_weights(tmp_path / "run", finished_run("fsdp"))


def test_shards_are_written_while_the_training_goes_on(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    """A checkpoint has the weights of its step, though two more were made first. One cut short is not used."""
    killed("fsdp", tmp_path, training_dataset, "SIGKILL", 8, script=HELD, background_saves=True)
    assert is_whole(tmp_path / "checkpoint-3")
    assert not is_whole(tmp_path / "checkpoint-6")
    log = finished("fsdp", tmp_path, training_dataset, background_saves=True)
    assert "Resuming from" in log
    assert "checkpoint-6 was cut short" in log
    assert is_whole(tmp_path / "checkpoint-8")
    assert curve(tmp_path) == curve(finished_run("fsdp"))
    assert same_weights(tmp_path, finished_run("fsdp"))


def test_saves_in_the_background_need_shards(training_dataset: Path, tmp_path: Path) -> None:
    done = run("single", tmp_path, training_dataset, background_saves=True)
    assert done.returncode
    assert "background_saves=true needs FSDP2" in " ".join(done.stderr.replace("│", "").split())


def test_targets_of_the_whole_vocabulary_need_whole_weights(training_dataset: Path, tmp_path: Path) -> None:
    done = run("fsdp", tmp_path, training_dataset, cell_targets="all")
    assert done.returncode
    said = " ".join(done.stderr.replace("│", "").split())
    assert "cell_targets=all reads the whole table of genes, of which shards (FSDP) hold parts: use DDP." in said
