"""A benchmark's command ends with it, and with it all that it has started."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import child

# A command that starts a process in a session of its own, as torch's launcher does, and waits for it.
COMMAND = """
import os, subprocess, sys, time
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, "-S", __file__, sys.argv[1], "worker"], start_new_session=True).wait()
with open(sys.argv[1] + ".partial", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(3600)
"""
BENCHMARK = "import sys; from benchmarks.child import run; run(sys.argv[1:])"


def wait_for_end(worker: int) -> None:
    """Wait until a process is gone; one that stays is ended here, and is a failure."""
    deadline = time.monotonic() + 600
    while psutil.pid_exists(worker):
        if time.monotonic() > deadline:
            os.kill(worker, 9)
            pytest.fail("the worker outlived the benchmark")
        time.sleep(0.01)


def test_a_command_gives_its_output_and_figures() -> None:
    run = child.python("-S", "-c", "print('one'); raise SystemExit(3)")
    assert (run.code, run.last_line) == (3, "one")
    assert run.peak_mb > 1
    assert 0 < run.cpu_seconds
    with pytest.raises(RuntimeError, match="code 3"):
        run.checked()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for children in /proc")
def test_workers_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    script, place = tmp_path / "command.py", tmp_path / "worker"
    script.write_text(COMMAND)
    command = [sys.executable, "-S", str(script), str(place)]
    benchmark = subprocess.Popen([sys.executable, "-S", "-c", BENCHMARK, *command], cwd=child.ROOT)
    while not place.exists():
        time.sleep(0.01)
    worker = int(place.read_text())
    benchmark.kill()
    benchmark.wait()
    wait_for_end(worker)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for children in /proc")
def test_workers_end_at_the_limit_of_time(tmp_path: Path) -> None:
    script, place = tmp_path / "command.py", tmp_path / "worker"
    script.write_text(COMMAND)
    limit = 0.5
    while not place.exists():  # the machine may be so busy that the worker is not there in time
        limit *= 2
        with pytest.raises(subprocess.TimeoutExpired):
            child.python("-S", str(script), str(place), timeout=limit)
    wait_for_end(int(place.read_text()))


def test_a_command_finds_what_the_benchmark_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/packages")
    done = child.python("-c", "import os; print(os.environ['PYTHONPATH'])").checked()
    assert done.last_line.split(os.pathsep) == [str(child.ROOT), "/packages"]
