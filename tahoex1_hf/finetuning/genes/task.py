# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Classification of genes from the cells that express them: essentiality, membership of a pathway.

Every labelled gene of a cell is an example: the head on its token, which has seen the rest of the cell, says the
class. Genes are split, not cells: no gene (and no group of genes, such as a protein family) is trained and tested on.
In each epoch a gene weighs the same, however many cells express it, times the weight of its class.

What is predicted for a gene is the mean of its logits over all cells that express it. Cells longer than the context
are cut into parts, so that every expressed gene is seen. A gene that no cell expresses has no prediction: such genes
are left out and counted, in the log and in the report.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate import PartialState
from torch.nn.functional import cross_entropy

from tahoex1_hf.encoding_tahoe_x1 import GeneRows, matrix_rows, merge_repeats, mix64
from tahoex1_hf.finetuning.adapters import save_adapter
from tahoex1_hf.finetuning.bases import base_name, load_base, load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import LabelledCells, read_cells
from tahoex1_hf.finetuning.cells.long_cells import encode_in_parts
from tahoex1_hf.finetuning.cells.task import head_of
from tahoex1_hf.finetuning.config import GeneClassificationConfig
from tahoex1_hf.finetuning.fitting import drop_checkpoints, fit, read_result, run_task, write_result
from tahoex1_hf.finetuning.genes.report import write_gene_report
from tahoex1_hf.finetuning.genes.table import GeneTable, read_gene_table
from tahoex1_hf.finetuning.methods import adapt, trainable_parameters
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective, class_weights
from tahoex1_hf.finetuning.probe import fit_probe, set_head
from tahoex1_hf.finetuning.runs import computes_in
from tahoex1_hf.finetuning.sampling import content_numbers
from tahoex1_hf.finetuning.splits import Split, given_split, make_splits, train_and_validation
from tahoex1_hf.hub.adapters import find_adapter, is_peft, load_adapter, read_record
from tahoex1_hf.inference.encoder import CellEncoder, DtypeName, GeneMeans
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForTokenClassification
from tahoex1_hf.runs.checkpoints import last_whole
from tahoex1_hf.runs.memory import peak_memory_gb
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)

_VALIDATION_CELLS = 1000  # in which validation genes are looked at while training
_ENCODED_CELLS = 256  # at a time


class GeneObjective(Objective):
    """Cross-entropy over the labelled genes of cells.

    The `labels` of a batch are token ids of genes, from which class and weight follow; -100 elsewhere.

    Args:
        config: of the run.
        cells: that express the genes.
        genes: with labels.
        split: of the genes.
    """

    def __init__(self, config: GeneClassificationConfig, cells: LabelledCells, genes: GeneTable, split: Split):
        self.config, self.cells, self.collator = config, cells, None
        size = len(cells.tokenizer)
        self.classes = torch.full((size,), -100)
        self.classes[torch.from_numpy(genes.tokens)] = torch.from_numpy(genes.labels)
        weights = class_weights(genes.labels[split.train], len(genes.classes), config.class_weights)[genes.labels]
        # Each gene's weight is shared by its cells; over the tokens of an epoch the mean is 1.
        per_token = weights / genes.num_cells
        train = split.train
        per_token *= genes.num_cells[train].sum() / (per_token[train] * genes.num_cells[train]).sum()
        self.token_weights = torch.zeros(size)
        self.token_weights[torch.from_numpy(genes.tokens)] = torch.from_numpy(per_token).float()
        self.parts = {"train": torch.zeros(size, dtype=torch.bool), "validation": torch.zeros(size, dtype=torch.bool)}
        for name, part in self.parts.items():
            part[torch.from_numpy(genes.tokens[split.parts()[name]])] = True

    def batch(self, rows: np.ndarray, epoch: int) -> dict[str, Any]:
        """Some cells; of long ones another sample of genes in each epoch. Validation genes in the epoch `HELD_OUT`."""
        cells, tokenizer = self.cells, self.cells.tokenizer
        numbers, drugs = cells.numbers[rows], cells.stored.drug_ids
        encoded = tokenizer.encode_rows(
            cells.stored.rows(numbers),
            drug_ids=None if drugs is None else drugs[numbers],
            cell_numbers=numbers,
            seed=int(mix64(np.array([self.config.seed], dtype=np.uint64))[0] >> np.uint64(2)) + epoch,
            warn=lambda _: None,
        )
        pad_id = tokenizer.get_vocab()[str(tokenizer.pad_token)]
        batch = encoded.padded(pad_token_id=pad_id, pad_value=tokenizer.pad_value)
        part = self.parts["validation" if epoch == HELD_OUT else "train"]
        ids = batch["input_ids"]
        batch["labels"] = torch.where(part[ids], ids, -100)
        return batch

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Weighted losses summed, over the number of labelled tokens of the whole step."""
        losses, _ = self._losses(outputs.logits, labels)
        total = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / max(1, int(total))

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = labels.ne(-100)
        genes = labels[known].cpu()
        weights = self.token_weights[genes].to(logits.device)
        classes = self.classes[genes].to(logits.device)
        return cross_entropy(logits[known].float(), classes, reduction="none") * weights, weights

    def sums(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Sum of the weighted losses, of the weights, and nothing: `(3,)` float64."""
        labels = batch.pop("labels")
        losses, weights = self._losses(model(**batch).logits, labels)
        return torch.stack([losses.double().sum(), weights.double().sum(), losses.new_zeros(()).double()])

    def metrics(self, sums: torch.Tensor, num_cells: int) -> dict[str, float]:
        """The loss, each gene weighing the same but for its class."""
        return {"loss": float(sums[0] / sums[1].clamp(min=1e-12))}


