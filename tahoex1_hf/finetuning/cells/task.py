# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Classification and regression of cells."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState

from tahoex1_hf.finetuning.adapters import add_results, save_adapter
from tahoex1_hf.finetuning.bases import base_name, load_base, load_tokenizer
from tahoex1_hf.finetuning.cells.baselines import classification_baselines, regression_baselines
from tahoex1_hf.finetuning.cells.labelled import read_cells
from tahoex1_hf.finetuning.cells.report import CellResults, write_cell_report
from tahoex1_hf.finetuning.config import ClassificationConfig, FinetuneConfig, MaskedExpressionConfig, RegressionConfig
from tahoex1_hf.finetuning.fitting import computes_in, fit
from tahoex1_hf.finetuning.methods import adapt, trainable_parameters, trained_head
from tahoex1_hf.finetuning.metrics import classification_metrics, regression_metrics
from tahoex1_hf.finetuning.objectives import Objective
from tahoex1_hf.finetuning.probe import fit_probe, predict_in_own_units, set_head, some_of_each
from tahoex1_hf.finetuning.splits import Split, check_duplicates, given_split, make_splits, train_and_validation
from tahoex1_hf.finetuning.task import Fold, Outcome, model_title
from tahoex1_hf.hub.adapters import is_peft
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForSequenceClassification
from tahoex1_hf.runs.checkpoints import last_whole
from tahoex1_hf.runs.memory import peak_memory_gb
from tahoex1_hf.runs.report import Report

logger = logging.getLogger(__name__)

COSTS = ("seconds", "peak_memory_gb")  # facts about a training that do not belong to its model


