"""Runs that are interrupted at any moment resume as if nothing had happened."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import ToyTrainer, toy_trainer
from transformers import EarlyStoppingCallback

from tahoex1_hf.runs.checkpoints import is_whole, last_whole

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "restore_callback_states_from_checkpoint": True,
}


def log(trainer: ToyTrainer) -> list[dict[str, float]]:
    """Return the log without the entries that depend on the clock."""
    timed = ("runtime", "per_second", "total_flos")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in trainer.state.log_history]


def same_ends(trainer: ToyTrainer, whole: ToyTrainer) -> bool:
    ours, theirs = trainer.model.state_dict(), whole.model.state_dict()
    return log(trainer) == log(whole) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupted(trainer: ToyTrainer, step: int) -> None:
    def interrupt(number: int) -> None:
        if number == step:
            raise KeyboardInterrupt

    trainer.at_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def asked_to_end(trainer: ToyTrainer, step: int) -> None:
    def ask(number: int) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.at_step = ask
    trainer.run()
    assert trainer.preempted


@pytest.mark.parametrize("options", [{}, BEST], ids=["last weights", "best weights"])
@pytest.mark.parametrize("step", [5, 8, 12])
def test_an_interrupted_run_has_the_log_and_the_weights_of_a_whole_one(
    step: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """The log includes the mean loss of the run, `train_loss`."""
    whole = toy_trainer(tmp_path / "whole", **options)
    whole.run()
    interrupted(toy_trainer(tmp_path / "cut", **options), step)
    torch.manual_seed(99)  # the state of the process that resumes must not matter
    resumed = toy_trainer(tmp_path / "cut", **options)
    resumed.run()
    assert same_ends(resumed, whole)


@pytest.mark.parametrize("options", [{}, BEST], ids=["last weights", "best weights"])
def test_sigterm_between_two_lines_of_the_log(options: dict[str, Any], tmp_path: Path) -> None:
    whole = toy_trainer(tmp_path / "whole", **options)
    whole.run()
    before = signal.getsignal(signal.SIGTERM)
    asked_to_end(toy_trainer(tmp_path / "asked", **options), 7)
    assert signal.getsignal(signal.SIGTERM) is before
    assert is_whole(tmp_path / "asked" / "checkpoint-7")
    resumed = toy_trainer(tmp_path / "asked", **options)
    resumed.run()
    assert not resumed.preempted
    assert same_ends(resumed, whole)


def test_sigterm_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.at_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 12 else None
    trainer.run()
    assert not trainer.preempted


def test_the_mean_loss_of_a_run_is_the_mean_over_its_steps(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=10)  # no line of the log covers the last two steps
    losses: list[float] = []
    step = trainer.training_step
    trainer.training_step = lambda *a: losses.append(step(*a).item()) or torch.tensor(losses[-1])  # type: ignore
    trainer.run()
    lines = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert lines == pytest.approx([sum(losses[:8]) / 4, sum(losses[8:16]) / 4], rel=1e-6)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 10, rel=1e-6)


def test_epochs_follow_from_the_data(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.run()
    assert [line["epoch"] for line in trainer.state.log_history if "loss" in line] == [0.8, 1.6, 2.4]


def test_checkpoints_without_progress_are_resumed_from(tmp_path: Path) -> None:
    """Fine-tuning runs of earlier versions left such checkpoints."""
    whole = toy_trainer(tmp_path / "whole", logging_steps=3)
    whole.run()
    interrupted(toy_trainer(tmp_path / "cut", logging_steps=3), 8)
    newest = last_whole(tmp_path / "cut")
    assert newest is not None
    for path in newest.glob("*progress.json"):
        path.unlink()
    complete = json.loads((newest / "complete.json").read_text())
    complete["files"] = {name: size for name, size in complete["files"].items() if "progress" not in name}
    (newest / "complete.json").write_text(json.dumps(complete))
    resumed = toy_trainer(tmp_path / "cut", logging_steps=3)
    resumed.run()
    assert same_ends(resumed, whole)


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    interrupted(toy_trainer(tmp_path), 8)
    with pytest.raises(ValueError, match=r"checkpoint-6 was made with other seed: give the data and settings"):
        toy_trainer(tmp_path, seed=1).run()


def test_another_number_of_processes_keeps_the_whole_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two processes have left two thirds and one third of the logging window."""
    whole = toy_trainer(tmp_path / "whole")
    whole.run()
    interrupted(toy_trainer(tmp_path / "cut"), 8)
    folder = tmp_path / "cut" / "checkpoint-6"
    state = json.loads((folder / "0-progress.json").read_text())
    for number, share in enumerate((2 / 3, 1 / 3)):
        part = {**state["window"], "losses": [share * state["window"]["losses"][0]]}
        (folder / f"{number}-progress.json").write_text(json.dumps({"window": part}))
    (folder / "progress.json").write_text(json.dumps({"data": {"seed": 0}, "processes": 2}))
    (folder / "complete.json").write_text(json.dumps({"files": {}}))
    resumed = toy_trainer(tmp_path / "cut")
    resumed.run()
    assert "is of 2 processes, this run has 1" in caplog.text
    for line, expected in zip(log(resumed), log(whole), strict=True):
        assert line == pytest.approx(expected, rel=1e-6)


def test_a_run_that_has_ended_is_not_trained_further(tmp_path: Path) -> None:
    stopping = [EarlyStoppingCallback(1)]
    first = toy_trainer(tmp_path, learning_rate=100.0, callbacks=stopping, **BEST)
    first.run()
    assert first.state.global_step < 12
    again = toy_trainer(tmp_path, learning_rate=100.0, callbacks=[EarlyStoppingCallback(1)], **BEST)
    again.at_step = lambda _: pytest.fail("a step was made")
    again.run()
    ours, theirs = again.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    """The loss is lowest at the first evaluation, since steps of this size lead away from the minimum."""
    trainer = toy_trainer(tmp_path, learning_rate=100.0, **BEST)
    trainer.run()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert best != "checkpoint-12"
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {best, "checkpoint-12"}


def test_missing_best_weights_are_an_error(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, learning_rate=100.0, **BEST)
    trainer.run()
    shutil.rmtree(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    with pytest.raises(FileNotFoundError, match=r"The checkpoint with the best weights, .* is gone"):
        toy_trainer(tmp_path, learning_rate=100.0, **BEST).run()
