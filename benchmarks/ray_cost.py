"""Measure what Ray costs beside the work itself, in CPU seconds, and the driver's memory and rate by pieces.

    python -m benchmarks.ray_cost overhead [--files 16] [--cells 1024]
    python -m benchmarks.ray_cost pieces [--number 1000] [--number 100000] [--together 20]
    python -m benchmarks.ray_cost embed [--cells 4096] [--rounds 3]

`overhead` embeds files (`--workers`: by default one) and parts the CPU seconds of all processes (the first one, Ray's,
the workers') between two pieces that are far from the start and the end: those of the very functions that one process
without Ray calls for a piece (reading, the model, writing), each measured where it runs; and the rest, which is the
engine's, the packing of cells for their way from the reader to the model among it. The engine also looks around a
few times a second while it waits: `engine_cores` is its CPU time for each second. Where the workers have to wait for a
core, its share is larger than on a quiet machine, where a piece takes fewer seconds.
`pieces` sends pieces without work through three stages: what is left is the engine's own. `embed` compares whole
runs with and without Ray, their starts included, and needs a quiet machine. Lines go into
docs/benchmarks/ray-cost.jsonl.
"""

import json
import os
import pickle
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import anndata
import numpy as np
import psutil
import torch
import typer

from benchmarks.cells import ensembl_ids, synthetic_counts, tokenizer_for
from benchmarks.embedding import random_model
from benchmarks.measuring import progress
from tahoex1_hf import TahoeX1Config, TahoeX1Model
from tahoex1_hf.common.cluster import ClusterOptions, Shared, Stage, connected, import_ray
from tahoex1_hf.common.cluster_progress import ClusterProgress
from tahoex1_hf.embedding import on_cluster
from tahoex1_hf.embedding.files import embed_files
from tahoex1_hf.embedding.plan import Stretch

NUM_GENES, GENES_OF_A_CELL = 5000, 500
RECORD = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "ray-cost.jsonl"
WORK = "TAHOEX1_RAY_COST"  # variable that names the file with the CPU seconds of each piece's work
real_read, real_write = on_cluster.read_piece, on_cluster.write_piece
app = typer.Typer()


def record(line: dict[str, Any]) -> None:
    """Show a line, and write it down beside those of other measurements."""
    line |= {"load": round(os.getloadavg()[0], 1)}
    typer.echo(json.dumps(line))
    with RECORD.open("a") as file:
        file.write(json.dumps(line) + "\n")


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of all that it has started, directly or not."""
    total = time.process_time()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    total += children.ru_utime + children.ru_stime
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def start_ray(cpus: int) -> Any:
    """Start Ray on this machine."""
    ray = import_ray()
    ray.init(
        "local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _system_config={"num_workers_soft_limit": 8},
    )
    return ray


def write_cells(path: Path, number: int) -> Path:
    """Write a file of cells."""
    adata = anndata.AnnData(synthetic_counts(np.full(number, GENES_OF_A_CELL), NUM_GENES))
    adata.var_names = ensembl_ids(NUM_GENES)
    adata.write_h5ad(path)
    return path


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Do work, and return its seconds and CPU seconds."""
    start, before = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - start, cpu_seconds() - before


