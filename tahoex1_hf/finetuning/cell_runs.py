# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs that learn from cells: masked expression, classification, regression; every fold, and the model to keep."""

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed

from tahoex1_hf.encoder import CellEncoder, DtypeName
from tahoex1_hf.finetuning.adapters import is_peft, save_adapter
from tahoex1_hf.finetuning.bases import base_name, load_base, load_tokenizer
from tahoex1_hf.finetuning.batches import TrainingBatches
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.labelled_cells import read_cells
from tahoex1_hf.finetuning.masked_expression import masked_losses
from tahoex1_hf.finetuning.methods import adapt, trainable_parameters
from tahoex1_hf.finetuning.objectives import Objective
from tahoex1_hf.finetuning.probe import fit_probe, in_units, set_head
from tahoex1_hf.finetuning.runs import (
    RESULT,
    computes_in,
    early_stopping,
    has_begun,
    open_run,
    peak_memory_gb,
    say,
    steps_of,
    training_arguments,
)
from tahoex1_hf.finetuning.splits import Split, given_split, make_splits, train_and_validation
from tahoex1_hf.finetuning.trainer import FinetuneTrainer
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining, TahoeX1ForSequenceClassification
from tahoex1_hf.training.checkpoints import write_atomically
from tahoex1_hf.training.monitors import PREEMPTED, Preemption

logger = logging.getLogger(__name__)

ARRAYS = "result.npz"


class Preempted(Exception):
    """SIGTERM ended the run after a checkpoint."""


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
            write_atomically(path, here)

    def splits(self) -> list[Split]:
        """Those of the folds, or the one."""
        cells, config = self.cells, self.config
        if cells.parts is not None:
            split = given_split(cells.parts, cells.groups, config.split or "split")
            if len(split.validation):
                return [split]
            return [
                train_and_validation(
                    split.train, cells.labels, cells.groups, config.validation_fraction, config.seed, test=split.test
                )
            ]
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
        started = time.perf_counter()
        set_seed(self.config.seed)
        model = adapt(self.base(), self.config)
        facts: dict[str, Any] = {
            "trainable_parameters": trainable_parameters(model),
            "training_cells": len(split.train),
        }
        if self.config.method == "linear_probe":
            self._probe(model, split)
        else:
            facts |= self._by_gradients(model, split, folder)
        facts |= {"seconds": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb()}
        return model.eval(), facts

    def _by_gradients(self, model: Any, split: Split, folder: Path) -> dict[str, Any]:
        config, cells = self.config, self.cells
        objective = Objective(config, cells, split.train)
        world = (self.processes.process_index, self.processes.num_processes)
        batches = TrainingBatches(objective.batch, split.train, cells.lengths, config.batch_size, config.seed, world)
        max_steps, eval_steps = steps_of(config, batches.steps_per_epoch)
        preemption = Preemption()
        trainer = FinetuneTrainer(
            model,
            training_arguments(config, folder, max_steps, eval_steps),
            batches,
            objective,
            split.validation,
            callbacks=[preemption, *early_stopping(config)],
        )
        if config.gradient_checkpointing and is_peft(model):
            model.enable_input_require_grads()
        trainer.run()
        if preemption.agreed:
            raise Preempted(f"at step {trainer.state.global_step}")
        if config.task == "regression":
            in_units(head_of(model), objective.mean, objective.scale)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
        return {
            "steps": trainer.state.global_step,
            "best_step": trainer.state.best_global_step,
            "validation_loss": trainer.state.best_metric,
        }

    def _probe(self, model: Any, split: Split) -> None:
        device = self.processes.device
        model.to(device)
        features, _ = self.predict(model, np.arange(len(self.cells)))
        set_head(head_of(model), *fit_probe(features, self.cells, split, self.config))

    @torch.inference_mode()
    def predict(self, model: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cell embeddings as the head sees them, `(rows, width)`, and the head's outputs, `(rows, outputs)`."""
        inner = model.get_base_model() if is_peft(model) else model
        device = self.processes.device
        encoder = CellEncoder(inner, self.tokenizer, device=device, dtype=cast(DtypeName, computes_in(self.config)))
        features = np.empty((len(rows), encoder.width), dtype=np.float32)
        head = getattr(inner, "classifier", None)
        outputs = np.empty((len(rows), inner.config.num_labels if head is not None else 0), dtype=np.float32)
        done = 0
        for part, cells in self.cells.encoded_chunks(rows):
            for chosen, pooled in encoder.pooled_batches(cells):
                features[done + chosen] = pooled.float().cpu().numpy()
                if head is not None:
                    outputs[done + chosen] = head(pooled.float()).float().cpu().numpy()
            done += len(part)
        return features, outputs

    # A fold ---------------------------------------------------------------------------------------

    def outcome(self, split: Split, folder: Path, keep: bool) -> Outcome:
        """Train on a split and test; a fold that was done before is read from its folder.

        Args:
            split: of the cells.
            folder: of the fold.
            keep: whether the model is the one to keep; else its checkpoints are removed.
        """
        done = read_outcome(folder, split)
        if done is not None:
            return done
        model, facts = self.train(split, folder)
        result: Outcome | None = None
        if self.processes.is_main_process:
            nothing = np.zeros((0, 0), dtype=np.float32)
            result = Outcome(split, facts, nothing, nothing, nothing)
            if len(split.test):
                result.after, result.outputs = self.predict(model, split.test)
                base = self.base().to(self.processes.device)
                result.before, _ = self.predict(base, split.test)
                if self.config.task == "masked_expression":
                    facts["test"] = masked_losses(self.config, self.cells, split, base, model)
            if keep:
                save_adapter(model, self.tokenizer, self.folder, self.record(facts))
            write_outcome(folder, result)
            if not keep:
                for path in folder.glob("checkpoint-*"):
                    shutil.rmtree(path)
        self.processes.wait_for_everyone()
        return result or cast(Outcome, read_outcome(folder, split))

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What finetuning.json says."""
        config = self.config
        kept = ("task", "label", "method", "size", "layer", "gene_id_column", "drugs", "group", "seed")
        return {
            **{name: getattr(config, name) for name in kept},
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
    """Arrays first: the JSON file says that all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: getattr(outcome, name) for name in ("outputs", "before", "after")}
    arrays |= outcome.split.parts()
    np.savez(folder / ARRAYS, **arrays)
    write_atomically(folder / RESULT, outcome.facts)


