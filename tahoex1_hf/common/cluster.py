# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Work on a Ray cluster: connect to it, run pieces of work through a pipeline of Ray Data, and explain its errors.

Ray is imported when it is used, and only then. It decides where and when a piece is worked on, and works on it again
when a worker or a machine is lost. It may work on a piece twice, so that the last stage of a pipeline must commit a
piece's result in a way that can be repeated.
"""

import logging
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tahoex1_hf.common.reading import in_short

logger = logging.getLogger(__name__)

LOCAL = "local"
"""Address that stands for a cluster of this machine alone, which is started for the run."""

# Times that a piece is worked on again after its worker was lost. A piece that kills every worker ends the run.
_RETRIES = 5
# Most blocks that the pieces are handed out in; the driver keeps a record of each. And least of them for each CPU.
_MOST_BLOCKS, _BLOCKS_OF_A_CPU = 2000, 4
# Bytes of a block that goes from one stage to the next: a full piece, or several small ones, since a block costs the
# driver as much whatever is in it. Where there are more pieces than blocks, a block has several full pieces.
_BLOCK_BYTES, _LARGE_BLOCK_BYTES = 2**24, 2**27
# Variables that processes on other machines need and that are no secrets; the last two lines choose the kernels of
# torch, MKL and oneDNN, on which last digits depend.
_PASSED_ON = (
    *("PYTHONPATH", "HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"),
    *("TOKENIZERS_PARALLELISM", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "OMP_WAIT_POLICY"),
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS"),
    *("ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "DNNL_DEFAULT_FPMATH_MODE"),
)
_SETTINGS: dict[str, Any] = {
    "enable_progress_bars": False,
    "enable_operator_progress_bars": False,
    "print_on_execution_start": False,
    "max_consecutive_actor_init_deaths": _RETRIES,
    "target_max_block_size": _BLOCK_BYTES,
}


class ClusterError(OSError):
    """The cluster cannot be reached, or lost something that it could not replace."""


@dataclass(frozen=True)
class ClusterOptions:
    """The user's choice of a cluster.

    Attributes:
        address: Address of a Ray cluster, `HOST:PORT`; `auto` for one that runs on this machine;
            `local` to start one of this machine alone.
        min_workers: Least number of workers with the model, which are kept even without work.
        max_workers: Most of them; None for as many as the cluster has room for.
    """

    address: str = LOCAL
    min_workers: int = 1
    max_workers: int | None = None

    def __post_init__(self) -> None:
        if self.min_workers < 1:
            raise ValueError(f"min_workers={self.min_workers} (--min-workers): pass at least 1.")
        if self.max_workers is not None and self.max_workers < self.min_workers:
            raise ValueError(
                f"max_workers={self.max_workers} (--max-workers) is less than min_workers={self.min_workers}."
            )


def cluster_options(address: str | None, min_workers: int | None, max_workers: int | None) -> ClusterOptions | None:
    """Return the options of a command line; None without an address.

    Raises:
        ValueError: For numbers of workers without an address.
    """
    if address is None:
        if min_workers is not None or max_workers is not None:
            raise ValueError("--min-workers and --max-workers go with --ray ADDRESS: name a cluster, or `local`.")
        return None
    return ClusterOptions(address, 1 if min_workers is None else min_workers, max_workers)


@dataclass(frozen=True)
class Stage:
    """What is done with every piece at one place of a pipeline.

    Attributes:
        work: Function of a row (a dictionary) that returns a row; or a class whose objects are such functions, of
            which a pool of workers each keeps one.
        arguments: Further arguments of the function, or those of the class's constructor.
        cpus: Number of CPUs that one call, or one worker, takes.
        gpus: Number of GPUs that one worker takes.
        most: Most calls of a function at a time, or most workers of a class if the user sets no number; None for as
            many as the cluster has room for.
    """

    work: Callable[..., dict[str, Any]] | type
    arguments: dict[str, Any] = field(default_factory=dict)
    cpus: float = 1.0
    gpus: float = 0.0
    most: int | None = None


def import_ray() -> Any:
    """Import Ray, with its usage statistics and the messages of its own machinery switched off.

    Raises:
        ImportError: If it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by itself, Ray lets everything else on the machine go first
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ImportError(f"--ray needs Ray ({error.name} is missing): pip install 'tahoex1_hf[ray]'.") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


