# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs that learn from cells: masked expression, classification, regression; every fold, and the model to keep."""

import contextlib
import functools
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState

from tahoex1_hf.common.files import write_json
from tahoex1_hf.finetuning.adapters import add_results, save_adapter
from tahoex1_hf.finetuning.bases import base_name, load_base, load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import read_cells
from tahoex1_hf.finetuning.cells.masked_expression import constant_errors, model_errors, write_masked_report
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.fitting import drop_checkpoints, fit, read_result, run_task, write_result
from tahoex1_hf.finetuning.methods import adapt, trainable_parameters
from tahoex1_hf.finetuning.objectives import Objective
from tahoex1_hf.finetuning.probe import fit_probe, in_units, set_head, some_of_each
from tahoex1_hf.finetuning.runs import (
    computes_in,
    has_begun,
)
from tahoex1_hf.finetuning.splits import Split, check_duplicates, given_split, make_splits, train_and_validation
from tahoex1_hf.hub.adapters import is_peft
from tahoex1_hf.inference.encoder import CellEncoder, DtypeName
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining, TahoeX1ForSequenceClassification
from tahoex1_hf.runs.checkpoints import last_whole
from tahoex1_hf.runs.memory import peak_memory_gb

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Outcome:
    """What one split came to.

    Attributes:
        split: of the cells.
        facts: steps, seconds, peak memory, trainable parameters; losses for masked expression.
        outputs: `(test cells, outputs)` logits, or numbers; empty for masked expression.
        before: `(test cells, width)` embeddings of the base.
        after: the same, of the trained model.
    """

    split: Split
    facts: dict[str, Any]
    outputs: np.ndarray
    before: np.ndarray
    after: np.ndarray


