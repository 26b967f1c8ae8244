"""A process that has imported everything once and forks a child for each command that it is asked to run.

`forked.py` starts it, and `forked_python.py` stands for Python where a launcher starts processes. Both connect to
the socket `package` in the folder argv[2] for each command, or to `libraries`, where a second server listens, forked
before the package was imported. Processes of pytest-xdist connect to `workers`: if argv has pytest's arguments after
the folder, a third server listens there, which has collected the tests. Importing torch, transformers and the package
takes 8 CPU seconds, the fork some milliseconds. All processes of pytest-xdist share the servers, which end when the
last of them closes its connection: the first has the socket whose descriptor is argv[1], the others connect to the
socket `tests`.

A fork keeps only the thread that called it. The server therefore never starts a thread, nor a parallel region of
OpenMP, after which a child of libgomp's would wait for threads that are not there: it imports, and nothing else.
"""

import contextlib
import gc
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
import threading
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Libraries read these variables while they are imported, so a command with other values must start as a process.
READ_AT_IMPORT = ("MKL_", "NUMBA_", "OMP_", "OPENBLAS_", "PYTHON", "TORCH_", "TORCHAO_", "TRANSFORMERS_")
SET_BY_LAUNCHERS = {
    "PYTHON_EXEC",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
}  # read later, or by launchers alone
# Our code imports these only inside functions, so importing our modules does not import them.
LIBRARIES = [
    "accelerate.utils.fsdp_utils",
    "anndata",
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "PIL.JpegImagePlugin",
    "peft",
    "scanpy",
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.metrics",
    "tensorboard",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
    "typer.rich_utils",
    "zarr",
]


# What remote code and its users import.
LIBRARIES_OF_REMOTE_CODE = [
    "anndata",
    "peft",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.pipelines",
    "transformers.tokenization_python",
]


