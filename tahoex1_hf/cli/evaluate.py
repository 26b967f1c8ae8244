# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 evaluate`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import command

if TYPE_CHECKING:
    from tahoex1_hf.benchmarking.cell_embeddings import Computing


class Task(StrEnum):
    """Benchmark."""

    essentiality = "essentiality"
    cell_types = "cell-types"
    perturbation = "perturbation"
    state = "state"


_OPTIONS = {
    Task.essentiality: ("--labels", "--families"),
    Task.cell_types: ("--label", "--batch"),
    Task.perturbation: ("--label", "--control", "--line"),
    Task.state: ("--label", "--control", "--line", "--zero-shot", "--few-shot", "--state-python"),
}


@command(extra="evaluate,data")
def evaluate(
    task: Annotated[Task, typer.Argument(help="Benchmark.")],
    source: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=WHAT",
            help="A source of embeddings: a model or adapter (folder, Hub name); pca, random, expression or "
            "untrained:MODEL; or a file, FILE.h5ad:KEY (obsm or varm), FILE.npz (names, embeddings) or FILE.parquet. "
            "Repeat it. Baselines that are not named are added.",
        ),
    ],
    cells: Annotated[
        list[Path],
        typer.Option(
            help="Cells with raw counts in X and Ensembl ids, .h5ad. Essentiality takes several; perturbation the "
            "screen, then cells for embeddings of genes (by default the screen's controls)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the report.")],
    label: Annotated[
        str | None, typer.Option(help="Column of obs with the cell types, or the perturbations.", show_default=False)
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Column of obs with batches, each left out once.", show_default=False)
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="Value of --label of cells without a perturbation.", show_default=False)
    ] = None,
    line: Annotated[
        str | None,
        typer.Option(help="Column of obs with cell lines, each with its own controls.", show_default=False),
    ] = None,
    zero_shot: Annotated[
        list[str] | None, typer.Option(help="Line of which STATE sees the controls alone.", show_default=False)
    ] = None,
    few_shot: Annotated[
        list[str] | None,
        typer.Option(help="Line of which STATE is tested on a fifth of the perturbations.", show_default=False),
    ] = None,
    state_python: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with arc-state (`make evaluate`).", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps of STATE.")] = 20,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="Table of genes with a column label (1 essential, 0 not); or two: essential genes, then others.",
            show_default=False,
        ),
    ] = None,
    families: Annotated[
        Path | None, typer.Option(help="Table with the protein family, cluster_id, of each gene.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of times that the folds or halves are made.")] = 1,
    dtype: Annotated[
        options.FloatDtype, typer.Option(help="Precision of the model; float32 gives the same scores everywhere.")
    ] = options.FloatDtype.float32,
    batch_tokens: options.BatchTokens = None,
    device: options.Device = None,
    restart: options.Restart = False,
) -> str:
    """Evaluate embeddings of cells or genes beside the simple baselines that decide what they are worth.

    The same command resumes a run that was stopped. It writes report.md, report.json, scores.csv, scores.png, and
    model-index.yaml with the entries for a model card.
    """
    from tahoex1_hf.benchmarking.cell_embeddings import Computing
    from tahoex1_hf.benchmarking.cell_types import CellTypes
    from tahoex1_hf.benchmarking.cells import read_cells
    from tahoex1_hf.benchmarking.essentiality import Essentiality
    from tahoex1_hf.benchmarking.gene_labels import read_gene_labels
    from tahoex1_hf.benchmarking.perturbation import Perturbation, with_predictors
    from tahoex1_hf.benchmarking.running import run_benchmark
    from tahoex1_hf.benchmarking.screens import read_screen
    from tahoex1_hf.benchmarking.sources import read_sources
    from tahoex1_hf.benchmarking.task import Benchmark

    given: dict[str, object] = {"--label": label, "--batch": batch, "--control": control, "--line": line}
    given |= {"--labels": labels, "--families": families}
    given |= {"--zero-shot": zero_shot, "--few-shot": few_shot, "--state-python": state_python}
    if strange := [name for name, value in given.items() if value and name not in _OPTIONS[task]]:
        raise ValueError(f"{', '.join(strange)} is not an option of {task.value}: leave it out.")
    if task is Task.state:
        place = (cells, label, control, line, zero_shot or [], few_shot or [])
        return _state(source, *place, state_python, steps, Computing(dtype.value, batch_tokens, device), output)
    sources = read_sources(source)
    computing = Computing(dtype.value, batch_tokens, device)
    sets = [read_cells(path) for path in cells]
    benchmark: Benchmark
    if task is Task.cell_types:
        if label is None or len(sets) != 1:
            raise ValueError(f"{task.value} needs --label and one file of --cells.")
        benchmark = CellTypes(sets[0], label, batch, seeds, computing)
    elif task is Task.perturbation:
        if label is None or control is None:
            raise ValueError(f"{task.value} needs --label and --control.")
        sources = with_predictors(sources)
        benchmark = Perturbation(read_screen(sets[0], label, control, line), sets[1:], seeds, computing)
    else:
        if not labels or families is None:
            raise ValueError(f"{task.value} needs --labels and --families.")
        benchmark = Essentiality(sets, read_gene_labels(labels, families), seeds, computing)
    verdicts = run_benchmark(benchmark, sources, output, restart)
    return f"{verdicts}\nThe report is in {output}."


def _state(
    source: list[str],
    cells: list[Path],
    label: str | None,
    control: str | None,
    line: str | None,
    zero_shot: list[str],
    few_shot: list[str],
    python: Path | None,
    steps: int,
    computing: "Computing",
    output: Path,
) -> str:
    """Hand one source over to STATE, and return what came of it."""
    from tahoex1_hf.benchmarking.cells import read_cells
    from tahoex1_hf.benchmarking.screens import read_screen
    from tahoex1_hf.benchmarking.sources import read_sources
    from tahoex1_hf.benchmarking.state import make_split
    from tahoex1_hf.benchmarking.state_runs import StateRun, evaluate_state

    if label is None or control is None or line is None or python is None:
        raise ValueError("state needs --label, --control, --line and --state-python.")
    if len(source) != 1 or len(cells) != 1:
        raise ValueError("state takes one --source and one file of --cells.")
    screen = read_screen(read_cells(cells[0]), label, control, line)
    split = make_split(screen, zero_shot, few_shot, seed=0)
    table = evaluate_state(screen, read_sources(source)[0], split, StateRun(python, steps), computing, output)
    return f"{table}\nThe report is in {output}."
