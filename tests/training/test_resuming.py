"""A run that was ended at any moment resumes as if nothing had happened: same curve, same weights, bit for bit."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import PATIENCE
from killed_runs import killed, same_weights
from training_runs import ROOT, command, curve, environment, finished, run, status

from tahoex1_hf.runs.checkpoints import is_whole, last_whole
from tahoex1_hf.runs.preemption import Preemption

LIMITED = ROOT / "tests" / "support" / "limited_run.py"
THREADED = ROOT / "tests" / "support" / "threaded_run.py"
# Wide enough that torch divides the work among its threads.
WIDE = {"model__hidden_size": 256, "global_batch_size": 32, "microbatch_size": 16, "max_steps": 5}


def test_killed_and_uninterrupted_runs_are_equal(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    killed("single", tmp_path, training_dataset, "SIGKILL", 5)
    assert status(tmp_path)["status"] == "running"
    # A true process, as a user starts it, not one of the fork server's.
    again = command("single", tmp_path, training_dataset)
    done = subprocess.run(
        again, env=environment("single"), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "checkpoint-3" in done.stderr
    assert status(tmp_path)["status"] == "finished"
    assert curve(tmp_path) == curve(finished_run("single"))
    assert same_weights(tmp_path, finished_run("single"))


def test_sigterm_saves_the_current_step_and_exits_with_its_own_code(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    assert killed("single", tmp_path, training_dataset, "SIGTERM", 4) == 75
    assert status(tmp_path) == {"status": "preempted", "step": 4}
    assert is_whole(tmp_path / "checkpoint-4")
    finished("single", tmp_path, training_dataset)
    assert curve(tmp_path) == curve(finished_run("single"))
    assert same_weights(tmp_path, finished_run("single"))


def test_a_checkpoint_cut_short_is_not_resumed_from(
    finished_run: Callable[..., Path], training_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run("single"), tmp_path / "cut")
    newest = last_whole(tmp_path / "cut")
    assert newest is not None
    assert newest.name == "checkpoint-8"
    with (newest / "optimizer.pt").open("rb+") as file:
        file.truncate(1000)
    (tmp_path / "cut" / "model.safetensors").unlink()
    log = finished("single", tmp_path / "cut", training_dataset)
    assert "checkpoint-8 was cut short" in log
    assert "checkpoint-6" in log
    assert same_weights(tmp_path / "cut", finished_run("single"))


def test_a_full_disk_leaves_the_last_checkpoint(training_dataset: Path, tmp_path: Path) -> None:
    # A limit on file sizes stands for a full disk: the optimizer's state is twice as large as the weights.
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


@pytest.fixture
def busy_neighbour() -> Iterator[None]:
    """Run a process that never rests, so that threads meet in another order in every run; it gives way to others."""
    script = "import os\nos.nice(19)\nwhile True: pass"
    neighbour = subprocess.Popen([sys.executable, "-S", "-E", "-c", script])
    yield
    neighbour.kill()
    neighbour.wait()


def test_two_threads_beside_a_busy_neighbour_change_no_bit(
    busy_neighbour: None, training_dataset: Path, tmp_path: Path
) -> None:
    kill = {"KILL_AT": "4", "KILL_SIGNAL": "SIGKILL", "KILL_RANK": "0"}
    for name, more in (("one", {}), ("killed", kill), ("killed", {})):
        done = run("single", tmp_path / name, training_dataset, THREADED, {"THREADS": "2", **more}, **WIDE)
        assert done.returncode == (-signal.SIGKILL if more else 0), done.stderr[-2000:]
    assert "checkpoint-3" in done.stderr  # the killed run resumed from there
    assert same_weights(tmp_path / "one", tmp_path / "killed")  # two runs, and more: one of them was killed


def test_checkpoints_that_the_launcher_would_cut_short_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    preemption = Preemption()
    preemption.note_save(45)  # no launcher
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    preemption.note_save(29)
    assert not caplog.records
    preemption.note_save(45)
    preemption.note_save(46)
    (line,) = caplog.messages
    assert "took 45 s" in line
    assert "30 s after SIGTERM" in line
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=91" in line
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "91")
    Preemption().note_save(46)
    assert len(caplog.records) == 1
