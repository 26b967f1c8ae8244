# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Run fine-tuning: train, resume, score and report every fold of any task."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tahoex1_hf.common.cuda_memory import let_segments_grow
from tahoex1_hf.common.processes import training_processes
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.run_folder import (
    check_data,
    discard_checkpoints,
    open_run,
    read_result,
    write_result,
)
from tahoex1_hf.finetuning.task import TEST, Fold, Outcome, Task
from tahoex1_hf.runs.preemption import PREEMPTED, Preempted
from tahoex1_hf.runs.report import Report
from tahoex1_hf.runs.status import write_status

logger = logging.getLogger(__name__)


def finetune(config: FinetuneConfig) -> int:
    """Fine-tune a model, or resume a run that was interrupted.

    Args:
        config: Configuration of the run. Every process of a launcher calls this with the same.

    Returns:
        0; or 75 where SIGTERM ended the run after a checkpoint, and the same command resumes it.

    Raises:
        FileNotFoundError: For a model or a file that cannot be found.
        ValueError: For settings or data that cannot be used.
    """
    if config.method != "full":
        import peft  # noqa: F401  # what is missing is told before any work
    let_segments_grow()
    processes = training_processes()
    first, folder = processes.is_main_process, Path(config.output_dir)
    open_run(config, first)
    processes.wait_for_everyone()
    if first:
        write_status(folder, "running")
    try:
        task = task_class(config)(config, processes)
        check_data(config, task.cells, processes)
        metrics = run_folds(task)
    except Preempted as stopped:
        if first:
            write_status(folder, "preempted", where=str(stopped))
        return PREEMPTED
    if first:
        write_status(folder, "finished", metrics=metrics)
    return 0


def task_class(config: FinetuneConfig) -> type[Task]:
    """Return the class that does the work of a configuration."""
    if config.task == "gene_classification":
        from tahoex1_hf.finetuning.genes.task import GeneTask

        return GeneTask
    if config.task == "drug_response":
        from tahoex1_hf.finetuning.drugs.task import DrugTask

        return DrugTask
    if config.task == "masked_expression":
        from tahoex1_hf.finetuning.cells.masked_expression import MaskedExpressionTask

        return MaskedExpressionTask
    from tahoex1_hf.finetuning.cells.task import CellTask

    return CellTask


def run_folds(task: Task) -> dict[str, Any]:
    """Train and test every fold, train the model to keep, and write the report.

    Args:
        task: Task with its data. Folds that were done before are read from their folders.

    Returns:
        The metrics for `run_status.json`; none in other processes than the main one.
    """
    folds, outcomes = task.targets(), []
    alone = len(folds) == 1
    for number, fold in enumerate(folds):
        folder = task.folder if alone else task.folder / "folds" / fold.name
        part = "" if fold.part == TEST else f", {fold.part}"
        logger.info("Fold %d of %d%s.", number + 1, len(folds), part)
        outcomes.append(run_fold(task, fold, folder, keep=alone))
    if not alone:
        logger.info("Training the model to keep, on all data.")
        run_fold(task, Fold("all", task.all_rows()), task.folder, keep=True)
    if not task.config.report or not task.processes.is_main_process:
        return {}
    return write_report(task, outcomes)


def run_fold(task: Task, fold: Fold, folder: Path, keep: bool) -> Outcome:
    """Train a model on a fold and test it, or read the outcome where that was done before.

    Args:
        task: Task with its data.
        fold: Fold to train on.
        folder: Folder of the checkpoints and the result.
        keep: Whether to save the model in the folder of the run.
    """
    if (done := read_result(folder, fold.split)) is not None:
        return Outcome(fold, *done)
    model, facts = task.model(fold.split, folder)
    if task.processes.is_main_process:
        arrays = task.predict(model, fold.split, facts)
        if keep:
            task.save(model, facts)
        write_result(folder, fold.split, facts, **arrays)
        discard_checkpoints(folder)  # everything to keep has been saved
    task.processes.wait_for_everyone()
    done = read_result(folder, fold.split)
    if done is None:
        raise FileNotFoundError(f"{folder} has no result: do all processes see the same output_dir?")
    return Outcome(fold, *done)


def write_report(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Score the model and its baselines on every fold, and write the report."""
    predictions = {task.ours: [task.predictions(outcome) for outcome in outcomes], **task.baselines(outcomes)}
    return task.report(outcomes, predictions, score(task, outcomes, predictions))


def score(task: Task, outcomes: Sequence[Outcome], predictions: dict[str, list[Any]]) -> Report:
    """Return the table of scores of several methods.

    Args:
        task: Task with its data.
        outcomes: Outcomes of all folds.
        predictions: Predictions of every method, for each fold.
    """
    report = Report(task.config.task, Path(task.config.data).name)
    for part in dict.fromkeys(outcome.fold.part for outcome in outcomes):
        chosen = [(place, outcome) for place, outcome in enumerate(outcomes) if outcome.fold.part == part]
        numbers = [len(outcome.fold.split.test) for _, outcome in chosen]
        seconds = [outcome.facts.get("seconds") for _, outcome in chosen]
        for method, each in predictions.items():
            metrics = [task.metrics(outcome, each[place]) for place, outcome in chosen]
            own_time = seconds if method == task.ours else None
            report.add(method, metrics, numbers=numbers, seconds=own_time, split=part)
    return report