class CellTask:
    """Classification or regression of cells, see `Task`.

    Args:
        config: Configuration of the run.
        processes: Processes of the launcher.
    """

    def __init__(
        self, config: ClassificationConfig | RegressionConfig | MaskedExpressionConfig, processes: PartialState
    ):
        self.config: Any = config
        self.processes = processes
        self.folder = Path(config.output_dir)
        self.tokenizer = load_tokenizer(config)
        self.cells = read_cells(config, self.tokenizer, self.folder)
        self.ours = model_title(config)

    # Splits -----------------------------------------------------------------------------------------

    def targets(self) -> list[Fold]:
        """Return the folds.

        Raises:
            ValueError: For too few cells or groups, and for leakage.
        """
        cells = self.cells
        splits = [self._given_split()] if cells.parts is not None else self._random_splits()
        contents, genes = cells.contents(), np.diff(cells.stored.offsets)[cells.numbers]
        for split in splits:
            check_duplicates(split, contents, genes)
            self._warn_of_unseen_classes(split)
        return [Fold(str(number), split) for number, split in enumerate(splits)]

    def _warn_of_unseen_classes(self, split: Split) -> None:
        if self.cells.classes is None or self.cells.labels is None:
            return
        labels = self.cells.labels
        unseen = [self.cells.classes[i] for i in np.setdiff1d(labels[split.test], labels[split.train])]
        if unseen:
            logger.warning(
                "%d classes are tested but not trained on, since all their cells are in groups of the test: %s.",
                len(unseen),
                ", ".join(unseen),
            )

    def _given_split(self) -> Split:
        cells, config = self.cells, self.config
        split = given_split(cast(np.ndarray, cells.parts), cells.groups, config.split or "split")
        if len(split.validation):
            return split
        fraction = config.validation_fraction
        return train_and_validation(split.train, cells.labels, cells.groups, fraction, config.seed, test=split.test)

    def _random_splits(self) -> list[Split]:
        cells, config = self.cells, self.config
        return make_splits(
            cells.labels,
            cells.groups,
            num_rows=len(cells),
            folds=config.folds,
            test_fraction=config.test_fraction,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
        )

    def all_rows(self) -> Split:
        """Return all cells to train on, except those that early stopping evaluates on."""
        cells, config = self.cells, self.config
        rows = np.arange(len(cells))
        return train_and_validation(rows, cells.labels, cells.groups, config.validation_fraction, config.seed)

    # Models -----------------------------------------------------------------------------------------

    def model_options(self) -> dict[str, Any]:
        """Return the options of `TahoeX1Config` for the head."""
        if self.cells.classes is None:
            return {"num_labels": 1, "problem_type": "regression"}
        classes = self.cells.classes
        return {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            "problem_type": "single_label_classification",
        }

    def base(self) -> Any:
        """Load the base with the head of the task."""
        return load_base(self.config, TahoeX1ForSequenceClassification, **self.model_options())

    def model(self, split: Split, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Train a model, or resume its training; return the model with the best weights, and its costs."""
        if self.config.method == "linear_probe":
            return self._fit_probe(split)
        objective = Objective(self.config, self.cells, split.train)
        start = self.base
        # A checkpoint to resume from has the head.
        if self.config.starts_from_probe and last_whole(folder) is None:
            start = functools.partial(self._base_with_fitted_head, split, objective)
        model, facts = fit(start, objective, split.train, split.validation, folder, self.processes)
        if isinstance(self.config, RegressionConfig):
            predict_in_own_units(trained_head(model), objective.mean, objective.scale)
        return model, {**facts, "training_cells": len(split.train), "processes": self.processes.num_processes}

    def _base_with_fitted_head(self, split: Split, objective: Objective) -> Any:
        """Load the base with a linear probe of some of the training cells as its head, in the unit of the loss."""
        model = self.base().to(self.processes.device)
        some = Split(some_of_each(split.train, self.cells, self.config.seed), split.validation, split.test[:0])
        rows = np.concatenate([some.train, some.validation])
        features = np.zeros((len(self.cells), model.config.hidden_size), dtype=np.float32)
        features[rows], _ = self.embed(model, rows)
        weights, bias = fit_probe(features, self.cells, some, self.config)
        set_head(model.classifier, weights / objective.scale, (bias - objective.mean) / objective.scale)
        return model

    def _fit_probe(self, split: Split) -> tuple[Any, dict[str, Any]]:
        started = time.perf_counter()
        model: Any = adapt(self.base(), self.config).to(self.processes.device)
        facts = {"trainable_parameters": trainable_parameters(model), "training_cells": len(split.train)}
        features, _ = self.embed(model, np.arange(len(self.cells)))
        set_head(trained_head(model), *fit_probe(features, self.cells, split, self.config))
        return model.eval(), {**facts, "seconds": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb()}

    def embed(self, model: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return cell embeddings as the head sees them, `(rows, width)`, and the head's outputs, `(rows, outputs)`."""
        inner = without_peft(model)
        device = self.processes.device
        # Inference mode would move the weights, which could then not be trained any more.
        encoder = CellEncoder(inner, self.tokenizer, device=device, dtype=computes_in(self.config))
        features = np.empty((len(rows), encoder.width), dtype=np.float32)
        head = getattr(inner, "classifier", None)
        outputs = np.empty((len(rows), inner.config.num_labels if head is not None else 0), dtype=np.float32)
        done = 0
        for part, cells in self.cells.encoded_chunks(rows):
            for chosen, pooled in encoder.pooled_batches(cells):
                features[done + chosen] = pooled.float().cpu().numpy()
                if head is not None:
                    with torch.inference_mode():
                        outputs[done + chosen] = head(pooled.float()).float().cpu().numpy()
            done += len(part)
        return features, outputs

    def predict(self, model: Any, split: Split, facts: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the head's outputs for the test cells, and their embeddings before and after the training."""
        nothing = np.zeros((0, 0), dtype=np.float32)
        if not len(split.test):
            return {"outputs": nothing, "before": nothing, "after": nothing}
        after, outputs = self.embed(model, split.test)
        with self.base_of(model) as base:
            before, _ = self.embed(base, split.test)
        return {"outputs": outputs, "before": before, "after": after}

    @contextlib.contextmanager
    def base_of(self, model: Any) -> Iterator[Any]:
        """Yield the base, which is not loaded a second time where it lies below adapters."""
        if is_peft(model):
            with model.disable_adapter():
                yield model
        else:
            yield self.base().to(self.processes.device)

    def save(self, model: Any, facts: dict[str, Any]) -> None:
        """Write the adapter, or the whole model, into the folder of the run."""
        save_adapter(model, self.tokenizer, self.folder, self.record(facts))

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the content of `finetuning.json`."""
        kept = (
            "task",
            "label",
            "method",
            "size",
            "layer",
            "gene_id_column",
            "drugs",
            "unknown_drugs",
            "group",
            "seed",
        )
        return {
            **settings_of(self.config, kept),
            "model": base_name(self.config),
            "context_length": self.tokenizer.context_length,
            "classes": self.cells.classes,
            "model_options": self.model_options(),
            **{name: value for name, value in facts.items() if name not in (*COSTS, "test")},
        }

    # Scores -----------------------------------------------------------------------------------------

    def predictions(self, outcome: Outcome) -> Any:
        """Return the probabilities `(test cells, classes)`, or the numbers `(test cells,)`."""
        outputs = outcome.arrays["outputs"]
        if self.cells.classes is None:
            return outputs[:, 0]
        return torch.from_numpy(outputs).softmax(1).numpy()

    def baselines(self, outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
        """Return the predictions of classical models of the counts."""
        splits, counts, seed = [outcome.fold.split for outcome in outcomes], self.cells.csr(), self.config.seed
        labels = cast(np.ndarray, self.cells.labels)
        if self.cells.classes is None:
            return regression_baselines(counts, labels, splits, seed)
        return classification_baselines(counts, labels, splits, seed, len(self.cells.classes))

    def metrics(self, outcome: Outcome, predictions: Any) -> dict[str, float]:
        """Return the metrics of predictions for the test cells of a fold."""
        truth = cast(np.ndarray, self.cells.labels)[outcome.fold.split.test]
        if self.cells.classes is None:
            return regression_metrics(truth, predictions)
        return classification_metrics(truth, predictions.argmax(1), predictions)

    def report(self, outcomes: Sequence[Outcome], predictions: dict[str, list[Any]], scores: Report) -> dict[str, Any]:
        """Write the report; return the mean metrics of the model."""
        results = CellResults(
            label=self.config.label,
            method=self.config.method,
            classes=self.cells.classes,
            labels=cast(np.ndarray, self.cells.labels),
            names=self.cells.names,
            splits=[outcome.fold.split for outcome in outcomes],
            predictions=predictions[self.ours],
            before=[outcome.arrays["before"] for outcome in outcomes],
            after=[outcome.arrays["after"] for outcome in outcomes],
            cost=[outcome.facts for outcome in outcomes],
            seed=self.config.seed,
        )
        written = write_cell_report(self.folder, results, scores, self.ours)
        means = scores.card_rows(self.ours)
        add_results(self.folder, means, written["comparison"]["text"])
        return means


def settings_of(config: FinetuneConfig, names: Sequence[str]) -> dict[str, Any]:
    """Return some settings by name; None for those that the task does not have."""
    return {name: getattr(config, name, None) for name in names}
