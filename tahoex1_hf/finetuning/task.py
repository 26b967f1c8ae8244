# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The protocol of a fine-tuning task, which `run_folds` trains, resumes, scores and reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import PartialState

from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.splits import Split
from tahoex1_hf.runs.report import Report

TEST = "test"


def model_title(config: FinetuneConfig) -> str:
    """Return the name of the trained model in tables."""
    return f"Tahoe-x1, {config.method}"


@dataclass(frozen=True, eq=False)
class Fold:
    """One of the splits that models are trained and tested on.

    Attributes:
        name: Name of its folder below `folds/`, where there are several.
        split: Row numbers to train, validate and test on.
        part: Name of its test rows in the report; folds with the same name are averaged.
    """

    name: str
    split: Split
    part: str = TEST


@dataclass(eq=False)
class Outcome:
    """The results that are kept of a trained fold.

    Attributes:
        fold: The fold.
        arrays: Arrays by name, from `Task.predict`.
        facts: Steps, seconds, peak memory, trainable parameters and the like.
    """

    fold: Fold
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


class Task(Protocol):
    """A kind of fine-tuning.

    Its rows, which are split into train, validation and test, are cells, genes or conditions.

    Predictions are whatever `metrics` takes: probabilities, numbers, changes of genes.

    Attributes:
        config: Configuration of the run.
        folder: Folder of the run.
        processes: Processes of the launcher.
        cells: Cells of the data file.
        ours: Name of the trained model in tables.
    """

    config: Any
    folder: Path
    processes: PartialState
    cells: FinetuningData
    ours: str

    def __init__(self, config: Any, processes: PartialState):
        """Open the data of a run."""
        ...

    def targets(self) -> list[Fold]:
        """Return the folds; each names rows that are predicted by a model that was not trained on them."""
        ...

    def all_rows(self) -> Split:
        """Return the split of the model to keep after several folds, which leaves no rows for testing."""
        ...

    def model(self, split: Split, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Train a model, or resume its training from the checkpoints in a folder.

        Args:
            split: Rows to train and validate on.
            folder: Folder of the checkpoints.

        Returns:
            The model in eval mode, and the facts for the report.
        """
        ...

    def predict(self, model: Any, split: Split, facts: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the arrays to keep for the test rows; other results go into `facts`."""
        ...

    def save(self, model: Any, facts: dict[str, Any]) -> None:
        """Write the adapter, or the whole model, into the folder of the run."""
        ...

    def predictions(self, outcome: Outcome) -> Any:
        """Return the model's predictions for the test rows of a fold."""
        ...

    def baselines(self, outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
        """Return the predictions of each baseline for the test rows of each fold."""
        ...

    def metrics(self, outcome: Outcome, predictions: Any) -> Mapping[str, float | list[float]]:
        """Return the metrics of predictions for the test rows of a fold.

        A metric is a number, or a list with one for each unit that is independent of the others.
        """
        ...

    def report(self, outcomes: Sequence[Outcome], predictions: dict[str, list[Any]], scores: Report) -> dict[str, Any]:
        """Write the report into the folder of the run, and the results into the adapter's card.

        Args:
            outcomes: Outcomes of all folds.
            predictions: Predictions of the model and of every baseline, for each fold.
            scores: Their scores.

        Returns:
            Content of `metrics` in `run_status.json`.
        """
        ...