@dataclass(eq=False)
class GeneRun:
    """Cells, genes, and how a model is made of a split."""

    config: GeneClassificationConfig
    processes: PartialState

    def __post_init__(self) -> None:
        config = self.config
        self.folder = Path(config.output_dir)
        self.tokenizer = load_tokenizer(config)
        self.cells = read_cells(config, self.tokenizer, self.folder)
        expressing = np.zeros(len(self.tokenizer), dtype=np.int64)
        np.add.at(expressing, self.cells.stored.tokens, 1)
        self.genes = read_gene_table(config, self.tokenizer, expressing)

    def splits(self) -> list[Split]:
        """Of the genes: those of the folds, or the one."""
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

    def whole(self) -> Split:
        """All genes to train on, but for those that early stopping looks at."""
        genes, config = self.genes, self.config
        every = np.arange(len(genes))
        return train_and_validation(every, genes.labels, genes.groups, config.validation_fraction, config.seed)

    def model_options(self) -> dict[str, Any]:
        """Of the head."""
        classes = self.genes.classes
        return {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
        }

    def base(self) -> TahoeX1ForTokenClassification:
        """The base with the head."""
        return load_base(self.config, TahoeX1ForTokenClassification, **self.model_options())

    def outcome(self, split: Split, folder: Path, keep: bool) -> tuple[np.ndarray, dict[str, Any]]:
        """Train on a split and test: `(test genes, classes)` mean logits, and what it cost; once done, read again.

        Args:
            split: of the genes.
            folder: of the fold.
            keep: whether the model is the one to keep.
        """
        done = read_result(folder, split)
        if done is not None:
            return done[0]["logits"], done[1]
        model, facts = self.train(split, folder)
        if self.processes.is_main_process:
            logits = self.predict(model, self.genes.tokens[split.test])
            if keep:
                save_adapter(model, self.tokenizer, self.folder, self.record(facts))
            write_result(folder, split, facts, logits=logits)
            drop_checkpoints(folder)
        self.processes.wait_for_everyone()
        arrays, facts = cast(tuple[dict[str, np.ndarray], dict[str, Any]], read_result(folder, split))
        return arrays["logits"], facts

    def train(self, split: Split, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Make a model of a split: the model in eval mode, and what it cost.

        Args:
            split: of the genes.
            folder: for checkpoints; the same call goes on from them.
        """
        config = self.config
        if config.method == "linear_probe":
            started = time.perf_counter()
            model = adapt(self.base(), config).to(self.processes.device)
            set_head(head_of(model), *self.fitted_head(split))
            facts: dict[str, Any] = {"trainable_parameters": trainable_parameters(model)}
            return model.eval(), {
                **facts,
                "seconds": time.perf_counter() - started,
                "peak_memory_gb": peak_memory_gb(),
            }
        cells = np.arange(len(self.cells))
        looked_at = cells
        if len(cells) > _VALIDATION_CELLS:
            chosen = np.random.default_rng(config.seed).choice(len(cells), _VALIDATION_CELLS, replace=False)
            looked_at = np.sort(chosen)

        def start() -> TahoeX1ForTokenClassification:
            model = self.base()
            # With a checkpoint to go on from, the head is read from there.
            if config.starts_from_probe and last_whole(folder) is None:
                set_head(model.classifier, *self.fitted_head(split))
            return model

        objective = GeneObjective(config, self.cells, self.genes, split)
        return fit(start, objective, cells, looked_at, folder, self.processes)

    @cached_property
    def contextual(self) -> np.ndarray:
        """`(genes, width)` embeddings of the base, each the mean over all cells that express the gene."""
        chunks = cell_chunks(self.cells, self.cells.numbers)
        encoder = CellEncoder(
            self.base(), self.tokenizer, device=self.processes.device, dtype=cast(DtypeName, computes_in(self.config))
        )
        return mean_embeddings(encoder, chunks, self.genes.tokens)

    def fitted_head(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Weights and biases of a logistic regression on the base's embeddings of the training genes."""
        return fit_probe(self.contextual, cast(LabelledCells, self.genes), split, self.config)

    @torch.no_grad()
    def predict(self, model: Any, tokens: np.ndarray) -> np.ndarray:
        """Mean logits of genes over the cells that express them: `(genes, classes)` float32, NaN where none does."""
        inner = model.get_base_model() if is_peft(model) else model
        head = head_of(model)
        if not len(tokens):
            return np.zeros((0, inner.config.num_labels), dtype=np.float32)
        numbers = self.cells.numbers
        return predict_genes(
            inner,
            head,
            self.tokenizer,
            cell_chunks(self.cells, numbers),
            tokens,
            self.processes.device,
            computes_in(self.config),
        )

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What finetuning.json says."""
        config = self.config
        kept = ("task", "label", "method", "size", "layer", "gene_id_column", "drugs", "group", "genes", "seed")
        costs = ("seconds", "peak_memory_gb")
        return {
            **{name: getattr(config, name, None) for name in kept},
            "model": base_name(config),
            "context_length": self.tokenizer.context_length,
            "classes": self.genes.classes,
            "model_options": self.model_options(),
            "training_cells": len(self.cells),
            **{name: value for name, value in facts.items() if name not in costs},
        }


def cell_chunks(cells: LabelledCells, numbers: np.ndarray) -> Iterator[tuple[GeneRows, np.ndarray | None]]:
    """Genes and drugs of some cells of a file, a few hundred at a time."""
    for start in range(0, len(numbers), _ENCODED_CELLS):
        part, drugs = numbers[start : start + _ENCODED_CELLS], cells.stored.drug_ids
        yield cells.stored.rows(part), None if drugs is None else drugs[part]


@torch.no_grad()
def predict_genes(
    model: TahoeX1ForTokenClassification,
    head: torch.nn.Linear,
    tokenizer: TahoeX1Tokenizer,
    chunks: Iterable[tuple[GeneRows, np.ndarray | None]],
    tokens: np.ndarray,
    device: torch.device | None = None,
    dtype: str = "float32",
) -> np.ndarray:
    """Classes of genes, from all cells.

    The head is linear, so that the mean of its logits is its logit of the mean embedding.

    Args:
        model: in eval mode, with adapters in it where there are any.
        head: on its gene embeddings.
        tokenizer: of the model.
        chunks: of cells, their genes and drugs.
        tokens: `(genes,)` token ids.
        device: to compute on; by default the fastest there is.
        dtype: of the transformer.

    Returns:
        `(genes, classes)` float32 mean logits over the cells that express a gene; NaN where none does.
    """
    encoder = CellEncoder(model, tokenizer, device=device, dtype=cast(DtypeName, dtype))
    embeddings = torch.from_numpy(mean_embeddings(encoder, chunks, tokens)).to(head.weight)
    return cast(np.ndarray, head(embeddings).float().cpu().numpy())


@torch.inference_mode()
def mean_embeddings(
    encoder: CellEncoder, chunks: Iterable[tuple[GeneRows, np.ndarray | None]], tokens: np.ndarray
) -> np.ndarray:
    """`(genes, width)` float32 mean embeddings over the cells that express a gene; NaN where none does."""
    means = GeneMeans(tokens, encoder.config.vocab_size, encoder.width, encoder.device)
    for rows, drugs in chunks:
        for _ in encoder.pooled_batches(encode_in_parts(encoder.tokenizer, rows, content_numbers(rows), drugs), means):
            pass
    return means.means(tokens)


def predict_gene_classes(
    adapter: str | Path,
    adata: "AnnData",
    base: str | Path | None = None,
    *,
    gene_id_column: str | None = None,
    layer: str | None = None,
    drugs: str | None = None,
) -> "pd.DataFrame":
    """Classes of all genes that some cell expresses.

    Args:
        adapter: folder or Hub id of a model trained with `task=gene_classification`.
        adata: cells with raw counts, in memory or backed.
        base: where the base is now; by default it is where the adapter says.
        gene_id_column: column of `var` with Ensembl ids; by default `var_names`.
        layer: layer with the counts; by default `X`.
        drugs: for models with a drug encoder: the drug of all cells.

    Returns:
        By Ensembl id: `predicted`, `probability_<class>` of each class, and `cells`, how many express the gene. A gene
        that no cell expresses has no row.

    Raises:
        ValueError: for an adapter of another task, and for cells that cannot be read.
    """
    import pandas as pd
    from scipy.special import softmax

    folder = find_adapter(adapter)
    task = read_record(folder).get("task")
    if task != "gene_classification":
        raise ValueError(f"adapter={adapter} was trained for {task}, not for gene_classification.")
    model, tokenizer = load_adapter(folder, base)
    matrix, match = tokenizer.read_anndata(adata, gene_id_column, layer)
    expressing = np.zeros(len(tokenizer), dtype=np.int64)

    def chunks() -> Iterator[tuple[GeneRows, np.ndarray | None]]:
        for start in range(0, adata.n_obs, _ENCODED_CELLS):
            rows, repeats = matrix_rows(matrix[start : start + _ENCODED_CELLS], match)
            rows = merge_repeats(rows) if repeats else rows
            expressing[:] += np.bincount(rows.tokens, minlength=len(expressing))
            yield rows, None if drugs is None else tokenizer.drug_ids(drugs, len(rows.offsets) - 1)

    inner: Any = model.get_base_model() if is_peft(model) else model
    genes = np.unique(match.token_ids[match.token_ids >= 0])
    logits = predict_genes(inner, head_of(model), tokenizer, chunks(), genes)
    seen = expressing[genes] > 0
    genes, chances = genes[seen], softmax(logits[seen].astype(np.float64), axis=1)
    classes = [inner.config.id2label[number] for number in range(chances.shape[1])]
    columns: dict[str, Any] = {"predicted": np.array(classes)[chances.argmax(axis=1)]}
    columns |= {f"probability_{name}": chances[:, number] for number, name in enumerate(classes)}
    names = [str(tokenizer.convert_ids_to_tokens(int(token))) for token in genes]
    return pd.DataFrame({**columns, "cells": expressing[genes]}, index=names)


def finetune_genes(config: GeneClassificationConfig) -> int:
    """Run, or go on with a run, to its end.

    Args:
        config: of the run, with `task=gene_classification`. Every process of a launcher calls this with the same.

    Returns:
        0; or 75 where SIGTERM ended it after a checkpoint: give the same command again.

    Raises:
        FileNotFoundError: for a model or a file that cannot be found.
        ValueError: for settings, cells or genes that do not fit.
    """

    def work(processes: PartialState) -> dict[str, Any]:
        run = GeneRun(config, processes)
        outcomes = []
        splits = run.splits()
        for number, split in enumerate(splits):
            alone = len(splits) == 1
            folder = run.folder if alone else run.folder / "folds" / str(number)
            logger.info("Fold %d of %d.", number + 1, len(splits))
            outcomes.append(run.outcome(split, folder, keep=alone))
        if len(splits) > 1:
            logger.info("The model to keep, of all genes.")
            run.outcome(run.whole(), run.folder, keep=True)
        if not config.report or not processes.is_main_process:
            return {}
        embeddings = run.base().tahoe.embeddings.gene_encoder(torch.from_numpy(run.genes.tokens))
        frozen = {
            "frozen gene embeddings": embeddings.detach().float().numpy(),
            "frozen contextual embeddings": run.contextual,
        }
        return write_gene_report(run.folder, config, run.cells, run.genes, splits, outcomes, frozen)

    return run_task(config, work)