@app.command()
def embed(
    cells: Annotated[int, typer.Option(help="Smaller number of cells; the larger is three times as many.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 3,
) -> None:
    """Compare embedding with and without Ray."""
    torch.set_num_threads(1)
    names = ensembl_ids(NUM_GENES)
    tokenizer = tokenizer_for(names, 1024)
    config = TahoeX1Config(
        vocab_size=len(tokenizer), hidden_size=256, num_attention_heads=8, num_hidden_layers=6,
        expression_encoder_dropout=0.0,
    )  # fmt: skip
    model = random_model(TahoeX1Model, config)
    seen: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {number: write_cells(Path(folder) / f"{number}.h5ad", number) for number in (cells, 3 * cells)}
        for _ in range(rounds):
            for number, path in files.items():
                outputs = set()
                for workers in (0, 1, 2):
                    output = Path(folder) / f"out{workers}.npy"

                    def work(source: Path = path, target: Path = output, workers: int = workers) -> None:
                        cluster = ClusterOptions("local", workers, workers) if workers else None
                        embed_files(
                            source, target, model, tokenizer, device="cpu", dtype="float32",
                            cluster=cluster, progress=False,
                        )  # fmt: skip

                    if workers:
                        ray = start_ray(3)
                    seen.setdefault(f"{number} cells, {workers} workers", []).append(timed(work))
                    if workers:
                        ray.shutdown()
                    outputs.add(output.read_bytes())
                if len(outputs) > 1:
                    raise RuntimeError("the embeddings differ.")
                progress(json.dumps(seen))
    for name, values in seen.items():
        seconds, cpu = (statistics.median(each) for each in zip(*values, strict=True))
        typer.echo(json.dumps({"what": name, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}))


class Nothing:
    """A worker that does nothing."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row."""
        return row


def pass_on(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row."""
    return row


class Pieces(Sequence[Stretch]):
    """As many pieces as wanted, made when they are asked for."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        return Stretch(place, place + 1, place, 0, 100)


@app.command()
def pieces(
    number: Annotated[list[int], typer.Option(help="Number of pieces; can be repeated.")],
    together: Annotated[int, typer.Option(help="Pieces of a block: 20, as where a file has 100 cells.")] = 1,
) -> None:
    """Send pieces without work through three stages."""
    ray = start_ray(3)
    with connected(ClusterOptions("local", 1, 1)) as cluster:
        stages = [Stage(pass_on, cpus=0.5), Stage(Nothing, cpus=0.5), Stage(pass_on, cpus=0.5)]
        list(cluster.run([{"number": 0}], stages))  # workers are started
        for count in number:
            highest, ended = [0], threading.Event()

            def watch(highest: list[int] = highest, ended: threading.Event = ended) -> None:
                while not ended.wait(0.2):
                    highest[0] = max(highest[0], psutil.Process().memory_info().rss)

            before = psutil.Process().memory_info().rss
            threading.Thread(target=watch, daemon=True).start()
            start, cpu, all_cpu = time.perf_counter(), time.process_time(), cpu_seconds()
            seen = sum(1 for _ in cluster.run(on_cluster._Rows(Pieces(count)), stages, together))
            seconds = time.perf_counter() - start
            ended.set()
            line = {
                "what": "pieces without work, through three stages",
                "pieces": seen,
                "together": together,
                "seconds": round(seconds, 1),
                "pieces_per_second": round(seen / seconds, 1),
                "driver_cpu_ms_per_piece": round(1000 * (time.process_time() - cpu) / seen, 2),
                "all_cpu_ms_per_piece": round(1000 * (cpu_seconds() - all_cpu) / seen, 2),
                "driver_mb_before": before >> 20,
                "driver_mb_most": highest[0] >> 20,
            }
            record(line)
    ray.shutdown()


@contextmanager
def work_noted(stage: str, cells: int) -> Iterator[None]:
    """Write down the CPU seconds of a block, in this process, with the moment of its end."""
    before = time.process_time()
    yield
    line = {"stage": stage, "cells": cells, "cpu": time.process_time() - before, "ended": time.time()}
    with open(os.environ[WORK], "a") as file:
        file.write(json.dumps(line) + "\n")


def read_piece(row: dict[str, Any], job: Shared) -> dict[str, Any]:
    """Read a piece, and note what that took."""
    with work_noted("read", row["high"] - row["low"]):
        return real_read(row, job)


class PieceEmbedder(on_cluster.PieceEmbedder):
    """A worker that notes what each piece took."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed a piece; pack and unpack its cells once more, to know what part of the work that is."""
        with work_noted("transport", row["high"] - row["low"]):
            pickle.dumps(pickle.loads(row["chunks"]), protocol=5)
        with work_noted("embed", row["high"] - row["low"]):
            return super().__call__(row)


def write_piece(row: dict[str, Any], job: Shared) -> dict[str, Any]:
    """Write a piece, and note what that took."""
    with work_noted("write", row["high"] - row["low"]):
        return real_write(row, job)


@app.command()
def overhead(
    files: Annotated[int, typer.Option(help="Number of files, each of which is a piece.")] = 16,
    cells: Annotated[int, typer.Option(help="Number of cells of a file, at most 2,048.")] = 1024,
    width: Annotated[int, typer.Option(help="Width of the model, of four layers.")] = 256,
    workers: Annotated[int, typer.Option(help="Number of workers with the model.")] = 1,
) -> None:
    """Part the CPU seconds of embedding with Ray into those of the work and those of the engine."""
    torch.set_num_threads(1)
    names = ensembl_ids(NUM_GENES)
    tokenizer = tokenizer_for(names, 1024)
    config = TahoeX1Config(
        vocab_size=len(tokenizer), hidden_size=width, num_attention_heads=width // 32, num_hidden_layers=4,
        expression_encoder_dropout=0.0,
    )  # fmt: skip
    model = random_model(TahoeX1Model, config)
    on_cluster.read_piece, on_cluster.write_piece = read_piece, write_piece
    on_cluster.PieceEmbedder = PieceEmbedder  # type: ignore[misc]
    marks: list[tuple[float, float]] = []
    update = ClusterProgress.update

    def marking(self: ClusterProgress, number: int) -> None:
        update(self, number)
        marks.append((time.time(), cpu_seconds()))

    ClusterProgress.update = marking  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[WORK] = f"{folder}/work.jsonl"
        sources = [write_cells(Path(folder) / f"{number:03d}.h5ad", cells) for number in range(files)]
        ray = start_ray(3)
        embed_files(
            sources, Path(folder) / "out.npy", model, tokenizer, device="cpu", dtype="float32",
            cluster=ClusterOptions("local", workers, workers), progress=False,
        )  # fmt: skip
        ray.shutdown()
        lines = [json.loads(line) for line in Path(os.environ[WORK]).read_text().splitlines()]
    (begun, before), (ended, after) = marks[2], marks[-3]
    steady = [line for line in lines if begun < line["ended"] <= ended]
    stages = ("read", "embed", "write", "transport")
    work = {name: sum(line["cpu"] for line in steady if line["stage"] == name) for name in stages}
    total = after - before
    done = work["read"] + work["embed"] + work["write"] - work["transport"]
    engine = total - done - work["transport"]  # which was done twice here
    record(
        {
            "what": "overhead of the engine in embedding, CPU seconds of the steady part",
            "workers": workers,
            "pieces": sum(line["stage"] == "embed" for line in steady),
            "cells_of_a_piece": cells,
            "seconds": round(ended - begun, 1),
            "pieces_per_second": round(len(marks[2:-3]) / (ended - begun), 4),
            "cpu_seconds": round(total, 2),
            **{f"{name}_cpu_seconds": round(value, 2) for name, value in work.items()},
            "engine_cpu_seconds": round(engine, 2),
            "engine_cpu_s_per_piece": round(engine / len(marks[2:-3]), 3),
            "engine_cores": round(engine / (ended - begun), 3),
            "overhead": round(engine / done, 3),
        }
    )


if __name__ == "__main__":
    from benchmarks import ray_cost  # by its name, as workers import it

    ray_cost.app()
