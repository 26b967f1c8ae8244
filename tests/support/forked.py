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
from contextlib import suppress
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
    """The processes that fork (`fork_server.py`), and this process's connection to them.

    Args:
        folder: Folder of their sockets; None to start them.
        collected: Arguments of pytest whose tests the forks that run tests find collected; empty for no such forks.
    """

    def __init__(self, folder: str | None = None, collected: Sequence[str] = ()) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        if folder is None:
            self.own_folder = tempfile.TemporaryDirectory()
            self.folder = self.own_folder.name
            self.control = self.start(collected)
        else:
            self.folder = folder
            self.control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.control.connect(os.path.join(folder, "tests"))
        self.python = Path(self.folder, "python")
        self.worker_python = Path(self.folder, "worker_python")
        atexit.register(self.stop)

    def start(self, collected: Sequence[str]) -> socket.socket:
        """Start the processes; return the socket whose end ends them."""
        client = f'"{sys.executable}" -S -E "{SUPPORT / "forked_python.py"}"'
        for name, command in {
            "python": f'exec {client} "$@"',
            "worker_python": f'FORK_SERVER="{self.folder}/workers" exec {client} --worker "$@"',
        }.items():
            script = Path(self.folder, name)
            script.write_text(f"#!/bin/sh\n{command}\n")
            script.chmod(0o755)
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as log:
            command = [sys.executable, str(SUPPORT / "fork_server.py"), str(theirs.fileno()), self.folder, *collected]
            self.process = subprocess.Popen(
                command, env=FIRST_ENVIRONMENT, pass_fds=[theirs.fileno()], stdout=log, stderr=log
            )
            theirs.close()
            if control.recv(16) != b"ready":
                log.seek(0)
                raise RuntimeError(f"the fork server could not import everything:\n{log.read().decode()}")
        return control

    def stop(self) -> None:
        """Let the server end with the last process that has tests, and with it the commands that still run."""
        self.control.close()
        if self.process is not None:
            self.process.wait()
            self.own_folder.cleanup()

    def path(self, package: bool) -> str:
        """Return the path of the socket for commands that find the package imported, or libraries alone."""
        return os.path.join(self.folder, "package" if package else "libraries")


def cpu_seconds() -> float:
    """Return the CPU seconds of this process's commands that have ended, those included that launchers started."""
    if _server is None:
        return 0.0
    _server.control.send(asker().encode())
    return float(_server.control.recv(64))


def asker() -> str:
    """Return the name of this process, or of the one whose commands run this one."""
    return os.environ.get("PYTEST_XDIST_WORKER", "main")


_server: ForkServer | None = None
shared_folder: Path | None = None
"""Folder that all processes of pytest-xdist have, in which the first to need a server says where it is."""


def server(collected: Sequence[str] = ()) -> ForkServer:
    """Return the fork server, which the first call of all processes of pytest-xdist starts (`ForkServer`)."""
    global _server
    if _server is None and shared_folder is None:
        _server = ForkServer()
    elif _server is None:
        from filelock import FileLock  # which forked_python.py, without site-packages, neither has nor needs

        place = shared_folder / "fork_server"
        with FileLock(shared_folder / "fork_server.lock"):
            try:
                _server = ForkServer(place.read_text())
            except OSError:  # there is none, or it has ended
                _server = ForkServer(collected=collected)
                place.write_text(_server.folder)
    return _server


def forks_as_workers() -> bool:
    """Return whether processes of pytest-xdist can be forks: whether the server's imports read what theirs would.

    Where modules are found does not count: pytest-xdist hands its own `sys.path` on.
    """
    return sys.platform == "linux" and all(
        os.environ.get(name) == value for name, value in SERVER_ENVIRONMENT.items() if name != "PYTHONPATH"
    )


def ask(
    path: str,
    arguments: list[str],
    env: Mapping[str, str],
    folder: str,
    files: list[int],
    unchecked: Sequence[str] = (),
) -> tuple[socket.socket, int]:
    """Have a command started; return the connection on which its end will be reported, and its process number.

    Args:
        path: Path of the server's socket.
        arguments: The command, without Python.
        env: Its environment.
        folder: Where it runs.
        files: Descriptors of its standard output, its standard error and, where it reads one, its standard input.
        unchecked: Variables that may have other values than when the server imported.
    """
    request = {"arguments": arguments, "environment": dict(env), "folder": folder, "asker": asker()}
    request["unchecked"] = list(unchecked)
    answer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answer.connect(path)
    socket.send_fds(answer, [json.dumps(request).encode()], files)
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
        path = server().path(package)
        self._answer, self.pid = ask(path, rest, env, str(cwd or Path.cwd()), outputs)

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
            self.returncode = int(answer)
            self._answer.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since, and its parent has taken note
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
    return {"PYTHON_EXEC": str(server().python), "FORK_SERVER": server().path(package=True)}


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