def read_outcome(folder: Path, split: Split) -> Outcome | None:
    """What was written, where it is of this split."""
    if not (folder / RESULT).is_file():
        return None
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        if not all(np.array_equal(arrays[name], rows) for name, rows in split.parts().items()):
            raise ValueError(f"{folder} holds the result of another split: choose another output_dir, or remove it.")
        facts = json.loads((folder / RESULT).read_text(encoding="utf-8"))
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
    processes = PartialState(cpu=not torch.cuda.is_available())
    first = processes.is_main_process
    open_run(config, first)
    processes.wait_for_everyone()
    run = CellRun(config, processes)
    if first:
        say(config, "running")
    try:
        outcomes = []
        for number, split in enumerate(run.splits()):
            folder = run.folder if config.folds == 1 else run.folder / "folds" / str(number)
            logger.info("Fold %d of %d.", number + 1, config.folds) if config.folds > 1 else None
            outcomes.append(run.outcome(split, folder, keep=config.folds == 1))
        if config.folds > 1:
            logger.info("The model to keep, of all cells.")
            run.outcome(run.whole(), run.folder, keep=True)
    except Preempted as stopped:
        if first:
            say(config, "preempted", where=str(stopped))
        return PREEMPTED
    if first:
        metrics = report(run, outcomes) if config.report else {}
        say(config, "finished", metrics=metrics)
    return 0


def report(run: CellRun, outcomes: list[Outcome]) -> dict[str, Any]:
    """Metrics beside baselines, predictions, pictures."""
    return {}
