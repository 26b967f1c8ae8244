"""A process that has imported everything once and forks a child for each command that it is asked to run.

`forked.py` starts it and sends it commands through the socket whose descriptor is argv[1]. Importing torch,
transformers and the package takes 8 CPU seconds, the fork some milliseconds.

A fork keeps only the thread that called it. The server therefore never starts a thread, nor a parallel region of
OpenMP, after which a child of libgomp's would wait for threads that are not there: it imports, and nothing else.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import random
import runpy
import selectors
import signal
import socket
import sys
import traceback
import types
from pathlib import Path
from typing import Any

# What our code imports only inside of functions, so that importing our modules does not import it.
LIBRARIES = [
    "accelerate.utils.fsdp_utils",
    "anndata",
    "datasets",
    "matplotlib.pyplot",
    "peft",
    "scanpy",
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.metrics",
    "tensorboard",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
    "typer.rich_utils",
    "zarr",
]


def import_everything() -> None:
    """Import the package's modules and the libraries that they import later."""
    import tahoex1_hf

    for module in pkgutil.walk_packages(tahoex1_hf.__path__, "tahoex1_hf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm")}
    own = Path("/proc/self/comm").read_text().strip() if threads else ""
    if left := threads - {own, "jemalloc_bg_thd"}:  # jemalloc, which pyarrow brings, knows of forks
        raise RuntimeError(f"importing started threads, which children of this process would lack: {sorted(left)}")


def run_command(request: dict[str, Any], files: list[int]) -> int:
    """Become the process that `python SCRIPT ARGUMENTS` or `python -c CODE ARGUMENTS` would be; return its status."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    sys.modules["numpy"].random.seed()  # type: ignore[attr-defined]
    option, *arguments = request["arguments"]
    try:
        if option == "-c":
            sys.argv, sys.path[:0] = ["-c", *arguments[1:]], [""]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(arguments[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
        elif option == "-m":
            sys.argv, sys.path[:0] = arguments, [""]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = [option, *arguments], [str(Path(option).parent)]
            runpy.run_path(option, run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        sys.stderr.write(f"{error.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(request: dict[str, Any], files: list[int]) -> None:
    """Run a command and end the process."""
    status = 70
    try:
        status = run_command(request, files)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status & 0xFF)


def serve(control: socket.socket) -> None:
    """Fork a child for each request; tell on the request's socket its number, then its status and CPU seconds."""
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if woken in ready:
            woken.recv(4096)
            while waiting:
                number, state, used = os.wait4(-1, os.WNOHANG)
                if not number:
                    break
                with waiting.pop(number) as answer, contextlib.suppress(OSError):  # nobody may be waiting any more
                    answer.send(f"{os.waitstatus_to_exitcode(state)} {used.ru_utime + used.ru_stime}".encode())
        if control in ready:
            message, files, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not message:  # the tests have ended
                break
            number = os.fork()
            if number == 0:
                child(json.loads(message), files)
            answer = socket.socket(fileno=files.pop())
            answer.send(str(number).encode())
            waiting[number] = answer
            for file in files:
                os.close(file)
    for number in waiting:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        import_everything()
        requests.send(b"ready")
        serve(requests)
