"""Run a command in its own process, and measure its time and peak memory.

A process starts with the peak memory of the process that started it, so a command started from a benchmark that has
used 5 GB seems to use 5 GB. This file, run as a small script, stands between the two.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(environment or {})}
    with tempfile.TemporaryFile("w+b") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, *command],
            env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            figures, _ = launcher.communicate(timeout=timeout)
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
            raise
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Run(output=text, **json.loads(figures))


def python(*arguments: str, environment: dict[str, str] | None = None, timeout: float | None = None) -> Run:
    """Run this Python with these arguments."""
    return run([sys.executable, *arguments], environment, timeout)


def _launch(command: list[str]) -> dict[str, float]:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)  # its output goes to the same place as its errors
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    peak_mb = usage.ru_maxrss / 1024
    return {"code": process.returncode, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak_mb}


if __name__ == "__main__":
    print(json.dumps(_launch(sys.argv[1:])))
