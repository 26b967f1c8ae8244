# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Train Arc's STATE for a few steps on embeddings and on variable genes, side by side, in its own environment."""

import logging
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.cell_embeddings import Computing, embed_cells
from tahoex1_hf.benchmarking.cells import variable_genes
from tahoex1_hf.benchmarking.overlap import check_not_trained_on
from tahoex1_hf.benchmarking.screens import Screen
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.benchmarking.state import BATCH, LINE, PERTURBATION, TAHOE, VARIABLE, StateSplit, write_handoff
from tahoex1_hf.common.digests import json_digest
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.runs.report import Report, Score, markdown_table

logger = logging.getLogger(__name__)

HEADLINE = "pearson_delta"
_MOST_GENES = 200  # variable genes, so that a short run on a CPU is short
_RESULTS = "*_agg_results.csv"
_IDENTITY = "identity.txt"
# A small model: two layers of width 64 over sets of 32 cells, and a decoder from embeddings to genes.
_MODEL: dict[str, Any] = {
    "cell_set_len": 32,
    "hidden_dim": 64,
    "n_encoder_layers": 1,
    "n_decoder_layers": 1,
    "transformer_backbone_kwargs.intermediate_size": 128,
    "transformer_backbone_kwargs.num_hidden_layers": 2,
    "transformer_backbone_kwargs.num_attention_heads": 4,
    "transformer_backbone_kwargs.num_key_value_heads": 4,
    "transformer_backbone_kwargs.head_dim": 16,
    "gene_decoder_bool": "true",
}


@dataclass(frozen=True)
class StateRun:
    """How STATE is run.

    Attributes:
        python: Python of an environment with arc-state and cell-eval.
        steps: Number of training steps.
        seed: Seed of the training.
    """

    python: Path
    steps: int = 20
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError if there is no such Python."""
        if not os.access(self.python, os.X_OK):
            raise ValueError(
                f"--state-python {self.python} is no program: make an environment with `make evaluate`, which says "
                "where its Python is."
            )

    def train(self, slot: str, control: str, folder: Path) -> list[str]:
        """Return the command that trains on a slot of obsm, as a list of arguments."""
        data = {
            "toml_config_path": folder / "split.toml",
            "embed_key": slot,
            "output_space": "gene",
            "num_workers": 0,
            "pin_memory": "false",
            "batch_col": BATCH,
            "pert_col": PERTURBATION,
            "cell_type_key": LINE,
            "control_pert": _quoted(control),
        }
        training = {
            "max_steps": self.steps,
            "val_freq": self.steps,
            "ckpt_every_n_steps": self.steps,
            "batch_size": 4,
            "train_seed": self.seed,
            "wandb_track": "false",
        }
        options = {f"data.kwargs.{name}": value for name, value in data.items()}
        options |= {f"training.{name}": value for name, value in training.items()}
        options |= {"model": "state_sm"} | {f"model.kwargs.{name}": value for name, value in _MODEL.items()}
        options |= {
            "+model.kwargs.decoder_hidden_dims": "[128]",
            "use_wandb": "false",
            "output_dir": folder,
            "name": slot,
            "overwrite": "true",
        }
        return [
            str(self.python),
            "-m",
            "state",
            "tx",
            "train",
            *(f"{name}={value}" for name, value in options.items()),
        ]

    def predict(self, slot: str, folder: Path) -> list[str]:
        """Return the command that predicts the held-out cells and scores them by cell-eval."""
        command = [str(self.python), "-m", "state", "tx", "predict", "--output-dir", str(folder / slot)]
        return [*command, "--checkpoint", "last.ckpt", "--profile", "minimal"]


def _quoted(value: str) -> str:
    """Return a value as a quoted string of Hydra's, in which nothing has a meaning but the quotation mark."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def evaluate_state(
    screen: Screen, source: Source, split: StateSplit, how: StateRun, computing: Computing, folder: Path
) -> str:
    """Train STATE on the embeddings of a source and on variable genes, and report cell-eval's metrics for both.

    The same command does not repeat what is done.

    Args:
        screen: Cells, lines and perturbations.
        source: Source of the embeddings of cells.
        split: What is held out.
        how: How STATE is run.
        computing: How a model is run.
        folder: Folder of the run.

    Returns:
        The table as text.

    Raises:
        ValueError: If there is no such Python, the model was trained on the cells, or STATE fails: the message has its
            last lines.
    """
    how.check()
    notes = []
    if source.kind == "model" and (note := check_not_trained_on(source, screen.cells)):
        notes.append(note)
    slot = TAHOE if source.kind == "model" else f"X_{source.kind}"
    settings = {
        "cells": screen.cells.fingerprint(),
        "source": [source.kind, source.what, source.key, source.fingerprint()],
        "zero_shot": split.zero_shot,
        "few_shot": split.few_shot,
        "steps": how.steps,
        "seed": how.seed,
    }
    identity = json_digest(settings)
    variable = _most_variable(screen)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _IDENTITY).is_file() or (folder / _IDENTITY).read_text(encoding="utf-8") != identity:
        (folder / _IDENTITY).unlink(missing_ok=True)
        embeddings = embed_cells(source, screen.cells, 0, computing)
        embeddings = embeddings.toarray() if hasattr(embeddings, "toarray") else embeddings
        write_handoff(screen, slot, embeddings, variable, split, folder)
        for each in (slot, VARIABLE):
            for path in (folder / each).glob(f"eval_*/{_RESULTS}"):
                path.unlink()
        with WholeFile(folder / _IDENTITY) as partial:
            partial.write_text(identity, encoding="utf-8")
    report, costs = Report("state", screen.cells.name), {}
    with progress_bar(None, total=2, unit="run", desc="state") as bar:
        for name, each in ((source.name, slot), (f"{len(variable)} variable genes", VARIABLE)):
            started, cpu_started = time.perf_counter(), _cpu_seconds_of_programs()
            if not list((folder / each).glob(f"eval_*/{_RESULTS}")):
                _call(how.train(each, screen.control, folder), folder / f"{each}.train.log")
                _call(how.predict(each, folder), folder / f"{each}.predict.log")
            costs[name] = (time.perf_counter() - started, _cpu_seconds_of_programs() - cpu_started)
            report.scores += read_scores(report, name, folder / each)
            bar.update()
    return _write(report, settings, notes, costs, folder)