@contextmanager
def connected(options: ClusterOptions) -> Iterator["Cluster"]:
    """Connect to a cluster, or start one, until the block ends; a connection that is there already is used and kept.

    Raises:
        ImportError: If Ray is not installed.
        ClusterError: If there is no cluster at the address, or it is lost in the block.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    try:
        if ours:
            _connect(ray, options.address)
    except Exception as error:
        raise ClusterError(
            f"--ray {options.address}: no Ray cluster can be reached there ({in_short(error)})."
        ) from error
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in _SETTINGS}
    for name, value in _SETTINGS.items():
        setattr(context, name, value)
    try:
        with _explained(ray):
            yield Cluster(ray, options)
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address != LOCAL:
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        start_ray(ray, address, runtime_env={"env_vars": passed}, **quiet)
        return
    # Processes beyond the limit are ended when they are idle for a second, and each takes seconds to start.
    processes = {"num_workers_soft_limit": max(8, 2 * (os.cpu_count() or 1))}
    start_ray(ray, LOCAL, include_dashboard=False, _node_ip_address="127.0.0.1", _system_config=processes, **quiet)


def start_ray(ray: Any, address: str, **options: Any) -> None:
    """Start Ray or connect to it, and leave this process's environment as it was.

    `ray.init` takes `breakpoint()` for itself, by the variable PYTHONBREAKPOINT, in all that the process starts later.
    """
    before = os.environ.get("PYTHONBREAKPOINT")
    ray.init(address, **options)
    if before is None:
        os.environ.pop("PYTHONBREAKPOINT", None)
    else:
        os.environ["PYTHONBREAKPOINT"] = before


@contextmanager
def _explained(ray: Any) -> Iterator[None]:
    """Raise errors of Ray, which are about lost workers and machines, as `ClusterError`."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _lost(error) from error


def _lost(error: BaseException) -> ClusterError:
    return ClusterError(
        f"the Ray cluster lost what it could not replace ({in_short(error)}). The same command resumes the run; what "
        "it has written is kept."
    )


_fetched: dict[tuple[str, str], Any] = {}  # on a worker: what it has fetched, which is then not fetched for each piece


@dataclass(frozen=True)
class Shared:
    """A value that a worker fetches once.

    Attributes:
        run: Unique name of the run.
        name: Name of the value.
        reference: List with Ray's reference; by itself, Ray would replace it by the value for every piece.
        folder: Working folder of the process that began the run, to which relative paths belong.
    """

    run: str
    name: str
    reference: list[Any]
    folder: str

    def get(self) -> Any:
        """Return the value, on a worker; those of other runs are forgotten."""
        key = self.run, self.name
        if key not in _fetched:
            for other in [known for known in _fetched if known[0] != self.run]:
                del _fetched[other]
            if os.path.isdir(self.folder):
                os.chdir(self.folder)
            _fetched[key] = import_ray().get(self.reference[0])
        return _fetched[key]


