"""Commands that run as forks of a process that has imported everything (`fork_server.py`), as `subprocess` runs them.

A command costs 1.5 CPU seconds this way, and 9 as a process that first imports torch and the package. A fork cannot
show how a process starts: the order of imports, differing hash seeds, what the launcher hands on. A few tests start
true processes for that.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
PATIENCE = 1800.0  # seconds after which a process is taken to hang, however busy the machine is
SERVER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUPPORT, SUPPORT.parent))),
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
}
FIRST_ENVIRONMENT = {**os.environ, **SERVER_ENVIRONMENT}  # before tests change theirs


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a command: the tests' own, with the values that the server's imports have read."""
    return {**os.environ, **SERVER_ENVIRONMENT, **changes}


class ForkServer:
    """The process that forks, and the path of the socket that takes its commands.

    With `package=False` it has imported libraries alone.
    """

    def __init__(self, package: bool = True) -> None:
        self.cpu_seconds = 0.0  # used by the processes that have ended, including those that launchers started
        self.folder = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.folder.name, "socket")
        self.python = Path(self.folder.name, "python")
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{SUPPORT / "forked_python.py"}" "$@"\n')
        self.python.chmod(0o755)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, str(SUPPORT / "fork_server.py"), str(theirs.fileno()), self.path]
            command += [] if package else ["libraries"]
            self.log = tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                command, env=FIRST_ENVIRONMENT, pass_fds=[theirs.fileno()], stdout=self.log, stderr=self.log
            )
        if self.control.recv(16) != b"ready":
            self.log.seek(0)
            raise RuntimeError(f"the fork server could not import everything:\n{self.log.read().decode()}")
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the server, and with it the commands that still run."""
        self.control.close()
        self.process.wait()
        self.folder.cleanup()


def cpu_seconds() -> float:
    """Return the CPU seconds of the commands that have ended."""
    return sum(each.cpu_seconds for each in _servers.values())


_servers: dict[bool, ForkServer] = {}


def server(package: bool = True) -> ForkServer:
    """Return this process's fork server, with the package or with libraries alone, which the first call starts."""
    if package not in _servers:
        _servers[package] = ForkServer(package)
    return _servers[package]


def ask(
    path: str, arguments: list[str], env: Mapping[str, str], folder: str, outputs: list[int]
) -> tuple[socket.socket, int]:
    """Have a command started; return the connection on which its end will be reported, and its process number."""
    request = {"arguments": arguments, "environment": dict(env), "folder": folder}
    answer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answer.connect(path)
    socket.send_fds(answer, [json.dumps(request).encode()], outputs)
    number = answer.recv(1 << 12).decode()
    if not number.isdecimal():
        raise ValueError(number)
    return answer, int(number)


class Forked:
    """A running command with the interface of `subprocess.Popen`; its output goes to temporary files."""

    def __init__(
        self,
        arguments: Sequence[object],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        package: bool = True,
    ) -> None:
        python, *rest = map(str, arguments)
        if python != sys.executable:
            raise ValueError(f"{python}: the fork server runs the Python of the tests alone, {sys.executable}")
        env = environment() if env is None else dict(env)
        self.args, self.returncode = [python, *rest], None
        self._files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        outputs = [file.fileno() for file in self._files]
        self._server = server(package)
        self._answer, self.pid = ask(self._server.path, rest, env, str(cwd or Path.cwd()), outputs)

    def poll(self) -> int | None:
        """Return the status of a command that has ended, or None."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the status; a negative one is the number of the signal that ended it."""
        if self.returncode is None:
            self._answer.settimeout(timeout)
            try:
                answer = self._answer.recv(64)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            if not answer:
                raise RuntimeError("the fork server ended before the command did")
            status, seconds = answer.split()
            self.returncode = int(status)
            self._answer.close()
            self._server.cpu_seconds = max(self._server.cpu_seconds, float(seconds))
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def completed(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Wait for the end, kill the command after `timeout` seconds, and return status and output."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
            raise
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
            file.close()
        assert self.returncode is not None
        return subprocess.CompletedProcess(self.args, self.returncode, *texts)


def run(
    arguments: Sequence[object],
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run(..., capture_output=True, text=True)` does."""
    return Forked(arguments, env, cwd).completed(timeout)


def launch_as_a_user(
    launcher: Sequence[object], env: Mapping[str, str] | None = None, cwd: str | Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that begins with torchrun or `accelerate launch`, as a fork that starts its processes as forks."""
    return run(launcher, {**(environment() if env is None else env), **stand_in()}, cwd)


def stand_in() -> dict[str, str]:
    """Return the variables that make torch's launcher start forks."""
    return {"PYTHON_EXEC": str(server().python), "FORK_SERVER": server().path}


def launch(
    processes: int, arguments: Sequence[object], env: Mapping[str, str], timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run a command in several processes that find one another, as `torchrun` and `accelerate launch` start them.

    As with these launchers, where one process fails the others are sent SIGTERM, and the status is 1. The outputs of
    the processes follow one another.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_MIXED_PRECISION": "no",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(processes),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher holds the store, not a process of the group
        "WORLD_SIZE": str(processes),
    }
    group = []
    for rank in map(str, range(processes)):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank}
        group.append(Forked(arguments, {**shared, **env, **ranks}))
    _wait_for_all(group, time.monotonic() + timeout)
    done = [each.completed(timeout) for each in group]
    texts = ("".join(each.stdout for each in done), "".join(each.stderr for each in done))
    return subprocess.CompletedProcess(list(map(str, arguments)), int(any(each.returncode for each in done)), *texts)


def _wait_for_all(group: list[Forked], deadline: float) -> None:
    """Wait until all processes have ended; where one fails, end the others."""
    states: list[Any] = [None]
    while None in states and not any(states):
        if time.monotonic() > deadline:
            for each in group:
                each.kill()
            raise subprocess.TimeoutExpired(group[0].args, 0.0)
        time.sleep(0.01)
        states = [each.poll() for each in group]
    for each in group:
        each.send_signal(signal.SIGTERM)
    for each in group:
        try:
            each.wait(30)
        except subprocess.TimeoutExpired:
            each.kill()
