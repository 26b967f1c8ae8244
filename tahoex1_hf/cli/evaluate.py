# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 evaluate`."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import command, quick_imports

if TYPE_CHECKING:
    from tahoex1_hf.benchmarking.cell_embeddings import Computing
    from tahoex1_hf.benchmarking.sources import Source
    from tahoex1_hf.benchmarking.task import Benchmark


class Task(StrEnum):
    """Benchmark."""

    essentiality = "essentiality"
    contextual = "contextual-essentiality"
    hallmark = "hallmark"
    cell_types = "cell-types"
    tissue = "tissue"
    perturbation = "perturbation"
    state = "state"


class Grid(StrEnum):
    """Shapes of the MLP."""

    small = "small"
    full = "full"


# Options that a task needs, and others that it has.
_NEEDED = {
    Task.essentiality: ("--labels", "--families"),
    Task.contextual: ("--lines", "--dependencies"),
    Task.hallmark: ("--gene-sets",),
    Task.cell_types: ("--label",),
    Task.tissue: ("--lines",),
    Task.perturbation: ("--label", "--control"),
    Task.state: ("--label", "--control", "--line", "--state-python"),
}
_OTHERS = {
    Task.hallmark: ("--grid",),
    Task.cell_types: ("--batch",),
    Task.perturbation: ("--line",),
    Task.state: ("--zero-shot", "--few-shot"),
}
_SEVERAL = (Task.essentiality, Task.hallmark, Task.perturbation)  # tasks that take several files of cells


