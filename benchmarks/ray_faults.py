"""Break a Ray cluster of this machine while it embeds and prepares, and compare the results with those of one process.

    PYTHONPATH=.:tests/support python -m benchmarks.ray_faults [--only KIND]... [--jobs embed,prepare] [--seed 0]

The cluster has a head and two nodes. Every kind of fault is made several times in a run, at moments that chance
chooses: Ray's workers are killed (-9) or stopped for a while, a node is killed and another one comes, the command
itself is killed and given again, the disk with the output is full until there is room, a store refuses connections
for a minute. A run that ends with an error is given again, as its message says. Each line of the record is a run:
what was done to it, how often the command was given, and whether the bytes are those of a run of one process without
Ray. `disk full` needs the right to mount a file system in memory.

Commands and workers are forks of a process that has imported everything (`tests/support/forked.py`): a start costs a
tenth of the CPU seconds that imports take, and what is broken here is not the imports.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anndata
import forked  # type: ignore[import-not-found]  # of the tests
import numpy as np
import psutil
import typer
import yaml

from benchmarks.cells import ensembl_ids, synthetic_counts, tokenizer_for
from benchmarks.embedding import random_model
from benchmarks.measuring import progress
from tahoex1_hf import TahoeX1Config, TahoeX1Model
from tahoex1_hf.common.cluster import import_ray
from tahoex1_hf.common.folders import Folder

ROOT = Path(__file__).resolve().parents[1]
NUM_GENES, FILES, CELLS = 600, 16, 48
RECORD = ROOT / "docs" / "benchmarks" / "ray-faults.jsonl"
# Times that a command is given before the run counts as lost.
_MOST_COMMANDS = 12
_SLOW, _CLOSED = 15.0, 60.0  # seconds for which a worker stands still, and a store is closed
_ROOM, _STEP = 300, 400  # kB that a full disk has, and that it gets with each try


@dataclass
class World:
    """What the runs work on.

    Attributes:
        folder: Folder of all files.
        cluster: Ray's cluster.
        nodes: Its nodes beside the head.
        store: Proxy before the object store.
        faults: Faults that were made in the present run.
    """

    folder: Path
    cluster: Any
    nodes: list[Any]
    store: "Proxy | None" = None
    faults: list[str] = field(default_factory=list)

    def start(self, job: str, output: str, ray: bool = True) -> "forked.Forked":
        """Start the command of a job, with or without Ray."""
        arguments = ["-m", "tahoex1_hf", job]
        where = ["--ray", self.cluster.address] if ray else []
        if job == "prepare":
            arguments += ["--config", str(self.folder / "recipe.yaml"), "--output", output, *where]
        else:
            sources = sorted(str(path) for path in (self.folder / "cells").iterdir())
            options = ["--model", str(self.folder / "model"), "--device", "cpu", "--dtype", "float32"]
            arguments += [*sources, output, *options, *where, *(["--max-workers", "2"] if ray else [])]
        hook = {"RAY_RUNTIME_ENV_HOOK": "benchmarks.ray_faults.in_forks"}
        return forked.Forked([sys.executable, *arguments], forked.environment(**forked.stand_in(), **hook), ROOT)

    def workers(self) -> list[psutil.Process]:
        """Return the processes in which Ray's workers are at work."""
        server = forked.server().process
        assert server is not None
        return [each for each in psutil.Process(server.pid).children() if _title(each).startswith("ray::Map")]


def in_forks(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Let Ray start a command's workers as forks; Ray calls this function in the command's process."""
    python = Path(os.environ["FORK_SERVER"]).with_name("python")
    variables = {name: value for name, value in os.environ.items() if name != "RAY_RUNTIME_ENV_HOOK"}
    return {**(runtime_env or {}), "py_executable": str(python), "env_vars": variables}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Proxy:
    """A way to a store that can be closed for a while.

    Args:
        target: Host and port of the store.
    """

    def __init__(self, target: tuple[str, int]):
        self.target, self.open = target, True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Address of the proxy."""
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            if not self.open:
                client.close()
                continue
            server = socket.create_connection(self.target)
            self.connections += [client, server]
            for one, two in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(one, two), daemon=True).start()

    def _pass_on(self, one: socket.socket, two: socket.socket) -> None:
        try:
            while data := one.recv(2**16):
                two.sendall(data)
        except OSError:
            pass
        for each in (one, two):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close_for(self, seconds: float) -> None:
        """Refuse connections, and end those that there are."""
        self.open = False
        for each in self.connections:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.connections.clear()
        time.sleep(seconds)
        self.open = True


