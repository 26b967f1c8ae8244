"""Shared fixtures, and the rules for skipping tests."""

import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile

# Read by huggingface_hub and tokenizers when they are first imported, so set before any test imports them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch.compile takes what it made for the true CPU for what it would make for the imitated one.
    folder = f"torchinductor_{os.getuid()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), folder))

if sys.platform == "linux" and "CXX" not in os.environ and (compiler := shutil.which("g++")):
    # GCC 12 knows all vector instructions that torch.compile uses. It need not compile a program for each to find out,
    # which takes 6 CPU seconds on a machine on which it has not compiled before.
    version = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if int(version.partition(".")[0]) >= 12:
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

# Syncing a file takes milliseconds, and guards against a loss of power, which no test can cause: a process that is
# killed loses nothing that it has written. That files are synced, and in which order, is shown by watched functions.
os.fsync = lambda handle: None

REPO_ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["cpu_times"]
GOLDEN = REPO_ROOT / "tests" / "golden"
SHARED_DATA = Path(os.environ.get("TAHOEX1_SHARED_DATA", REPO_ROOT.parent / "shared" / "data"))

# Files that take 5 CPU seconds or more, longest first: one that began last would run alone at the end, on one core.
LONG_FILES = (
    "examples/test_notebooks.py",
    "training/test_equivalences.py",
    "training/test_several_processes.py",
    "benchmarks/test_scaling_model.py",
    "test_golden_model.py",
    "finetuning/cells/test_cell_task.py",
    "common/test_cluster.py",
    "embedding/release/test_running.py",
    "training/test_resuming.py",
    "data/test_feeding.py",
    "embedding/test_writers.py",
    "test_same_bits.py",
    "finetuning/genes/test_gene_task.py",
    "finetuning/drugs/test_drug_task.py",
    "examples/test_demo.py",
    "test_remote_code.py",
    "training/test_config.py",
    "embedding/test_files.py",
    "annotation/test_annotating.py",
    "training/test_fsdp_precision.py",
    "test_modeling_tahoe_x1.py",
    "data/test_preparation.py",
    "benchmarks/test_gpu.py",
    "training/test_pretraining.py",
    "finetuning/cells/test_predicting.py",
    "perturbation/test_run.py",
    "benchmarking/test_hallmark.py",
    "perturbation/test_journal.py",
    "hub/test_sources.py",
    "hub/test_export.py",
    "benchmarking/test_essentiality.py",
    "embedding/test_in_memory.py",
    "examples/test_space.py",
    "benchmarking/test_cell_types.py",
    "reporting/test_making.py",
    "examples/test_data_examples.py",
    "hub/test_loading.py",
    "indexing/test_building.py",
    "hub/test_registration.py",
    "cells/test_opening.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than there are cores, for the time in which tests wait for others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all is imported, of which nothing is garbage
    if hasattr(config, "workerinput"):  # a process of pytest-xdist; their folders lie side by side
        import forked

        forked.shared_folder = Path(config.option.basetemp).parent
        # A fork has imported it where the process had no name yet, by which its commands' CPU seconds are kept.
        forked.FIRST_ENVIRONMENT.update({**os.environ, **forked.SERVER_ENVIRONMENT})
        with suppress(ImportError):
            import one_compiler

            one_compiler.install()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have the processes of pytest-xdist start as forks of one that has collected the tests and what they import."""
    options = session.config.option
    if not hasattr(session.config, "workerinput") and getattr(options, "numprocesses", None):
        import forked

        if forked.forks_as_workers():
            forked.shared_folder = session.config._tmp_path_factory.getbasetemp()
            server = forked.server(collected=session.config.invocation_params.args)
            options.tx = [f"popen//python={server.worker_python}"] * len(options.tx)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {str(REPO_ROOT / "tests" / name): place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


def pytest_collection_finish() -> None:
    """Exclude what the imports have made from garbage collection, which each end of a training calls: 0.4 s a time.

    Collect less often, too: tracing a model for `torch.compile` makes millions of objects that stay.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 50)


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Exclude what tests have imported, too, once a file's last test has run, or a test that has imported much."""
    global _file, _modules
    if nextitem is not None and (nextitem.path != _file or len(sys.modules) > _modules + 100):
        _file, _modules = nextitem.path, len(sys.modules)
        gc.collect()
        gc.freeze()


_file: Path | None = None
_modules = 0


# Errors of torch where ATEN_CPU_CAPABILITY imitates a simpler CPU, but parts of torch still look at the real one.
IMITATION_FAILS = ("pack_vnni2 is only supported when avx512", "torch.compile on current platform is not supported")


@contextmanager
def skipping_what_imitation_breaks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "ATEN_CPU_CAPABILITY" in os.environ and any(text in str(error) for text in IMITATION_FAILS):
            pytest.skip(f"torch cannot do this on the imitated CPU: {error}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    if item.get_closest_marker("hub") and os.environ["HF_HUB_OFFLINE"].upper() in {"1", "ON", "YES", "TRUE"}:
        pytest.skip("downloads from the Hugging Face Hub; run with HF_HUB_OFFLINE=0")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch.cuda.is_available() is false")
    with skipping_what_imitation_breaks():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    with skipping_what_imitation_breaks():
        return (yield)


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    """Show progress bars again after a test that ran a command with `--quiet`, which is meant for a whole process."""
    before = os.environ.get("TQDM_DISABLE")
    yield
    if before is None:
        os.environ.pop("TQDM_DISABLE", None)
    else:
        os.environ["TQDM_DISABLE"] = before


@pytest.fixture(scope="session", autouse=True)
def commands_made_once() -> None:
    """Have typer make the commands of an app once in a process, as for users, and not for each call: 13 ms a time."""
    import typer.testing

    typer.testing._get_command = functools.cache(typer.main.get_command)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of the original's recorded results."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a function that finds real data outside the repository: ``shared_data("tahoe/vocab.json")``."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"real data not here: {path} (name another folder with TAHOEX1_SHARED_DATA)")
        return path

    return find


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty Hub cache, and go offline."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Return the address of an S3 server on the loopback interface, whose buckets last for the whole session."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the same address, with the environment set so that every client uses it."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def training_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared dataset of 80 training and 20 validation cells."""
    from shared_runs import made_once

    def make(folder: Path) -> None:
        from cells import make_cells, write_cells, write_vocab

        from tahoex1_hf.data.config import parse_config
        from tahoex1_hf.data.preparation import prepare

        folder.mkdir()
        vocab = write_vocab(folder)
        cells = write_cells(make_cells(100), folder / "cells.h5ad", "csr")
        source = {"kind": "anndata", "paths": [str(cells)], "min_known_genes": 0}
        settings = {"sources": [source], "output": str(folder / "set"), "vocab": str(vocab)}
        prepare(parse_config({**settings, "validation": {"fraction": 0.2}}, "test"))

    return made_once(tmp_path_factory, "training_dataset", make) / "set"


@pytest.fixture(scope="session")
def finished_run(training_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the folder of a whole run, to be read only: ``finished_run("single")``."""
    from shared_runs import made_once, name_of_run
    from training_runs import finished

    def find(kind: str, **changes: Any) -> Path:
        name = name_of_run(kind, changes)
        return made_once(tmp_path_factory, name, lambda folder: finished(kind, folder, training_dataset, **changes))

    return find
