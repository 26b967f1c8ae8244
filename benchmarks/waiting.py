"""Measure the time of a pass when idle OpenMP threads spin, and when they sleep.

    python -m benchmarks.waiting [--quick] [--rounds 5] [--neighbours 0]

torch's threads wait for each other hundreds of times in a forward pass. A thread that spins reacts at once, but takes
the core from other threads: beside other processes it keeps away the very thread that it waits for. The policies below
are set in the environment of fresh processes, and each round measures all of them in turn. Neighbours are processes
that keep a core busy. Figures are milliseconds per pass, of wall-clock time and of CPU time.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import numpy as np
import typer

from benchmarks.child import python
from benchmarks.embedding import random_model
from benchmarks.measuring import progress
from benchmarks.train import make_batch, packed
from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining
from tahoex1_hf.inference.ragged import ragged_forward

# libgomp's own default is to spin 300,000 times, and then to sleep.
POLICIES = {
    "spin": {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "300000"},
    "spin briefly": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
}
SHAPES = {"small": (128, 4, 4), "70m-like": (512, 8, 12)}  # width, heads, layers
WORK = ("embed", "train")
Cost = tuple[float, float]  # milliseconds of wall-clock time and of CPU time


def work(kind: str, shape: str, seconds: float) -> Cost:
    """Do some work for some seconds in this process, and return its cost."""
    width, heads, layers = SHAPES[shape]
    config = TahoeX1Config(
        vocab_size=5000, hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers,
        expression_encoder_dropout=0.0,
    )  # fmt: skip
    model = random_model(TahoeX1ForPreTraining, config)
    batch = packed(make_batch(np.array([300, 260, 200, 160]), config.vocab_size))
    cells = batch["input_ids"][0], batch["expression_values"][0], batch["cu_seq_lens_q"].numpy()

    def once() -> None:
        if kind == "embed":
            ragged_forward(model.tahoe, *cells)
        else:
            model.zero_grad()
            model(**batch).loss.backward()

    once()
    passes, start, before = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        once()
        passes += 1
    return 1e3 * (time.perf_counter() - start) / passes, 1e3 * (time.process_time() - before) / passes


@contextmanager
def busy(neighbours: int) -> Iterator[None]:
    """Keep a number of cores busy."""
    script = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with this process
    others = [subprocess.Popen([sys.executable, "-S", "-c", script]) for _ in range(neighbours)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One short round.")] = False,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 5,
    neighbours: Annotated[int, typer.Option(help="Number of other processes that keep a core busy.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of OpenMP threads.")] = 2,
    only: Annotated[str, typer.Option(help="Work to measure alone, such as `embed small`.")] = "",
    one: Annotated[
        str, typer.Option(help="work:shape:seconds for one process; the program calls itself with this option.")
    ] = "",
) -> None:
    """Print the time of a pass for each policy."""
    if one:
        kind, shape, seconds = one.split(":")
        print(json.dumps(work(kind, shape, float(seconds))))
        return
    figures: dict[str, dict[str, list[Cost]]] = {}
    with busy(neighbours):
        for kind in WORK:
            for shape in SHAPES:
                if only not in ("", f"{kind} {shape}"):
                    continue
                found = figures.setdefault(f"{kind} {shape}", {name: [] for name in POLICIES})
                for number in range(1 if quick else rounds):
                    for name, variables in POLICIES.items():
                        progress(f"  {kind} {shape}, round {number + 1}: {name}")
                        environment = {**variables, "OMP_NUM_THREADS": str(threads)}
                        given = f"{kind}:{shape}:{0.5 if quick else 5}"
                        done = python("-m", "benchmarks.waiting", "--one", given, environment=environment).checked()
                        found[name].append(tuple(json.loads(done.last_line)))
                        progress("    {:.1f} ms, {:.1f} ms of CPU time".format(*found[name][-1]))
    print(f"{'work':16} {'policy':14} {'ms':>8} {'CPU ms':>8} {'to spin':>8} {'CPU':>6}   (medians; ratios in rounds)")
    for title, found in figures.items():
        for name, values in found.items():
            ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(values, found["spin"], strict=True)]
            medians = [statistics.median(column) for column in zip(*values, strict=True)]
            of_rounds = [statistics.median(column) for column in zip(*ratios, strict=True)]
            print(f"{title:16} {name:14} {medians[0]:8.1f} {medians[1]:8.1f} {of_rounds[0]:8.2f} {of_rounds[1]:6.2f}")


if __name__ == "__main__":
    typer.run(main)