class CellRun:
    """A run: its cells, and how a model is made of a split.

    Args:
        config: of the run.
        processes: of the launcher.
    """

    def __init__(self, config: FinetuneConfig, processes: PartialState):
        self.config, self.processes = config, processes
        self.folder = Path(config.output_dir)
        self.tokenizer = load_tokenizer(config)
        self.cells = read_cells(config, self.tokenizer, self.folder)
        self._check_data()

    def _check_data(self) -> None:
        """The folder's checkpoints must be of these cells."""
        path = self.folder / "data.json"
        here = {"fingerprint": self.cells.fingerprint, "cells": len(self.cells)}
        begun = path.is_file() and has_begun(self.folder)
        if begun and json.loads(path.read_text(encoding="utf-8")) != here:
            raise ValueError(
                f"data={self.config.data} has changed since the run in {self.folder} began: choose another folder."
            )
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            write_json(path, here)

    def splits(self) -> list[Split]:
        """Those of the folds, or the one.

        Raises:
            ValueError: for too few cells or groups, and for leakage.
        """
        cells = self.cells
        splits = [self._given_split()] if cells.parts is not None else self._drawn_splits()
        contents, genes = cells.contents(), np.diff(cells.stored.offsets)[cells.numbers]
        for split in splits:
            check_duplicates(split, contents, genes)
            self._warn_of_unseen_classes(split)
        return splits

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

    def _drawn_splits(self) -> list[Split]:
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

    def whole(self) -> Split:
        """All cells to train on, but for those that early stopping looks at."""
        cells, config = self.cells, self.config
        rows = np.arange(len(cells))
        return train_and_validation(rows, cells.labels, cells.groups, config.validation_fraction, config.seed)

    # A model --------------------------------------------------------------------------------------

    def model_options(self) -> dict[str, Any]:
        """Of the head."""
        if self.cells.classes is None:
            return {"num_labels": 1, "problem_type": "regression"} if self.config.task == "regression" else {}
        classes = self.cells.classes
        return {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            "problem_type": "single_label_classification",
        }

    def base(self) -> Any:
        """The base with the head of the task."""
        kind = TahoeX1ForPreTraining if self.config.task == "masked_expression" else TahoeX1ForSequenceClassification
        return load_base(self.config, kind, **self.model_options())

    def train(self, split: Split, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Make a model of a split.

        Args:
            split: of the cells.
            folder: for checkpoints; the same call goes on from them.

        Returns:
            The model with the best weights, and what it cost.
        """
        if self.config.method == "linear_probe":
            return self._probe(split)
        objective = Objective(self.config, self.cells, split.train)
        start = self.base
        # With a checkpoint to go on from, the head is read from there.
        if self.config.starts_from_probe and last_whole(folder) is None:
            start = functools.partial(self._base_with_fitted_head, split, objective)
        model, facts = fit(start, objective, split.train, split.validation, folder, self.processes)
        if self.config.task == "regression":
            in_units(head_of(model), objective.mean, objective.scale)
        return model, {**facts, "training_cells": len(split.train), "processes": self.processes.num_processes}

    def _base_with_fitted_head(self, split: Split, objective: Objective) -> Any:
        """The base, its head a linear probe of some of the training cells, in the unit of the loss."""
        model = self.base().to(self.processes.device)
        some = Split(some_of_each(split.train, self.cells, self.config.seed), split.validation, split.test[:0])
        rows = np.concatenate([some.train, some.validation])
        features = np.zeros((len(self.cells), model.config.hidden_size), dtype=np.float32)
        features[rows], _ = self.predict(model, rows)
        weights, bias = fit_probe(features, self.cells, some, self.config)
        set_head(model.classifier, weights / objective.scale, (bias - objective.mean) / objective.scale)
        return model

    def _probe(self, split: Split) -> tuple[Any, dict[str, Any]]:
        started = time.perf_counter()
        model: Any = adapt(self.base(), self.config).to(self.processes.device)
        facts = {"trainable_parameters": trainable_parameters(model), "training_cells": len(split.train)}
        features, _ = self.predict(model, np.arange(len(self.cells)))
        set_head(head_of(model), *fit_probe(features, self.cells, split, self.config))
        return model.eval(), {**facts, "seconds": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb()}

    def predict(self, model: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cell embeddings as the head sees them, `(rows, width)`, and the head's outputs, `(rows, outputs)`."""
        inner = model.get_base_model() if is_peft(model) else model
        device = self.processes.device
        # Not in inference mode: it moves the weights, which would then not be trained any more.
        encoder = CellEncoder(inner, self.tokenizer, device=device, dtype=cast(DtypeName, computes_in(self.config)))
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

    # A fold ---------------------------------------------------------------------------------------

    def outcome(self, split: Split, folder: Path, keep: bool) -> Outcome:
        """Train on a split and test; a fold that was done before is read from its folder.

        Args:
            split: of the cells.
            folder: of the fold.
            keep: whether the model is the one to keep.
        """
        done = read_outcome(folder, split)
        if done is not None:
            return done
        model, facts = self.train(split, folder)
        result: Outcome | None = None
        if self.processes.is_main_process:
            result = self._tested(model, split, facts)
            if keep:
                save_adapter(model, self.tokenizer, self.folder, self.record(facts))
            write_outcome(folder, result)
            drop_checkpoints(folder)  # all that is to be kept of them is saved
        self.processes.wait_for_everyone()
        return result or cast(Outcome, read_outcome(folder, split))

    def _tested(self, model: Any, split: Split, facts: dict[str, Any]) -> Outcome:
        """What the model, and the base, make of the test cells."""
        nothing = np.zeros((0, 0), dtype=np.float32)
        result = Outcome(split, facts, nothing, nothing, nothing)
        if not len(split.test):
            return result
        masked, errors = self.config.task == "masked_expression", (self.config, self.cells, split)
        result.after, result.outputs = self.predict(model, split.test)
        test: dict[str, float] = {}
        if masked:
            test["model"], test["model_expression"] = model_errors(*errors, model)
            test["mean"], test["gene_mean"] = constant_errors(*errors, model.config)
            facts["test"] = test
        with self._base_of(model) as base:
            result.before, _ = self.predict(base, split.test)
            if masked:
                test["base"], test["base_expression"] = model_errors(*errors, base)
        return result

    @contextlib.contextmanager
    def _base_of(self, model: Any) -> Iterator[Any]:
        """The base, as it is below the adapters: it is not loaded a second time."""
        if is_peft(model):
            with model.disable_adapter():
                yield model
        else:
            yield self.base().to(self.processes.device)

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What finetuning.json says."""
        config = self.config
        kept = ("task", "label", "method", "size", "layer", "gene_id_column", "drugs", "group", "seed")
        return {
            **{name: getattr(config, name, None) for name in kept},
            "model": base_name(config),
            "context_length": self.tokenizer.context_length,
            "classes": self.cells.classes,
            "model_options": self.model_options(),
            **{name: value for name, value in facts.items() if name not in ("seconds", "peak_memory_gb", "test")},
        }


def head_of(model: Any) -> torch.nn.Linear:
    """The linear layer on the cell embedding that is trained."""
    head = model.get_base_model().classifier.modules_to_save["default"] if is_peft(model) else model.classifier
    return cast(torch.nn.Linear, head)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Keep it for the report, and for the same command given again."""
    arrays = {name: getattr(outcome, name) for name in ("outputs", "before", "after")}
    write_result(folder, outcome.split, outcome.facts, **arrays)


def read_outcome(folder: Path, split: Split) -> Outcome | None:
    """What was written, where it is of this split."""
    done = read_result(folder, split)
    if done is None:
        return None
    arrays, facts = done
    return Outcome(split, facts, arrays["outputs"], arrays["before"], arrays["after"])


def finetune_cells(config: FinetuneConfig) -> int:
    """Run, or go on with a run, to its end.

    Args:
        config: of the run. Every process of a launcher calls this with the same.

    Returns:
        0; or 75 where SIGTERM ended it after a checkpoint: give the same command again.

    Raises:
        ValueError: for settings or data that do not fit.
    """
    return run_task(config, lambda processes: _learn(CellRun(config, processes)))


def _learn(run: CellRun) -> dict[str, Any]:
    """All folds, the model to keep, and the report; returns its metrics."""
    config, outcomes = run.config, []
    for number, split in enumerate(run.splits()):
        folder = run.folder if config.folds == 1 else run.folder / "folds" / str(number)
        if config.folds > 1:
            logger.info("Fold %d of %d.", number + 1, config.folds)
        outcomes.append(run.outcome(split, folder, keep=config.folds == 1))
    if config.folds > 1:
        logger.info("The model to keep, of all cells.")
        run.outcome(run.whole(), run.folder, keep=True)
    return report(run, outcomes) if config.report and run.processes.is_main_process else {}


def report(run: CellRun, outcomes: list[Outcome]) -> dict[str, Any]:
    """Write metrics beside those of baselines, predictions and pictures; returns the metrics."""
    cells, config = run.cells, run.config
    if config.task == "masked_expression":
        means, verdict = write_masked_report(run.folder, [outcome.facts["test"] for outcome in outcomes])
        add_results(run.folder, means, verdict)
        return means
    from tahoex1_hf.finetuning.report import write_report

    outputs = [torch.from_numpy(outcome.outputs) for outcome in outcomes]
    classes = cells.classes is not None
    written = write_report(
        run.folder,
        label=cast(str, config.label),
        method=config.method,
        classes=cells.classes,
        labels=cast(np.ndarray, cells.labels),
        names=cells.names,
        counts=cells.csr(),
        splits=[outcome.split for outcome in outcomes],
        predictions=[(each.softmax(1) if classes else each[:, 0]).numpy() for each in outputs],
        before=[outcome.before for outcome in outcomes],
        after=[outcome.after for outcome in outcomes],
        cost=[outcome.facts for outcome in outcomes],
        seed=config.seed,
    )
    means = {name: float(each["mean"]) for name, each in written["metrics"]["model"].items()}
    add_results(run.folder, means, written["comparison"]["text"])
    return means
