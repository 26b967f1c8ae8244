"""Run a command in its own process, and measure its time and peak memory.

A process starts with the peak memory of the process that started it, so a command started from a benchmark that has
used 5 GB seems to use 5 GB. This file, run as a small script, stands between the two. It also ends the command, and
all that the command has started, when the benchmark ends in whatever way: it reads from a pipe that the benchmark
never writes to, and that the system closes with it.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Run:
    """Result of a command."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    output: str

    def checked(self) -> "Run":
        """Return the result, or raise RuntimeError where the command failed."""
        if self.code:
            raise RuntimeError(f"the command ended with code {self.code}:\n{self.output[-2000:]}")
        return self

    @property
    def last_line(self) -> str:
        """Last line of the output that is not empty."""
        return next((line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "")

    @property
    def reason(self) -> str:
        """Line of the output that probably says why the command failed."""
        lines = [line[line.index("Error") :].strip() for line in self.output.splitlines() if "Error" in line]
        return lines[0][:150] if lines else self.last_line or f"no output, code {self.code}"


def run(command: list[str], environment: dict[str, str] | None = None, timeout: float | None = None) -> Run:
    """Run a command in the project's folder, with its package importable and the Hub offline.

    Raises:
        subprocess.TimeoutExpired: After `timeout` seconds; the command and all that it started have then been ended.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(environment or {})}
    with (
        tempfile.TemporaryFile("w+b") as output,
        subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, *command],
            env=variables, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
            start_new_session=True,
        ) as launcher,
    ):  # fmt: skip
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        try:
            launcher.wait(timeout)
        except BaseException:
            launcher.stdin.close()  # which ends it and all that it has started
            raise
        figures = launcher.stdout.read()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Run(output=text, **json.loads(figures))


def python(*arguments: str, environment: dict[str, str] | None = None, timeout: float | None = None) -> Run:
    """Run this Python with these arguments."""
    return run([sys.executable, *arguments], environment, timeout)


def _launch(command: list[str]) -> dict[str, float]:
    # Who loses its parent becomes a child of this process, and is found at the end, whatever session it is in.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ending = threading.Event()
    threading.Thread(target=_end_with_benchmark, args=(ending,), daemon=True).start()
    start = time.perf_counter()
    # Its output goes to the same place as its errors.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    with contextlib.suppress(ChildProcessError):  # the other thread has ended the command, and waited for it
        _, status, usage = os.wait4(process.pid, 0)
    if ending.is_set():
        threading.Event().wait()  # the other thread ends this process when it has ended the others
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    peak_mb = usage.ru_maxrss / 1024
    return {"code": process.returncode, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak_mb}


def _end_with_benchmark(ending: threading.Event) -> None:
    """Wait until the benchmark is gone; then end all children, and those that become children when theirs end."""
    os.read(0, 1)
    ending.set()
    while children := [
        int(number) for path in Path("/proc/self/task").glob("*/children") for number in path.read_text().split()
    ]:
        for number in children:
            os.kill(number, signal.SIGKILL)
        for number in children:
            with contextlib.suppress(ChildProcessError):  # the other thread waited for it
                os.waitpid(number, 0)
    os._exit(1)


if __name__ == "__main__":
    print(json.dumps(_launch(sys.argv[1:])))
