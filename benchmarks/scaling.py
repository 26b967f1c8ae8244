"""Measure the speed by length of the cells, by their number, and by number of processes."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import reference
from benchmarks.cells import ensembl_ids, synthetic_counts, tokenizer_for
from benchmarks.child import Run, python
from benchmarks.embedding import COLUMNS, Subject, check, random_model, reference_shape
from benchmarks.machine import ALL_CORES
from benchmarks.measuring import Row, Series, Suite, Task, in_turn
from benchmarks.memory import MODEL, embed_command, embedded_files, write_h5ad
from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Model, TahoeX1Tokenizer
from tahoex1_hf.inference.encoder import CellEncoder

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LAUNCHERS = {
    "accelerate launch": ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
                                "--dynamo_backend", "no", "--num_processes", "2", "--multi_gpu"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
}  # fmt: skip


def measure(suite: Suite) -> list[Row]:
    """Return the rows of this part."""
    return [*by_length(suite), *by_cells(suite), *by_processes(suite)]


def token_rate(length: int, cell_rate: Callable[[], float]) -> float:
    """Return the tokens per second of cells of one length, of which `cell_rate` gives the cells per second."""
    return length * cell_rate()


def by_length(suite: Suite) -> list[Row]:
    """Return the tokens per second for cells of 256 to 8,192 tokens, with equally many tokens at every length."""
    lengths = suite.pick((256, 512, 1024, 2048, 4096, 8192), (128, 256, 512))
    names, longest = ensembl_ids(COLUMNS), max(lengths)
    tokenizer = tokenizer_for(names, longest)
    genes = tokenizer.match_genes(names)
    model = random_model(TahoeX1Model, suite.config())
    theirs = reference.embedding_reference(reference_shape(model.config), model.state_dict())
    encoder = CellEncoder(model, tokenizer, device="cpu", dtype="float32")
    subjects = {
        length: Subject(
            synthetic_counts(np.full(longest // length, length - 1), COLUMNS), tokenizer, genes, theirs, longest
        )
        for length in lengths
    }
    tasks = {}
    for length, subject in subjects.items():
        tasks[f"reference, {length}"] = Task(partial(token_rate, length, subject.reference_rate))
        tasks[f"ours, {length}"] = Task(partial(token_rate, length, partial(subject.our_rate, "ours", encoder)))
    subjects[lengths[0]].reference_rate()  # warm-up
    subjects[lengths[0]].our_rate("ours", encoder)
    series = in_turn(tasks, suite.rounds)
    rows = []
    for length, subject in subjects.items():
        figures = subject.compare("ours")
        check(figures)
        remark = f"{suite.shape_name}, max difference {figures['max_difference']:.1e}"
        details = {"length": length, "cells": longest // length, **figures}
        measured = series[f"ours, {length}"], series[f"reference, {length}"]
        name = f"cells of {length:,} tokens"
        rows.append(Row("scaling", name, "tokens/s", *measured, remark, details=details))
    return rows


def by_cells(suite: Suite) -> list[Row]:
    """Return the cells per second of the command, start included, in the runs of the part `memory`."""
    return [
        Row("scaling", f"tahoex1 embed, {run.cells:,} cells", "cells/s", Series([run.cells / run.seconds]),
            remark=f"{run.seconds:.0f} s, start included; small checkpoint, 20 genes a cell",
            details={"cells": run.cells, "seconds": run.seconds})
        for run in embedded_files(suite)
    ]  # fmt: skip


def by_processes(suite: Suite) -> list[Row]:
    """Return the cells per second of one process and of two, with one thread each, on the same cells."""
    folder = suite.folder / "processes"
    folder.mkdir()
    cells = suite.pick(3000, 500)
    source = write_h5ad(folder / "cells.h5ad", cells, expressed=60)
    model = save_model(folder / "model", suite)
    output = folder / "one" / "cells.parquet"
    one = Command(embed_command(source, output, model), output, cells)
    one.rate()
    tasks, missing = {"one": Task(one.rate)}, {}
    for name, launcher in LAUNCHERS.items():
        output = folder / name.split()[0] / "cells.parquet"
        two = Command([*launcher, *embed_command(source, output, model)], output, cells)
        missing[name] = why_not(launcher, two, one, folder)
        if not missing[name]:
            tasks[name] = Task(two.rate)
    series = in_turn(tasks, suite.pick(suite.rounds, 1))
    remark = f"{cells:,} cells of 61 tokens, 1 thread a process; start included"
    rows = [Row("scaling", "1 process", "cells/s", series["one"], remark=remark, details={"processes": 1})]
    for name, reason in missing.items():
        row = Row("scaling", f"2 processes, {name}", not_measured=reason)
        if not reason:
            row.unit, row.series, row.reference = "cells/s", series[name], series["one"]
            row.remark, row.details = "reference: 1 process; same embeddings", {"processes": 2}
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Command:
    """A run of `tahoex1 embed` on one file: the arguments of Python, the output and the number of cells."""

    arguments: list[str]
    output: Path
    cells: int

    def rate(self) -> float:
        """Return the cells per second, including the start of the processes."""
        return self.cells / self.run().checked().seconds

    def run(self) -> Run:
        """Run the command into an empty folder, since otherwise it would resume an earlier run."""
        shutil.rmtree(self.output.parent, ignore_errors=True)
        self.output.parent.mkdir()
        return python(*self.arguments, environment=ONE_THREAD, timeout=1200)


def why_not(launcher: list[str], two: Command, one: Command, folder: Path) -> str:
    """Run two processes once; return why they cannot be measured, or "" where they can."""
    if len(ALL_CORES) < 2:
        return "this process may use one core only"
    probe = folder / "probe.py"
    probe.write_text("print('one of the processes')")
    try:
        started = python(*launcher, str(probe), environment=ONE_THREAD, timeout=120).checked()
        number = started.output.count("one of the processes")
        if number != 2:
            return f"this command starts {number} process on a CPU, not 2"
        run = two.run()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error).splitlines()[0]
    if run.code or not two.output.is_file():
        return f"the command failed: {run.reason}"
    ours, theirs = (pq.read_table(command.output).to_pandas() for command in (two, one))
    assert (ours["cell"] == theirs["cell"]).all(), "two processes wrote the cells in another order than one"
    difference = np.abs(np.stack(ours["X_tahoe_x1"]) - np.stack(theirs["X_tahoe_x1"])).max()
    assert difference < 1e-5, f"two processes wrote other embeddings than one: {difference}"
    return ""


def save_model(folder: Path, suite: Suite) -> Path:
    """Save a model with the demo's vocabulary, large enough that starting a process is not most of the work."""
    tokenizer = TahoeX1Tokenizer.from_pretrained(MODEL)
    sizes = suite.pick({"hidden_size": 256, "num_hidden_layers": 6}, {"hidden_size": 64, "num_hidden_layers": 2})
    config = suite.config(vocab_size=len(tokenizer), num_attention_heads=4, **sizes)
    random_model(TahoeX1ForPreTraining, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
