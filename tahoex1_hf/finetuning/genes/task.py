# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Classification of genes from the cells that express them: essentiality, membership of a pathway.

Every labelled gene of a cell is an example: the head reads its token, which has seen the rest of the cell. Genes are
split, not cells: no gene (and no group of genes, such as a protein family) is trained and tested on. In each epoch a
gene weighs the same, however many cells express it, times the weight of its class.

The prediction for a gene is the mean of its logits over all cells that express it. Cells longer than the context are
cut into parts, so that every expressed gene is seen. A gene that no cell expresses has no prediction: such genes are
left out and counted, in the log and in the report.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from scipy.special import softmax

from tahoex1_hf.finetuning.adapters import save_adapter
from tahoex1_hf.finetuning.bases import base_name, load_base, load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import FinetuningData, read_cells
from tahoex1_hf.finetuning.cells.task import COSTS, settings_of
from tahoex1_hf.finetuning.config import GeneClassificationConfig
from tahoex1_hf.finetuning.fitting import computes_in, fit
from tahoex1_hf.finetuning.genes.baselines import expression_features, gene_baselines
from tahoex1_hf.finetuning.genes.objective import GeneObjective
from tahoex1_hf.finetuning.genes.predicting import cell_chunks, mean_embeddings, predict_genes
from tahoex1_hf.finetuning.genes.report import gene_metrics, sought_class, write_gene_report
from tahoex1_hf.finetuning.genes.table import read_gene_table
from tahoex1_hf.finetuning.methods import adapt, trainable_parameters, trained_head
from tahoex1_hf.finetuning.probe import fit_probe, set_head
from tahoex1_hf.finetuning.splits import Split, given_split, make_splits, train_and_validation
from tahoex1_hf.finetuning.task import Fold, Outcome, model_title
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForTokenClassification
from tahoex1_hf.runs.checkpoints import last_whole
from tahoex1_hf.runs.memory import peak_memory_gb
from tahoex1_hf.runs.report import Report

_VALIDATION_CELLS = 1000  # most cells in which the validation genes are evaluated while training


