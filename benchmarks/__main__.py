"""Run the whole suite, print one table, and write all that was measured, its charts, and the tables of the pages.

    python -m benchmarks                     writes docs/benchmarks (results.json, charts), README.md and docs/speed.md
                                             (after a stop, the same command goes on with the parts that are missing)
    python -m benchmarks --only PART ...     docs/benchmarks/PART.json, which then stands for that part
    python -m benchmarks --quick             tiny sizes, in benchmarks/results: to check that all of it works
    python -m benchmarks gpu right|cost [--tiny]      the check of a machine with a GPU (gpu.py)
    python -m benchmarks checkpoints [--tiny]       how long a checkpoint of shards stops a training (checkpoints.py)
    python -m benchmarks absent-genes prepare|ablate|table|train      absent genes as targets (absent_genes.py)

The machine may be shared and noisy, so each round measures in turn the hardware's limit, the reference (the original's
algorithm, `reference.py`) and ours. Read the medians of the ratios within rounds; absolute rates only show the state
of the machine that day. Values are compared too: where they differ from the reference's, the run stops.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import (
    absent_genes,
    attention,
    charts,
    checkpoints,
    embedding,
    feeding,
    gpu,
    memory,
    pages,
    profile,
    scaling,
    startup,
    table,
    tokenizing,
    train,
)
from benchmarks.machine import description
from benchmarks.measuring import Row, Suite, machine_rows, progress
from benchmarks.unfinished import Measured, Unfinished, code_digest


class Part(StrEnum):
    """Parts of the suite, in the order in which they run."""

    tokenizing = "tokenizing"
    embedding = "embedding"
    profile = "profile"
    attention = "attention"
    genes = "genes"
    training = "training"
    feeding = "feeding"
    startup = "startup"
    memory = "memory"
    scaling = "scaling"


PARTS: dict[Part, Callable[[Suite], list[Row]]] = {
    Part.tokenizing: tokenizing.measure,
    Part.embedding: embedding.measure,
    Part.profile: profile.measure,
    Part.attention: attention.measure,
    Part.genes: embedding.measure_genes,
    Part.training: train.measure,
    Part.feeding: feeding.measure,
    Part.startup: startup.measure,
    Part.memory: memory.measure,
    Part.scaling: scaling.measure,
}


def measured(part: Part, suite: Suite) -> Measured:
    """Measure a part."""
    progress(part.value)
    start, before = time.perf_counter(), os.times()
    rows = PARTS[part](suite)
    seconds, after = time.perf_counter() - start, os.times()
    limits = {name: list(limit.seen) for name, limit in suite.limits.items()}
    return Measured(rows, limits, round(seconds, 1), round(sum(after[:4]) - sum(before[:4]), 1))


def write_json(path: Path, suite: Suite, machine: dict, parts: Mapping[str, Measured]) -> list[Row]:
    """Write all that was measured to a JSON file, and return its rows."""
    rows = [*machine_rows(suite.limits.values()), *(row for found in parts.values() for row in found.rows)]
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "quick": suite.quick,
        "rounds": suite.rounds,
        "machine": machine,
        "seconds_of_parts": {name: found.seconds for name, found in parts.items()},
        "cpu_seconds_of_parts": {name: found.cpu_seconds for name, found in parts.items()},
        "rows": [row.as_json() for row in rows],
    }
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows


def whole_run(suite: Suite, machine: dict, output: Path, restart: bool) -> tuple[dict[str, Measured], Unfinished]:
    """Measure all parts, but for those that an earlier run on the same machine has measured before it was stopped."""
    identity = {"machine": machine, "rounds": suite.rounds, "quick": suite.quick, "code": code_digest()}
    try:
        unfinished = Unfinished(output, identity, restart)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for part in PARTS:
        if part.value in unfinished.parts:
            progress(f"{part.value}: measured before")
            for name, seen in unfinished.parts[part.value].limits.items():
                suite.limits[name].seen = list(seen)
        else:
            unfinished.add(part.value, measured(part, suite))
    return {part.value: unfinished.parts[part.value] for part in PARTS}, unfinished


app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what is measured, and the charts. The pages are written for docs/benchmarks alone.",
            show_default="docs/benchmarks; with --quick benchmarks/results",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use tiny sizes, to check that everything works.")] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds.", show_default="3; with --quick 2")
    ] = None,
    only: Annotated[list[Part] | None, typer.Option(help="Part to run alone; may be repeated.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Measure all parts anew, also those of a run that was stopped.")
    ] = False,
) -> None:
    """Measure speed and memory beside the original's algorithm and the hardware's limits."""
    if context.invoked_subcommand is not None:
        return
    suite = Suite(rounds=rounds or (2 if quick else 3), quick=quick)
    if quick:  # waiting for a second thread would cost such small products more than it saves
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that the suite starts
    machine = description()
    output = output or (Path(__file__).parent / "results" if quick else pages.RECORD)
    if quick and output.resolve() == pages.RECORD:
        raise typer.BadParameter("A quick run says nothing about speed: name another --output than docs/benchmarks.")
    output.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    title = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; {suite.rounds} rounds"
    title += "; --quick: tiny sizes, 1 thread, no statement about speed" if quick else ""
    if only:
        parts = {part.value: measured(part, suite) for part in PARTS if part in only}
        for name, found in parts.items():
            rows = write_json(output / f"{name}.json", suite, machine, {name: found})
            written.append(f"{name}.json")
        print(f"{title}\n\n{table.render([row for found in parts.values() for row in found.rows])}")
    else:
        parts, unfinished = whole_run(suite, machine, output, restart)
        rows = write_json(output / pages.RESULTS, suite, machine, parts)
        print(f"{title}\n\n{table.render(rows)}")
        drawn = {"results.png": charts.draw_results, "scaling.png": charts.draw_scaling}
        written += [pages.RESULTS, *(name for name, draw in drawn.items() if draw(rows, output / name, title))]
        for part in PARTS:  # measured before by themselves, perhaps on another machine
            (output / f"{part}.json").unlink(missing_ok=True)
        unfinished.forget()
    print(f"\nwritten to {output}: {', '.join(written)}")
    if output.resolve() == pages.RECORD:
        print(f"pages written anew: {', '.join(pages.write_pages()) or 'none, since nothing changed'}")


app.command("gpu")(gpu.main)
app.command("checkpoints")(checkpoints.main)
app.command("absent-genes")(absent_genes.main)

if __name__ == "__main__":
    app()
