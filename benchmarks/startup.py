"""Measure the time to start: the command's help, importing the package, embedding the first cells.

All is measured in CPU seconds (user and system) of a fresh process, which busy neighbours hardly change.

    python -m benchmarks.startup [--quick]      # embeds in a fresh process; prints when each batch was done, as JSON
"""

import json
import statistics
import time
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.cells import ensembl_ids, synthetic_counts, tokenizer_for
from benchmarks.child import python
from benchmarks.embedding import random_model
from benchmarks.measuring import Row, Series, Suite, Task, in_turn, progress
from tahoex1_hf import TahoeX1Model
from tahoex1_hf.inference.encoder import CellEncoder

HELP = "tahoex1 --help"
IMPORT_PACKAGE = "import tahoex1_hf"
IMPORT_MODEL = "from tahoex1_hf import TahoeX1Model"
IMPORT_BERT = "from transformers import BertModel"
TOKENS = 256  # the same for every cell, so that cells per second mean the same at the beginning and at the end
FIRST_SECONDS = 5.0  # of CPU time


def cpu_seconds(name: str) -> float:
    """Return the CPU seconds of a fresh process that runs a statement, or the command's help."""
    arguments = ("-m", "tahoex1_hf", "--help") if name == HELP else ("-c", name)
    return python(*arguments).checked().cpu_seconds


def measure(suite: Suite) -> list[Row]:
    """Return the rows of this part."""
    ours = (HELP, IMPORT_PACKAGE, IMPORT_MODEL)
    for name in suite.pick((IMPORT_BERT, *ours), ()):
        cpu_seconds(name)  # afterwards the files are compiled and in the page cache
    tasks = {name: Task(partial(cpu_seconds, name)) for name in (IMPORT_BERT, *ours)}
    series = in_turn(tasks, suite.pick(suite.rounds, 1))
    remark = f"fresh process; reference: {IMPORT_BERT}"
    starts = [
        Row("startup", name, "CPU s", series[name], series[IMPORT_BERT], remark, smaller_is_better=True)
        for name in ours
    ]
    return [*starts, *first_cells(suite)]


def first_cells(suite: Suite) -> list[Row]:
    """Return the rate of the first CPU seconds after loading (tokenizing, first batches), beside the later rate."""
    first, rest = Series(), Series()
    seconds = suite.pick(FIRST_SECONDS, 0.5)
    times_of_rounds = []
    rounds = suite.pick(suite.rounds, 1)
    for number in range(rounds):
        progress(f"  round {number + 1} of {rounds}: first cells")
        quick = ["--quick"] if suite.quick else []
        times = json.loads(python("-m", "benchmarks.startup", *quick).checked().last_line)
        early = [(t, n) for t, n in times if t <= seconds]
        late = [(t, n) for t, n in times if t > seconds]
        assert 0 < len(early) < len(times), f"no batch was done before, or none after {seconds} s: {times}"
        first.values.append(sum(n for _, n in early) / early[-1][0])
        rest.values.append(sum(n for _, n in late) / (late[-1][0] - early[-1][0]))
        times_of_rounds.append(times)
    first_batch = statistics.median(times[0][0] for times in times_of_rounds)
    remark = (
        f"{suite.shape_name}, {TOKENS} tokens a cell; first batch after {first_batch:.2f} CPU s; reference: after that"
    )
    return [
        Row("startup", f"first {seconds:g} CPU s after loading", "cells/CPU s", first, rest, remark,
            details={"seconds_and_cells_of_batches": times_of_rounds})
    ]  # fmt: skip


def main(quick: Annotated[bool, typer.Option("--quick", help="Small sizes.")] = False) -> None:
    """Embed cells, and print when each batch was done."""
    suite = Suite(rounds=1, quick=quick)
    names = ensembl_ids(5000)
    counts = synthetic_counts(np.full(suite.pick(80, 2000), TOKENS - 1), len(names))
    tokenizer = tokenizer_for(names, TOKENS)
    # In bfloat16 some CPUs are done with all cells before the first seconds are over.
    settings: dict[str, Any] = {"batch_tokens": 4 * TOKENS, "device": "cpu", "dtype": "float32"}
    encoder = CellEncoder(random_model(TahoeX1Model, suite.config()), tokenizer, **settings)
    times: list[tuple[float, int]] = []
    start = time.process_time()
    encoded = tokenizer.encode_counts(counts, tokenizer.match_genes(names))
    encoder.embed(encoded, on_batch=lambda cells: times.append((time.process_time() - start, cells)))
    print(json.dumps(times))


if __name__ == "__main__":
    typer.run(main)
