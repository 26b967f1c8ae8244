"""Genes that a cell does not express as targets: `python -m benchmarks absent-genes prepare|ablate|table|train`.

`prepare` makes the dataset of the recipe `absent-genes` from the whole-transcriptome sets of ../shared/data that no
benchmark of docs/absent-genes.md is made of. `ablate` trains a small model with each encoding, share of absent genes
and seed, on the same number of tokens, and reads cell types from it in sets that it has not seen; what is done is not
done again. `table` prints what was found. `train` makes the checkpoint of examples/absent_genes_checkpoint.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import stats

from tahoex1_hf.benchmarking.cell_embeddings import Computing
from tahoex1_hf.benchmarking.cell_types import RANDOM, CellTypes
from tahoex1_hf.benchmarking.cells import read_cells
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.cells.whole import read_all_genes
from tahoex1_hf.common.files import write_json
from tahoex1_hf.data.config import parse_config
from tahoex1_hf.data.preparation import prepare
from tahoex1_hf.training.config import read_pretrain_config
from tahoex1_hf.training.pretraining import pretrain

SHARED = Path(os.environ.get("TAHOEX1_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "h5ad"
CORPUS = (
    "heart_san_1000_native_ensembl",
    "pbmc_frozen_donor_a",
    "corpus_pbmc5k_scvi",
    "corpus_pbmc10k_scvi",
    "corpus_placenta_cellxgene",
)
"""Sets to train on: their counts are CC BY 4.0 or BSD-3, and no test set is of the same publication."""
TESTS = {"gut_crohn_scp1884": "cell_type", "pbmc_kang_muscat": "cell_type", "lung_lines_sc_mixology": "cell_line"}
"""Sets to test on, and the column with the labels. (Mixtures of the lines are no corpus: they are the same lines.)"""
LEAST_CELLS = 20
SEEDS = (0, 1, 2)

PLAIN = ("absent_targets=0", "cell_targets=hidden")
"""What makes the recipe one without absent genes."""
_SCALED = "model.scale_targets=true"  # bins 1..50 to [-1, 1]: their squares would drown everything else
ARMS: dict[str, tuple[str, ...]] = {
    "bins, expressed genes only (as in the original)": ("value_encoding=bins", _SCALED),
    "bins, filled up with absent genes": ("value_encoding=bins", _SCALED, "packed=false", "unexpressed_padding=true"),
    "bins, 0.25 absent": ("value_encoding=bins", _SCALED, "absent_targets=0.25"),
    "bins, 0.5 absent": ("value_encoding=bins", _SCALED, "absent_targets=0.5"),
    "bins, 0.25 absent, cell predicts all": (
        "value_encoding=bins",
        _SCALED,
        "absent_targets=0.25",
        "cell_targets=all",
    ),
    "log1p, expressed genes only": (),
    "log1p, 0.25 absent": ("absent_targets=0.25",),
    "log1p, 0.5 absent": ("absent_targets=0.5",),
    "log1p, 0.25 absent, cell predicts all": ("absent_targets=0.25", "cell_targets=all"),
}
"""Name of each trial, and what it changes of the recipe without absent genes."""

STAGES: dict[int, tuple[str, ...]] = {
    2000: ("context_length=320", "absent_targets=0.2", "mlm_probability=[0.2, 0.4]"),
    4500: ("context_length=512", "absent_targets=0.1", "mlm_probability=[0.1, 0.3]"),
    5000: ("context_length=1024", "absent_targets=0.1", "mlm_probability=[0.1, 0.3]", "microbatch_size=8"),
}
"""Last step of each stage of the long training, and its settings: many steps with few genes, then fewer with more."""
_FIRST = tuple(next(arm for arm in ARMS if arm.startswith(encoding)) for encoding in ("bins", "log1p"))


class Piece(StrEnum):
    """Pieces of the trial, in the order in which they are to be run."""

    prepare = "prepare"
    ablate = "ablate"
    table = "table"
    train = "train"


def write_vocabulary(files: list[Path], path: Path, least_cells: int) -> int:
    """Write a vocabulary of the genes that enough cells express, laid out as the released one; return their number."""
    cells: dict[str, int] = {}
    for file in files:
        adata = read_all_genes(file)
        for gene, number in zip(adata.var_names, np.asarray((adata.X > 0).sum(0)).ravel(), strict=True):
            cells[gene] = cells.get(gene, 0) + int(number)
    genes = sorted(gene for gene, number in cells.items() if number >= least_cells)
    tokens = ["<pad>", "<cls>", "<eoc>", *genes]
    tokens += [f"<junk{number}>" for number in range(-len(tokens) % 64)]
    write_json(path, {token: number for number, token in enumerate(tokens)})
    return len(genes)


def make_dataset(folder: Path, files: list[Path], least_cells: int = LEAST_CELLS) -> None:
    """Prepare the training cells below a folder: `vocab.json`, and the dataset `cells`."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{write_vocabulary(files, folder / 'vocab.json', least_cells):,} genes in {least_cells} cells or more")
    source = {"kind": "anndata", "paths": [str(file) for file in files], "min_known_genes": 0.3}
    settings = {"output": str(folder / "cells"), "vocab": str(folder / "vocab.json"), "sources": [source]}
    prepare(parse_config({**settings, "validation": {"fraction": 0.03}}, "the cells of the trial"))