class GeneTask:
    """Classification of genes, see `Task`.

    Args:
        config: Configuration of the run.
        processes: Processes of the launcher.
    """

    def __init__(self, config: GeneClassificationConfig, processes: PartialState):
        self.config, self.processes = config, processes
        self.folder = Path(config.output_dir)
        self.tokenizer = load_tokenizer(config)
        self.cells = read_cells(config, self.tokenizer, self.folder)
        expressing = np.zeros(len(self.tokenizer), dtype=np.int64)
        np.add.at(expressing, self.cells.stored.tokens, 1)
        self.genes = read_gene_table(config, self.tokenizer, expressing)
        self.ours = model_title(config)

    # Splits -----------------------------------------------------------------------------------------

    def targets(self) -> list[Fold]:
        """Return the folds, whose rows are genes."""
        return [Fold(str(number), split) for number, split in enumerate(self._splits())]

    def _splits(self) -> list[Split]:
        genes, config = self.genes, self.config
        if genes.parts is None:
            return make_splits(
                genes.labels,
                genes.groups,
                folds=config.folds,
                test_fraction=config.test_fraction,
                validation_fraction=config.validation_fraction,
                seed=config.seed,
            )
        split = given_split(genes.parts, genes.groups, config.split or "split")
        if not len(split.validation):
            split = train_and_validation(
                split.train, genes.labels, genes.groups, config.validation_fraction, config.seed, test=split.test
            )
        return [split]

    def all_rows(self) -> Split:
        """Return all genes to train on, except those that early stopping evaluates on."""
        genes, config = self.genes, self.config
        every = np.arange(len(genes))
        return train_and_validation(every, genes.labels, genes.groups, config.validation_fraction, config.seed)

    # Models -----------------------------------------------------------------------------------------

    def model_options(self) -> dict[str, Any]:
        """Return the options of `TahoeX1Config` for the head."""
        classes = self.genes.classes
        return {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
        }

    def base(self) -> TahoeX1ForTokenClassification:
        """Load the base with the head."""
        return load_base(self.config, TahoeX1ForTokenClassification, **self.model_options())

    def model(self, split: Split, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Train a model, or resume its training; return the model with the best weights, and its costs."""
        config = self.config
        if config.method == "linear_probe":
            return self._fit_probe(split)
        cells = np.arange(len(self.cells))
        evaluated = cells
        if len(cells) > _VALIDATION_CELLS:
            chosen = np.random.default_rng(config.seed).choice(len(cells), _VALIDATION_CELLS, replace=False)
            evaluated = np.sort(chosen)

        def start() -> TahoeX1ForTokenClassification:
            model = self.base()
            # A checkpoint to resume from has the head.
            if config.starts_from_probe and last_whole(folder) is None:
                set_head(model.classifier, *self.fitted_head(split))
            return model

        objective = GeneObjective(config, self.cells, self.genes, split)
        return fit(start, objective, cells, evaluated, folder, self.processes)

    def _fit_probe(self, split: Split) -> tuple[Any, dict[str, Any]]:
        started = time.perf_counter()
        model: Any = adapt(self.base(), self.config).to(self.processes.device)
        set_head(trained_head(model), *self.fitted_head(split))
        return model.eval(), {
            "trainable_parameters": trainable_parameters(model),
            "seconds": time.perf_counter() - started,
            "peak_memory_gb": peak_memory_gb(),
        }

    @cached_property
    def contextual(self) -> np.ndarray:
        """Embeddings of the genes by the base, means over the cells that express them, shape `(genes, width)`."""
        chunks = cell_chunks(self.cells, self.cells.numbers)
        encoder = CellEncoder(
            self.base(), self.tokenizer, device=self.processes.device, dtype=computes_in(self.config)
        )
        return mean_embeddings(encoder, chunks, self.genes.tokens)

    def fitted_head(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Return weights and biases of a logistic regression on the base's embeddings of the training genes."""
        return fit_probe(self.contextual, cast(FinetuningData, self.genes), split, self.config)

    def predict(self, model: Any, split: Split, facts: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the mean logits of the test genes."""
        return {"logits": self.mean_logits(model, self.genes.tokens[split.test])}

    @torch.no_grad()
    def mean_logits(self, model: Any, tokens: np.ndarray) -> np.ndarray:
        """Return mean logits over the cells that express a gene, `(genes, classes)` float32; NaN where none does."""
        inner = without_peft(model)
        if not len(tokens):
            return np.zeros((0, inner.config.num_labels), dtype=np.float32)
        return predict_genes(
            inner,
            trained_head(model),
            self.tokenizer,
            cell_chunks(self.cells, self.cells.numbers),
            tokens,
            self.processes.device,
            computes_in(self.config),
        )

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
            "genes",
            "seed",
        )
        return {
            **settings_of(self.config, kept),
            "model": base_name(self.config),
            "context_length": self.tokenizer.context_length,
            "classes": self.genes.classes,
            "model_options": self.model_options(),
            "training_cells": len(self.cells),
            **{name: value for name, value in facts.items() if name not in COSTS},
        }

    # Scores -----------------------------------------------------------------------------------------

    def predictions(self, outcome: Outcome) -> np.ndarray:
        """Return the probabilities `(test genes, classes)`."""
        return cast(np.ndarray, softmax(outcome.arrays["logits"].astype(np.float64), axis=1))

    def baselines(self, outcomes: Sequence[Outcome]) -> dict[str, list[np.ndarray]]:
        """Return the predictions of classical models of features that need no fine-tuning."""
        embeddings = self.base().tahoe.embeddings.gene_encoder(torch.from_numpy(self.genes.tokens))
        features = {
            "frozen gene embeddings": embeddings.detach().float().numpy(),
            "frozen contextual embeddings": self.contextual,
            "mean expression and fraction of cells": expression_features(self.cells, self.genes.tokens),
        }
        splits = [outcome.fold.split for outcome in outcomes]
        return gene_baselines(features, self.genes.labels, len(self.genes.classes), splits, self.config.seed)

    def metrics(self, outcome: Outcome, predictions: np.ndarray) -> dict[str, float]:
        """Return the metrics of predictions for the test genes of a fold."""
        sought = sought_class(self.genes.labels) if len(self.genes.classes) == 2 else None
        return gene_metrics(self.genes.labels[outcome.fold.split.test], predictions, sought)

    def report(
        self, outcomes: Sequence[Outcome], predictions: dict[str, list[np.ndarray]], scores: Report
    ) -> dict[str, Any]:
        """Write the report; return the content of `report.json` without the table of scores."""
        return write_gene_report(
            self.folder, self.config, self.genes, len(self.cells), outcomes, predictions[self.ours], scores
        )