# Faults: each is made once by a call, and returns whether it found something to break.


def kill_worker(world: World, command: "forked.Forked") -> bool:
    """Kill a worker that is at work."""
    return _signal_worker(world, signal.SIGKILL)


def slow_worker(world: World, command: "forked.Forked") -> bool:
    """Stop a worker for a while."""
    return _signal_worker(world, signal.SIGSTOP, then=signal.SIGCONT)


def _signal_worker(world: World, sent: signal.Signals, then: signal.Signals | None = None) -> bool:
    workers = world.workers()
    if not workers:
        return False
    chosen = random.choice(workers)
    world.faults.append(_title(chosen).strip())
    chosen.send_signal(sent)
    if then is not None:
        time.sleep(_SLOW)
        if chosen.is_running():
            chosen.send_signal(then)
    return True


def kill_node(world: World, command: "forked.Forked") -> bool:
    """Kill a node with all that runs on it; another comes in its place."""
    node = random.choice(world.nodes)
    world.cluster.remove_node(node, allow_graceful=False)
    world.nodes.remove(node)
    world.nodes.append(add_node(world.cluster))
    world.faults.append("node")
    return True


def kill_driver(world: World, command: "forked.Forked") -> bool:
    """Kill the command itself."""
    command.kill()
    world.faults.append("command")
    return bool(command.wait() == -signal.SIGKILL)  # or it had ended by itself


def refuse_connections(world: World, command: "forked.Forked") -> bool:
    """Let the store refuse connections for a minute."""
    assert world.store is not None
    world.store.close_for(_CLOSED)
    world.faults.append("store")
    return True