def runs() -> Iterator[tuple[str, int]]:
    """Yield the trials, all of the first seed before the next, so that a trial that is cut short is balanced."""
    for seed in SEEDS:
        for arm in ARMS:
            yield arm, seed


def train_and_score(
    dataset: Path, arm: str, seed: int, steps: int, tests: list[CellTypes], at: Path
) -> dict[str, Any]:
    """Train one model of the trial; return the scores of kNN, and the cost."""
    run = ("eval_cells=0", f"max_steps={steps}", f"save_steps={steps + 1}", f"dataset={dataset}")
    started = time.process_time()
    pretrain(read_pretrain_config("absent-genes", [*PLAIN, *run, f"output_dir={at}", f"seed={seed}", *ARMS[arm]]))
    spent = time.process_time() - started
    found: dict[str, Any] = {"arm": arm, "seed": seed, "steps": steps, "cpu_seconds": round(spent, 1)}
    for test in tests:
        features = test.embed(Source("model", "model", str(at)))
        found[test.dataset] = test.read(features, RANDOM, test.folds()[RANDOM], "kNN").value
        if arm in _FIRST and seed == SEEDS[0]:  # weights are random, so that the encoding alone matters
            twin = test.embed(Source("twin", "untrained", str(at)))
            found[f"{test.dataset} untrained"] = test.read(twin, RANDOM, test.folds()[RANDOM], "kNN").value
    return found


def train(folder: Path) -> None:
    """Train the small checkpoint in all stages, of which those that are done are not done again."""
    before, start = None, 0
    for end, changes in STAGES.items():
        at = folder / f"until-{end}"
        last = end == max(STAGES)
        fall = (f"schedule={'stable' if last else 'constant'}", f"decay_fraction={(end - start) / end}")
        steps = (f"max_steps={end}", f"warmup_fraction={min(100 / end, 0.5)}", "save_steps=100", "save_total_limit=5")
        where = (f"dataset={folder / 'cells'}", f"output_dir={at}", *((f"resume_from={before}",) if before else ()))
        if pretrain(read_pretrain_config("absent-genes", [*fall, *steps, *where, *changes])):
            raise typer.Exit(75)  # stopped, after a checkpoint: the same command goes on
        before, start = at / f"checkpoint-{end}", end


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of the seeds, and half the width of its 95 % interval (Student's t)."""
    half = (
        stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        if len(values) > 1
        else np.nan
    )
    return float(np.mean(values)), float(half)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the scores as a Markdown table with one line for each trial: mean of the seeds ± half the interval."""
    names = [name for name in TESTS if name in rows[0]]
    lines = ["| targets | " + " | ".join(names) + " | seeds | CPU seconds |", "| --- |" + " --- |" * (len(names) + 2)]
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        if own:
            cells = ["{:.3f} ± {:.3f}".format(*interval([row[name] for row in own])) for name in names]
            spent = np.mean([row["cpu_seconds"] for row in own])
            lines.append(f"| {arm} | {' | '.join(cells)} | {len(own)} | {spent:.0f} |")
    for row in rows:
        if f"{names[0]} untrained" in row:
            twins = [f"{row[f'{name} untrained']:.3f}" for name in names]
            lines.append(f"| untrained, {row['arm'].partition(',')[0]} | {' | '.join(twins)} | 1 | 0 |")
    return "\n".join(lines)


def main(
    piece: Annotated[
        Piece,
        typer.Argument(help="prepare: dataset. ablate: train and score. table: what was found. train: long training."),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder of the dataset and of the results.")] = Path(
        "data/absent-genes"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps of each model, of 16 cells.")] = 400,
) -> None:
    """Try genes that a cell does not express as targets."""
    results = folder / "ablation.jsonl"
    if piece is Piece.prepare:
        make_dataset(folder, [SHARED / f"{name}.h5ad" for name in CORPUS])
        return
    if piece is Piece.train:
        train(folder)
        return
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    if piece is Piece.ablate:
        # 512 tokens a cell: half the time of the default, and the same for all.
        short = Computing(max_length=512)
        tests = [CellTypes(read_cells(SHARED / f"{n}.h5ad"), label, computing=short) for n, label in TESTS.items()]
        for arm, seed in runs():
            if not any((row["arm"], row["seed"], row["steps"]) == (arm, seed, steps) for row in rows):
                shutil.rmtree(folder / "trial", ignore_errors=True)
                rows.append(train_and_score(folder / "cells", arm, seed, steps, tests, folder / "trial"))
                with results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