class Cluster:
    """A connection to a cluster.

    Args:
        ray: The module.
        options: The user's options.
    """

    def __init__(self, ray: Any, options: ClusterOptions):
        self.ray, self.options = ray, options

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that the cluster has now."""
        return int(self.ray.cluster_resources().get("GPU", 0))

    def num_machines(self) -> int:
        """Return the number of machines that the cluster has now."""
        return sum(bool(node["Alive"]) for node in self.ray.nodes())

    @property
    def num_cpus(self) -> float:
        """Number of CPUs that the cluster has now."""
        return float(self.ray.cluster_resources().get("CPU", 0))

    def share(self, run: str, name: str, value: Any) -> Shared:
        """Store a value for all workers of a run."""
        return Shared(run, name, [self.ray.put(value)], os.getcwd())

    def ask(self, function: Callable[..., Any], *arguments: Any, gpus: float = 0) -> Any:
        """Call a function on some worker, and return what it returns."""
        return self.ray.get(self.ray.remote(function).options(num_cpus=0, num_gpus=gpus).remote(*arguments))

    def run(
        self, rows: Sequence[dict[str, Any]], stages: Sequence[Stage], together: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Run rows through stages, and yield what the last stage returns, in any order.

        Rows are made in small numbers ahead of the stage that needs them. A call whose worker or machine is lost is
        made again elsewhere, a bounded number of times, and so are those of the rows that it was given together with.

        Args:
            rows: Rows of plain values; a sequence that makes them when it is asked for them will do.
            stages: Stages, each of which gets the rows that the one before returns.
            together: Number of rows that are given to a worker at a time, where there are enough for all; handing them
                out costs some 0.1 CPU seconds each time. Of very many rows, more are given at a time.

        Raises:
            Exception: The error of a stage, as it was raised on the worker.
        """
        least = min(len(rows), _BLOCKS_OF_A_CPU * max(1, int(self.num_cpus)))
        blocks = min(_MOST_BLOCKS, max(least, -(-len(rows) // together)))
        size = _BLOCK_BYTES if len(rows) <= _MOST_BLOCKS * together else _LARGE_BLOCK_BYTES
        self.ray.data.DataContext.get_current().target_max_block_size = size
        data = self.ray.data.from_items(rows, override_num_blocks=blocks)
        for stage in stages:
            data = self._mapped(data, stage)
        for batch in data.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for row in batch.to_pylist():
                if _ERROR in row:
                    raise _unpacked(row)
                yield row

    def _mapped(self, data: Any, stage: Stage) -> Any:
        options: dict[str, Any] = {"num_cpus": stage.cpus}
        given = {"work": stage.work, "arguments": stage.arguments}
        if not isinstance(stage.work, type):
            options |= {"concurrency": stage.most}
            return self._map(data, _guarded, options | {"fn_kwargs": given, "max_retries": _RETRIES})
        if stage.gpus:
            options["num_gpus"] = stage.gpus
        least, most = self.options.min_workers, self.options.max_workers
        if most is None and stage.most is not None:
            most = max(least, stage.most)
        pool = self.ray.data.ActorPoolStrategy(min_size=least, max_size=most)
        options |= {"fn_constructor_kwargs": given, "compute": pool}
        # Machines may be taken back without end, so workers are replaced without end; a piece's tries are bounded.
        return self._map(data, _GuardedWorker, options | {"max_restarts": -1, "max_task_retries": _RETRIES})

    def _map(self, data: Any, work: Any, options: dict[str, Any]) -> Any:
        with warnings.catch_warnings():  # numbers of tries are to have no other place before Ray 2.64
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            return data.map(work, **options)


# Errors travel as rows: Ray would put its own advice into their texts.
_ERROR, _TRACEBACK = "error", "traceback"


def _guarded(row: dict[str, Any], work: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """Call the work of a stage; return its error as a row, as which it goes through later stages."""
    if _ERROR in row:
        return row
    try:
        return work(row, **arguments)
    except Exception as error:
        return _packed(error)


class _GuardedWorker:
    """A worker of a stage, which returns errors, also that of its constructor, as rows."""

    def __init__(self, work: type, arguments: dict[str, Any]):
        self.failed: dict[str, Any] | None = None
        try:
            self.work = work(**arguments)
        except Exception as error:
            self.failed = _packed(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.failed or _guarded(row, self.work, {})


def _packed(error: Exception) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # a class of another library that cannot be made of its own arguments
        content = pickle.dumps(ValueError(in_short(error)))
    return {_ERROR: content, _TRACEBACK: text}


def _unpacked(row: dict[str, Any]) -> Exception:
    logger.debug("On the worker:\n%s", row[_TRACEBACK])
    error: Exception = pickle.loads(row[_ERROR])
    return error