Fault = Callable[[World, "forked.Forked"], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        fault: Function that makes it.
        times: How often it is made in a run of `embed`, and of `prepare`.
    """

    fault: Fault | None
    times: dict[str, int]


KINDS = {
    "worker killed": Kind(kill_worker, {"embed": 6, "prepare": 6}),
    "worker slow": Kind(slow_worker, {"embed": 2, "prepare": 2}),
    "node killed": Kind(kill_node, {"embed": 3, "prepare": 3}),
    "command killed": Kind(kill_driver, {"embed": 4, "prepare": 4}),
    "disk full": Kind(None, {"embed": 2, "prepare": 2}),
    "store unreachable": Kind(refuse_connections, {"embed": 1, "prepare": 1}),
}


def add_node(cluster: Any) -> Any:
    """Add a node with two CPUs."""
    return cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20, node_ip_address="127.0.0.1")


def make_world(folder: Path) -> World:
    """Write the model, the cells and the recipe, and start the cluster."""
    names = ensembl_ids(NUM_GENES)
    rng = np.random.default_rng(0)
    (folder / "cells").mkdir()
    for number in range(FILES):
        counts = synthetic_counts(rng.integers(40, 80, CELLS), NUM_GENES, seed=number)
        adata = anndata.AnnData(counts)
        adata.var_names = names
        adata.obs_names = [f"{number}-{cell}" for cell in range(CELLS)]
        adata.write_h5ad(folder / "cells" / f"{number:02d}.h5ad")
    tokenizer = tokenizer_for(names, 128)
    config = TahoeX1Config(
        vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
        expression_encoder_dropout=0.0,
    )  # fmt: skip
    random_model(TahoeX1Model, config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = {
        "output": "unset",
        "vocab": str(folder / "model" / "vocab.json"),
        "sources": [{"kind": "anndata", "paths": [str(folder / "cells" / "*.h5ad")], "metadata": {"name": "_index"}}],
        "piece_cells": 24,
        "shard_size_mb": 0.02,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": "127.0.0.1"})
    return World(folder, cluster, [add_node(cluster), add_node(cluster)])


def content_of(output: str) -> dict[str, bytes]:
    """Return the bytes of a file, or of all files of a folder, by their names in it."""
    import fsspec

    filesystem, root = fsspec.url_to_fs(output)
    filesystem.invalidate_cache()
    return {path.removeprefix(root): filesystem.cat_file(path) for path in filesystem.find(root)}


def begun(job: str, output: str) -> int:
    """Return how many pieces of a run are written."""
    folder, mark = (f"{output}.shards", "chunks-") if job == "embed" else (f"{output}/.prepare/pieces", "0")
    try:
        return len([name for name in Folder(folder).names() if name.startswith(mark)])
    except Exception:
        return 0


def run_with_faults(world: World, job: str, kind: str, output: str) -> dict[str, Any]:
    """Run a job while faults of a kind are made, and return a line of the table."""
    made, commands, errors = 0, 0, []
    fault, times = KINDS[kind].fault, KINDS[kind].times[job]
    world.faults.clear()
    start = time.monotonic()
    done = False
    while not done and commands < _MOST_COMMANDS:
        commands += 1
        process = world.start(job, output)
        before = begun(job, output)
        while process.poll() is None:
            time.sleep(0.2)
            if fault is not None and made < times and begun(job, output) > before:
                time.sleep(random.uniform(0, 0.5))
                made += process.poll() is None and fault(world, process)
                before = begun(job, output) if fault is not kill_driver else before
        done = process.returncode == 0
        ended = process.completed()
        if not done and process.returncode != -signal.SIGKILL:
            lines = [line for line in ended.stderr.splitlines() if line.startswith("Error")]
            errors.append(lines[-1] if lines else ended.stderr[-300:])
            if kind == "disk full":
                made += 1
                make_room(Path(output).parent, made)
    return {
        "job": job,
        "fault": kind,
        "times": made,
        "commands": commands,
        "ended": done,
        "errors": errors,
        "broken": list(world.faults),
        "seconds": round(time.monotonic() - start),
    }


def make_room(folder: Path, step: int) -> None:
    """Give a full file system a little more room."""
    subprocess.run(["mount", "-o", f"remount,size={_ROOM + _STEP * step}k", folder], check=True)


def measure(world: World, job: str, kind: str) -> dict[str, Any]:
    """Make the faults of a kind in a run of a job, and compare the result."""
    folder = world.folder / f"{job} {kind}".replace(" ", "-")
    folder.mkdir()
    name = "out.parquet" if job == "embed" else "out"
    output, mounted = str(folder / name), kind == "disk full"
    if kind == "store unreachable":
        output = f"s3://faults/{name}"
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_ROOM}k", "tmpfs", folder], check=True)
    try:
        line = run_with_faults(world, job, kind, output)
        expected = content_of(str(world.folder / f"expected-{name}"))
        found = content_of(output) if line["ended"] else {}
        return {**line, "same_bytes": found == expected}
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def start_store(world: World) -> None:
    """Start an S3 server behind a proxy, for this process and those that it starts."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    world.store = Proxy((host, port))
    os.environ["AWS_ENDPOINT_URL"] = world.store.url
    fsspec.filesystem("s3").mkdir("faults")


def main(
    only: Annotated[list[str] | None, typer.Option(help="Kinds of faults.")] = None,
    jobs: Annotated[str, typer.Option(help="Jobs, with commas between.")] = "embed,prepare",
    output: Annotated[Path, typer.Option(help="File to which a line of JSON is added for each run.")] = RECORD,
    seed: Annotated[int, typer.Option(help="Seed of the moments and choices.")] = 0,
) -> None:
    """Make all faults."""
    random.seed(seed)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        os.environ[name] = value
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # or Ray takes another address of the machine for 127.0.0.1
    import_ray()
    with tempfile.TemporaryDirectory(prefix="ray-faults-") as folder:
        world = make_world(Path(folder))
        if only is None or "store unreachable" in only:
            start_store(world)
        try:
            for job in jobs.split(","):
                name = "out.parquet" if job == "embed" else "out"
                world.start(job, f"{folder}/expected-{name}", ray=False).completed().check_returncode()
                for kind, what in KINDS.items():
                    if job in what.times and (only is None or kind in only):
                        line = measure(world, job, kind)
                        progress(json.dumps(line))
                        with output.open("a") as file:
                            file.write(json.dumps(line) + "\n")
        finally:
            world.cluster.shutdown()


if __name__ == "__main__":
    typer.run(main)
