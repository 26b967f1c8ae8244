"""Measure what Ray costs beside one process: CPU seconds of embedding, and the driver's memory and rate by pieces.

    python -m benchmarks.ray_cost embed [--cells 4096] [--rounds 3]
    python -m benchmarks.ray_cost pieces [--number 1000] [--number 10000]

`embed` embeds cells without Ray, and with Ray and one and two workers, in turn; CPU seconds are those of all
processes, from the call to its end, and so contain the imports of Ray's workers. Two numbers of cells tell what is
paid once from what is paid for each cell. `pieces` sends pieces without work through three stages: what is left is
the engine's own. Seconds of a shared machine say little, CPU seconds more.
"""

import json
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
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
from tahoex1_hf.common.cluster import ClusterOptions, Stage, connected, import_ray
from tahoex1_hf.embedding.files import embed_files

NUM_GENES, GENES_OF_A_CELL = 5000, 500
app = typer.Typer()


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


@app.command()
def pieces(
    number: Annotated[list[int], typer.Option(help="Number of pieces; can be repeated.")],
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
            seen = sum(1 for _ in cluster.run([{"number": each} for each in range(count)], stages))
            seconds = time.perf_counter() - start
            ended.set()
            line = {
                "pieces": seen,
                "seconds": round(seconds, 1),
                "pieces_per_second": round(seen / seconds, 1),
                "driver_cpu_ms_per_piece": round(1000 * (time.process_time() - cpu) / seen, 2),
                "all_cpu_ms_per_piece": round(1000 * (cpu_seconds() - all_cpu) / seen, 2),
                "driver_mb_before": before >> 20,
                "driver_mb_most": highest[0] >> 20,
                "load": os.getloadavg()[0],
            }
            typer.echo(json.dumps(line))
    ray.shutdown()


if __name__ == "__main__":
    app()