@command(extra="evaluate,data")
def evaluate(
    task: Annotated[Task, typer.Argument(help="Benchmark.")],
    source: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=WHAT",
            help="A source of embeddings: a model or adapter (folder, Hub name); pca, random, expression, "
            "untrained:MODEL, or PCA of other cells, projected:CELLS.h5ad; or a file, FILE.h5ad:KEY (obsm or varm), "
            "FILE.npz (names, embeddings) or FILE.parquet. Repeat it. Baselines that are not named are added.",
        ),
    ],
    cells: Annotated[
        list[Path],
        typer.Option(
            help="Cells with raw counts in X and Ensembl ids, .h5ad; of cell lines, CCLE's .gct. Essentiality and "
            "hallmark take several; perturbation the screen, then cells for embeddings of genes (else its controls)."
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
    gene_sets: Annotated[
        Path | None, typer.Option(help="Sets of genes, .gmt, by symbol or Ensembl id.", show_default=False)
    ] = None,
    grid: Annotated[
        Grid | None,
        typer.Option(help="Shapes of the MLP that are tried: 4, or the 24 of the original.", show_default="small"),
    ] = None,
    lines: Annotated[
        Path | None, typer.Option(help="DepMap's table of cell lines, Model.csv.", show_default=False)
    ] = None,
    dependencies: Annotated[
        Path | None, typer.Option(help="DepMap's CRISPRGeneDependency.csv.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of times that the folds or halves are made.", show_default="1; 5 for hallmark"
        ),
    ] = None,
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
    with quick_imports():
        from tahoex1_hf.benchmarking.cell_embeddings import Computing
        from tahoex1_hf.benchmarking.running import run_benchmark

    given: dict[str, Any] = {
        "--label": label,
        "--batch": batch,
        "--control": control,
        "--line": line,
        "--labels": labels,
    }
    given |= {"--families": families, "--gene-sets": gene_sets, "--grid": grid, "--lines": lines}
    given |= {"--dependencies": dependencies, "--zero-shot": zero_shot, "--few-shot": few_shot}
    given |= {"--state-python": state_python}
    given = {name: value for name, value in given.items() if value}
    known = (*_NEEDED[task], *_OTHERS.get(task, ()))
    if strange := [name for name in given if name not in known]:
        raise ValueError(f"{', '.join(strange)} is not an option of {task.value}: leave it out.")
    if not set(_NEEDED[task]) <= set(given):
        raise ValueError(f"{task.value} needs {' and '.join(_NEEDED[task])}.")
    if task not in _SEVERAL and len(cells) != 1:
        raise ValueError(f"{task.value} needs one file of --cells.")
    computing = Computing(dtype.value, batch_tokens, device)
    if task is Task.state:
        return _state(source, cells[0], given, steps, computing, output)
    sources = _sources(task, source, batch)
    verdicts = run_benchmark(_benchmark(task, cells, given, seeds, computing), sources, output, restart)
    return f"{verdicts}\nThe report is in {output}."


def _sources(task: Task, texts: Sequence[str], batch: str | None) -> "list[Source]":
    """Read the sources, and add the baselines of the task: Harmony where it is installed and there are batches."""
    from tahoex1_hf.benchmarking.perturbation import with_predictors
    from tahoex1_hf.benchmarking.sources import read_sources

    if task is Task.perturbation:
        return with_predictors(read_sources(texts))
    if task is Task.contextual:
        return read_sources(texts, ("mean",))
    return read_sources(texts, ("harmony",) if batch is not None and find_spec("harmonypy") else ())


def _benchmark(
    task: Task, cells: Sequence[Path], given: Mapping[str, Any], seeds: int | None, computing: "Computing"
) -> "Benchmark":
    """Read the files of a task, and return it."""
    from tahoex1_hf.benchmarking.cell_lines import TISSUE, read_dependencies, read_lines
    from tahoex1_hf.benchmarking.cell_types import CellTypes
    from tahoex1_hf.benchmarking.cells import read_cells
    from tahoex1_hf.benchmarking.contextual_essentiality import ContextualEssentiality
    from tahoex1_hf.benchmarking.essentiality import Essentiality
    from tahoex1_hf.benchmarking.gene_labels import read_gene_labels
    from tahoex1_hf.benchmarking.gene_sets import read_gene_sets
    from tahoex1_hf.benchmarking.hallmark import SEEDS, Hallmark
    from tahoex1_hf.benchmarking.perturbation import Perturbation
    from tahoex1_hf.benchmarking.screens import read_screen
    from tahoex1_hf.benchmarking.tissue import Tissue

    if task in (Task.tissue, Task.contextual):
        lines = read_lines(cells[0], given["--lines"])
        if task is Task.tissue:
            return Tissue(lines, TISSUE, None, seeds or 1, computing)
        dependencies, lines = read_dependencies(given["--dependencies"], lines)
        return ContextualEssentiality(lines, dependencies, seeds or 1, computing)
    sets = [read_cells(path) for path in cells]
    if task is Task.cell_types:
        return CellTypes(sets[0], given["--label"], given.get("--batch"), seeds or 1, computing)
    if task is Task.perturbation:
        screen = read_screen(sets[0], given["--label"], given["--control"], given.get("--line"))
        return Perturbation(screen, sets[1:], seeds or 1, computing)
    if task is Task.hallmark:
        grid = given.get("--grid", Grid.small).value
        return Hallmark(sets, read_gene_sets(given["--gene-sets"]), seeds or SEEDS, grid, computing)
    genes = read_gene_labels(given["--labels"], given["--families"])
    return Essentiality(sets, genes, seeds or 1, computing)


def _state(
    source: list[str], cells: Path, given: Mapping[str, Any], steps: int, computing: "Computing", output: Path
) -> str:
    """Hand one source over to STATE, and return what came of it."""
    from tahoex1_hf.benchmarking.cells import read_cells
    from tahoex1_hf.benchmarking.screens import read_screen
    from tahoex1_hf.benchmarking.sources import read_sources
    from tahoex1_hf.benchmarking.state import make_split
    from tahoex1_hf.benchmarking.state_runs import StateRun, evaluate_state

    if len(source) != 1:
        raise ValueError("state takes one --source.")
    screen = read_screen(read_cells(cells), given["--label"], given["--control"], given["--line"])
    split = make_split(screen, given.get("--zero-shot", []), given.get("--few-shot", []), seed=0)
    run = StateRun(given["--state-python"], steps)
    table = evaluate_state(screen, read_sources(source)[0], split, run, computing, output)
    return f"{table}\nThe report is in {output}."