def import_package() -> None:
    """Import all modules of the package, and UMAP as the package does, whose compiled loops are loaded from disk."""
    import tahoex1_hf
    from tahoex1_hf.common.plots import import_umap

    for module in pkgutil.walk_packages(tahoex1_hf.__path__, "tahoex1_hf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with contextlib.suppress(ImportError):
        import_umap()


def fill_numba() -> None:
    """Load what numba knows about Python and NumPy, which it does before it first compiles: 0.25 CPU seconds."""
    import one_compiler
    from numba.core.registry import cpu_target

    one_compiler.install()
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def import_everything(names: list[str]) -> None:
    """Import libraries, and make sure that this started no thread."""
    for name in names:
        importlib.import_module(name)
    check_threads()


def check_threads() -> None:
    """Raise RuntimeError if there are threads that a fork would lack, of Python or with a name of their own.

    Those of NumPy's OpenBLAS, which it has where it may use two cores, are named like the process, and know of forks.
    """
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm")}
    own = Path("/proc/self/comm").read_text().strip() if threads else ""
    threads |= {thread.name for thread in threading.enumerate() if thread is not threading.main_thread()}
    if left := threads - {own, "jemalloc_bg_thd"}:  # jemalloc, which pyarrow brings, knows of forks
        raise RuntimeError(f"importing started threads, which children of this process would lack: {sorted(left)}")


def read_hub_variables() -> None:
    """Make the libraries read the Hub's variables again: where it is, where its cache is, whether to use them."""
    import huggingface_hub
    import transformers.dynamic_module_utils
    import transformers.utils.hub

    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    # Remote code is copied to and imported from here; each module holds the name by itself.
    modules = os.path.join(huggingface_hub.constants.HF_HOME, "modules")
    for module in (transformers.utils.hub, transformers.dynamic_module_utils):
        module.HF_MODULES_CACHE = os.environ.get("HF_MODULES_CACHE", modules)


def renew_thread_pool() -> None:
    """Have torch make anew its pool of threads, which a fork has lost.

    The first thread that asks for it does so otherwise. With torch 2.15 eight threads of autograd ask at the same time
    when a compiled model is traced; one of them found none, which ended the process ("Invalid thread pool!").
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())  # type: ignore[attr-defined]


def run_command(request: dict[str, Any], files: list[int]) -> int:
    """Become the process that `python SCRIPT ARGUMENTS` or `python -c CODE ARGUMENTS` would be; return its status."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for file, own in zip(files, (1, 2, 0), strict=False):
        os.dup2(file, own)
    os.environ.clear()
    os.environ.update(request["environment"])
    if any(name.startswith("HF_") for name in request["environment"]):
        read_hub_variables()
    os.chdir(request["folder"])
    random.seed()
    sys.modules["numpy"].random.seed()  # type: ignore[attr-defined]
    renew_thread_pool()
    option, *arguments = request["arguments"]
    if option == "-u":  # launchers ask for it: output without a delay
        option, *arguments = arguments
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
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


def refusal(environment: dict[str, str], unchecked: list[str]) -> str:
    """Name the variables that the imports have read and that have other values in a command's environment."""
    names = {name for name in {*environment, *os.environ} if name.startswith(READ_AT_IMPORT)}
    names -= {*SET_BY_LAUNCHERS, *unchecked}
    return ", ".join(sorted(name for name in names if environment.get(name) != os.environ.get(name)))


def listen(path: str) -> socket.socket:
    """Return a socket to which others connect by this path."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    return listener


class Server:
    """The running children, each with the connection on which its end is awaited.

    It ends when all of `tests` are closed, those included that connect to the listener `more`. On each it answers the
    name of a process that asks with the CPU seconds of that process's children that have ended.

    Args:
        listener: Socket on which commands come.
        tests: First of the connections whose ends end the server.
        more: Listener for further ones.
        another: Server of this kind whose seconds are added.
    """

    def __init__(
        self,
        listener: socket.socket,
        tests: socket.socket,
        more: socket.socket | None = None,
        another: socket.socket | None = None,
    ) -> None:
        self.listener, self.tests, self.more, self.another = listener, {tests}, more, another
        self.ended, self.wake = socket.socketpair()
        for end in (self.ended, self.wake):
            end.setblocking(False)
        self.waiting: dict[int, tuple[socket.socket, str]] = {}
        self.cpu_seconds: dict[str, float] = {}  # of the children that have ended, by the process that asked for them
        self.selector = selectors.DefaultSelector()
        for each in (listener, tests, self.ended, *([] if more is None else [more])):
            self.selector.register(each, selectors.EVENT_READ)

    def serve(self) -> None:
        """Start the commands that are asked for until the tests end; then end those that still run."""
        signal.set_wakeup_fd(self.wake.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while self.tests:
            ready = {key.fileobj for key, _ in self.selector.select()}
            if self.ended in ready:
                self.ended.recv(4096)
                self.report_ends()
            if self.more is not None and self.more in ready:
                connection = self.more.accept()[0]
                self.tests.add(connection)
                self.selector.register(connection, selectors.EVENT_READ)
            for each in self.tests & ready:
                if name := each.recv(64):
                    each.send(str(self.seconds(name.decode())).encode())
                else:
                    self.selector.unregister(each)
                    self.tests.remove(each)
                    each.close()
            for number, (answer, _) in self.waiting.items():
                if answer in ready:  # the process that asked for the child is gone
                    self.selector.unregister(answer)
                    os.kill(number, signal.SIGKILL)
            if self.listener in ready:
                self.start()
        for number in self.waiting:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)

    def seconds(self, asker: str) -> float:
        """Return the CPU seconds of the children that a process asked for and that have ended."""
        seconds = self.cpu_seconds.get(asker, 0.0)
        if self.another is not None:
            self.another.send(asker.encode())
            seconds += float(self.another.recv(64))
        return seconds

    def start(self) -> None:
        """Fork a child for a command and answer with its number, or say why not."""
        answer, _ = self.listener.accept()
        message, files, _, _ = socket.recv_fds(answer, 1 << 20, 3)
        request = json.loads(message)
        if refused := refusal(request["environment"], request["unchecked"]):
            answer.send(f"{refused}: other than the fork server's; start a process with subprocess".encode())
            answer.close()
        else:
            number = os.fork()
            if number == 0:
                others = [waiting for waiting, _ in self.waiting.values()]
                for each in (answer, self.listener, *self.tests, *others, *([] if self.more is None else [self.more])):
                    each.close()
                child(request, files)
            answer.send(str(number).encode())
            self.waiting[number] = answer, request["asker"]
            self.selector.register(answer, selectors.EVENT_READ)
        for file in files:
            os.close(file)

    def report_ends(self) -> None:
        """Send the status of the children that have ended."""
        while self.waiting:
            number, state, used = os.wait4(-1, os.WNOHANG)
            if not number:
                break
            answer, asker = self.waiting.pop(number)
            self.cpu_seconds[asker] = self.cpu_seconds.get(asker, 0.0) + used.ru_utime + used.ru_stime
            with answer, contextlib.suppress(OSError, KeyError):  # KeyError: unregistered
                answer.send(str(os.waitstatus_to_exitcode(state)).encode())
                self.selector.unregister(answer)


def freeze() -> None:
    """Keep what is imported from garbage collection.

    Each end of a training collects garbage; that would visit all imported objects, and so copy their memory.
    """
    gc.collect()
    gc.freeze()


def fork_server(path: str, prepare: Callable[[], object] = lambda: None) -> socket.socket:
    """Fork a server, which first calls `prepare`; it ends when the returned socket is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        prepare()
        server = Server(listen(path), theirs)
        theirs.send(b"ready")
        server.serve()
        os._exit(0)
    theirs.close()
    if ours.recv(16) != b"ready":
        raise RuntimeError(f"{path}: the server could not be prepared")
    return ours


class FailedImports:
    """A plugin of pytest that forgets the test modules that failed or were skipped: pytest leaves them half made."""

    def pytest_sessionstart(self, session: Any) -> None:
        """Note the folder from which the reports name files."""
        self.root = session.config.rootpath

    def pytest_collectreport(self, report: Any) -> None:
        """Forget the module of such a report, so that a worker imports it, and fails or skips it, once more."""
        if not report.passed:
            path = self.root / report.nodeid.partition("::")[0]
            for name, module in list(sys.modules.items()):
                if (file := getattr(module, "__file__", None)) and Path(file) == path:
                    del sys.modules[name]


def collect(arguments: list[str]) -> None:
    """Collect tests as pytest does, so that processes of pytest-xdist find them imported; they report errors."""
    import pytest

    quiet = ["-n0", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    pytest.main([*arguments, *quiet], plugins=[FailedImports()])
    check_threads()


def main() -> None:
    """Import, and serve until the tests end."""
    folder, arguments = Path(sys.argv[2]), sys.argv[3:]
    with contextlib.ExitStack() as stack:
        tests = stack.enter_context(socket.socket(fileno=int(sys.argv[1])))
        os.fsync = lambda handle: None  # as in conftest.py
        import_everything(LIBRARIES_OF_REMOTE_CODE)
        freeze()
        libraries = stack.enter_context(fork_server(str(folder / "libraries")))
        import_package()
        fill_numba()
        import_everything(LIBRARIES)
        freeze()
        if arguments:
            stack.enter_context(fork_server(str(folder / "workers"), lambda: collect(arguments)))
        server = Server(listen(str(folder / "package")), tests, listen(str(folder / "tests")), libraries)
        tests.send(b"ready")
        server.serve()


if __name__ == "__main__":
    main()