def _cpu_seconds_of_programs() -> float:
    """Return the CPU time of the programs that this process has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _most_variable(screen: Screen) -> np.ndarray:
    """Return the columns of the genes that vary most among the variable genes."""
    columns = variable_genes(screen.cells.values)
    values = screen.cells.values[:, columns]
    means = np.asarray(values.mean(axis=0)).ravel()
    variances = np.asarray(values.multiply(values).mean(axis=0)).ravel() - means**2
    return np.sort(columns[np.argsort(-variances, kind="stable")[:_MOST_GENES]])


def _call(command: Sequence[str], log: Path) -> None:
    """Run a command without a shell, its output in a file."""
    logger.info("Running %s", " ".join(command))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "HYDRA_FULL_ERROR": "1"}
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=file, cwd=log.parent, env=environment, check=False)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise ValueError("STATE failed, as said in " + "\n".join([f"{log}:", *last]))


def read_scores(report: Report, method: str, folder: Path) -> list[Score]:
    """Return cell-eval's metrics of each line, as it wrote them: the mean over perturbations, and their number."""
    import pandas as pd

    rows: list[Score] = []
    for path in sorted(folder.glob(f"eval_*/{_RESULTS}")):
        table = pd.read_csv(path).set_index("statistic")
        line = path.name.removesuffix(_RESULTS.removeprefix("*"))
        for metric in table.columns:
            value, number = table.loc["mean", metric], table.loc["count", metric]
            if np.isfinite(value):
                rows.append(
                    Score(report.task, report.dataset, line, None, method, metric, float(value), n=int(number))
                )
    if not rows:
        raise ValueError(f"{folder}: STATE wrote no scores.")
    return rows


def _write(
    report: Report,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    costs: Mapping[str, tuple[float, float]],
    folder: Path,
) -> str:
    lines = list(dict.fromkeys(score.split for score in report.scores))
    methods = list(costs)
    parts = []
    for line in lines:
        of_line = [score for score in report.scores if score.split == line]
        found = {(score.metric, score.method): score.value for score in of_line}
        metrics = dict.fromkeys(score.metric for score in of_line)
        rows = [
            [metric, *(f"{found[metric, m]:.4f}" if (metric, m) in found else "-" for m in methods)]
            for metric in metrics
        ]
        parts.append(markdown_table([line, *methods], rows))
    claim = (
        f"After {settings['steps']} steps of a small model these figures show that the hand-off works, and nothing "
        "about the embeddings: STATE is trained for tens of thousands."
    )
    spent = "; ".join(f"{name}: {time:.0f} s ({cpu:.0f} s of CPU time)" for name, (time, cpu) in costs.items())
    text = "\n\n".join([f"# state: {report.dataset}", *notes, claim, *parts, f"Time: {spent}."]) + "\n"
    report.write(folder, {"task": "state", "settings": dict(settings), **_by_kind(costs)}, text, HEADLINE)
    return text


def _by_kind(costs: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {
        "seconds": {name: time for name, (time, _) in costs.items()},
        "cpu_seconds": {name: cpu for name, (_, cpu) in costs.items()},
    }
