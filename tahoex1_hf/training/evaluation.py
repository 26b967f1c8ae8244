# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluations of the model in training: how well it separates cell types, and essential genes from others.

All processes embed, each its share of the cells, on its device. In the first process a thread then makes classifiers
and pictures while the training continues. Evaluations restore the random states, so that a run does not depend on
whether it is evaluated.
"""

import contextlib
import json
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tahoex1_hf.common.plots import draw_umap
from tahoex1_hf.data.config import Strict

if TYPE_CHECKING:
    import pandas as pd

    from tahoex1_hf.cells.readers.base import CellInput
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

Log = Callable[[dict[str, float]], None]
Features = tuple[np.ndarray, np.ndarray]  # (rows, width) float32 and their labels, (rows,)
# A process's rows by the number of the first, and the labels of all rows.
Pieces = tuple[dict[int, np.ndarray], np.ndarray]


class _EvaluationConfig(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the evaluation; its metrics are called `eval_<name>_...`."""
    every_evals: int = Field(1, gt=0)
    """Interval of this evaluation, in evaluations of the training."""
    folds: int = Field(5, gt=1)
    """Number of folds of the stratified cross-validation."""
    seed: int = 0
    """Seed of subsets, folds and forests."""


class CellTypeConfig(_EvaluationConfig):
    """Cell-type classification."""

    file: str
    """`.h5ad` with raw counts."""
    label: str
    """Column of `obs`; cells without a label are left out."""
    layer: str | None = None
    """Layer with the counts; by default `X`, or where that holds none `counts`, `raw_counts` or `raw`."""
    gene_id_column: str | None = None
    """Column of `var` with Ensembl ids; by default they are looked for."""
    gene_symbols: str | None = None
    """Table with gene symbol and Ensembl id, for files that name genes by symbol; by default the package's."""
    max_cells: int = Field(2000, gt=1)
    """Largest number of cells; if there are more, some are chosen at random."""
    neighbors: int = Field(15, gt=0)
    """Number of nearest neighbours of a cell whose types are compared with its own, for the purity."""


class GeneEssentialityConfig(_EvaluationConfig):
    """Prediction of essential genes from the gene embeddings."""

    file: str
    """CSV or Parquet with a row per gene."""
    gene_id_column: str = "ensembl"
    """Column with Ensembl ids."""
    label: str | None = None
    """Column with 0 and 1 (or false and true), where rows without a value are left out; by default all genes are
    essential."""
    negatives_file: str | None = None
    """Table of genes that are not essential, for a `file` without `label`."""


def whole_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model with whole weights, on this process's device.

    If `model` is sharded, all processes have to call this. Each gets a copy of the weights, in float32 4 bytes per
    parameter, which takes the place of the activations of a step.
    """
    inner: Any = model.module if hasattr(model, "module") else model
    if not any(isinstance(parameter, DTensor) for parameter in inner.parameters()):
        return inner
    state = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True))
    # FSDP derives a new class from the model's class; ours is among its bases.
    kind = next(c for c in type(inner).__mro__ if c.__module__.endswith("modeling_tahoe_x1"))
    config = inner.config
    with torch.device("meta"):
        copy: torch.nn.Module = kind(config)
    copy.load_state_dict(state, assign=True)
    return copy.eval()


def place() -> tuple[int, int]:
    """Return the number of this process, and the number of processes."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def from_all(value: Any) -> list[Any]:
    """Return the values of all processes, which all have to call this."""
    _, processes = place()
    values = [value] * processes
    if processes > 1:
        torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def undisturbed_random() -> Iterator[None]:
    """Restore the random states of torch (on all devices), numpy and Python at the end."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (other code's state, to be restored)
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


class _Evaluation(TrainerCallback, ABC):
    """A callback that runs `features` in all processes at evaluations, and `score` in a thread of the first.

    Attributes:
        log: Function that takes the results; set when the trainer is made.
        tokenizer: Tokenizer of the model; set when the trainer is made.
    """

    def __init__(self, config: Any):
        self.config = config
        self.log: Log | None = None
        self.tokenizer: TahoeX1Tokenizer | None = None
        self.evaluations = 0
        self.pool: ThreadPoolExecutor | None = None
        self.pending: list[tuple[int, Future[dict[str, float]]]] = []

    @abstractmethod
    def features(self, model: torch.nn.Module, process: int, processes: int) -> Pieces:
        """Return this process's share of the embeddings, and the labels of all."""

    @abstractmethod
    def score(self, features: Features, picture: Path, step: int) -> dict[str, float]:
        """Return metrics of embeddings, and draw the evaluation's picture, if it has one."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Embed, and let a thread do the rest while the training continues."""
        self.evaluations += 1
        if self.evaluations % self.config.every_evals:
            return
        features = self._gathered(model)
        if features is None:
            return
        folder = Path(str(args.output_dir)) / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / f"{self.config.name}-step-{state.global_step}.png"
        self.pool = self.pool or ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        future = self.pool.submit(self.score, features, picture, state.global_step)
        self.pending.append((state.global_step, future))

    def _gathered(self, model: torch.nn.Module) -> Features | None:
        """Return the features of all processes in the first one; None in the others, and where they failed."""
        whole, (process, processes) = whole_model(model), place()
        was_training = whole.training
        share: Pieces | None = None
        try:
            with undisturbed_random():
                share = self.features(whole, process, processes)
        except Exception:
            logger.warning("Evaluation %s failed; the training continues.", self.config.name, exc_info=True)
        finally:
            whole.train(was_training)
        shares = from_all(share)  # also after a failure: the others wait for this process
        if process or share is None:
            return None
        if None in shares:
            logger.warning("Evaluation %s failed in another process; the training continues.", self.config.name)
            return None
        pieces = {first: rows for own, _ in shares for first, rows in own.items()}
        return np.concatenate([pieces[first] for first in sorted(pieces)]), share[1]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Wait for results at the next line of the log, so that the log does not depend on their duration."""
        if control.should_log or control.should_save:
            self.collect(args)
        return control

    def on_train_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Wait for the last results."""
        self.collect(args)

    def collect(self, args: TrainingArguments) -> None:
        """Wait for the pending results and log them."""
        for step, future in self.pending:
            try:
                metrics = {f"eval_{self.config.name}_{name}": value for name, value in future.result().items()}
            except Exception:
                logger.warning("Evaluation %s failed; the training continues.", self.config.name, exc_info=True)
                continue
            logger.info("Step %d: %s", step, metrics)
            path = Path(str(args.output_dir)) / "evaluation" / "results.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            if self.log is not None:
                self.log({**metrics, f"eval_{self.config.name}_step": step})
        self.pending.clear()


class CellTypeEvaluation(_Evaluation):
    """Logistic regression on cell embeddings (macro-F1), purity of the nearest neighbours, and a UMAP picture.

    Args:
        config: Cells and labels.
    """

    def features(self, model: torch.nn.Module, process: int, processes: int) -> Pieces:
        """Return embeddings of the labelled cells; the processes take chunks of them in turn.

        Raises:
            ValueError: If the column with the labels is missing or has less than two classes.
        """
        from tahoex1_hf.cells.encoding import CHUNK_CELLS, ChunkEncoder, EncodeOptions
        from tahoex1_hf.cells.genes import GeneOptions
        from tahoex1_hf.cells.opening import open_cells
        from tahoex1_hf.inference.encoder import CellEncoder

        assert self.tokenizer is not None
        config = self.config
        options = GeneOptions(config.gene_id_column, config.gene_symbols, config.layer)
        cells = open_cells(config.file, self.tokenizer, options)
        rows, labels = self._choose(cells)
        encoder = CellEncoder(
            model,  # type: ignore[arg-type]
            self.tokenizer,
            device=next(model.parameters()).device,
            dtype="float32",
        )
        chunks, pieces = ChunkEncoder(cells, EncodeOptions(self.tokenizer)), {}
        for start in range(0, len(rows), CHUNK_CELLS)[process::processes]:
            part = rows[start : start + CHUNK_CELLS]
            pieces[start] = encoder.embed(chunks.encode(cells.rows_at(part), None, start))
        return pieces, labels

    def _choose(self, cells: "CellInput") -> tuple[np.ndarray, np.ndarray]:
        """Return the rising numbers of the cells to embed, and their labels."""
        config = self.config
        if config.label not in cells.obs_columns:
            raise ValueError(f"label={config.label!r} is not in obs of {config.file}: it has {cells.obs_columns}.")
        column = cells.column(config.label)
        known = np.flatnonzero(column.notna().to_numpy())
        labels = column.iloc[known].astype(str)
        counts = labels.value_counts()
        kept = counts.index[counts >= config.folds]
        if len(kept) < len(counts):
            logger.warning("%s: classes of fewer than %d cells are left out.", config.name, config.folds)
        if len(kept) < 2:
            raise ValueError(
                f"label={config.label!r} of {config.file}: {len(kept)} classes have at least {config.folds} cells."
            )
        rows = known[labels.isin(kept).to_numpy()]
        if len(rows) > config.max_cells:
            rows = np.sort(np.random.default_rng(config.seed).choice(rows, config.max_cells, replace=False))
        return rows, column.iloc[rows].astype(str).to_numpy()

    def score(self, features: Features, picture: Path, step: int) -> dict[str, float]:
        """Return the macro-F1 over the folds, the purity, and its ratio to the purity of random neighbours."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.neighbors import NearestNeighbors
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        embeddings, labels = features
        folds = StratifiedKFold(self.config.folds, shuffle=True, random_state=self.config.seed)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        predicted = cross_val_predict(classifier, embeddings, labels, cv=folds)
        number = min(self.config.neighbors, len(labels) - 1)
        near = NearestNeighbors(n_neighbors=number).fit(embeddings).kneighbors(return_distance=False)
        purity = float((labels[near] == labels[:, None]).mean())
        _, counts = np.unique(labels, return_counts=True)
        by_chance = float((counts / len(labels) * (counts - 1) / (len(labels) - 1)).sum())
        draw_umap(embeddings, labels, f"{self.config.name}, step {step}", picture, self.config.seed)
        return {
            "macro_f1": float(f1_score(labels, predicted, average="macro")),
            "knn_purity": purity,
            "knn_purity_over_chance": purity / by_chance,
        }


class GeneEssentialityEvaluation(_Evaluation):
    """Random forest on the gene encoder's embeddings: area under the ROC curve over the folds.

    Args:
        config: Genes and labels.
    """

    def features(self, model: torch.nn.Module, process: int, processes: int) -> Pieces:
        """Return embeddings of the labelled genes in the vocabulary, all from the first process."""
        assert self.tokenizer is not None
        genes, labels = self._genes()
        vocabulary = self.tokenizer.get_vocab()
        known = [row for row, gene in enumerate(genes) if gene in vocabulary]
        labels = labels[known]
        if min((labels == 0).sum(), (labels == 1).sum()) < self.config.folds:
            raise ValueError(
                f"{self.config.file} has {int((labels == 1).sum())} essential and {int((labels == 0).sum())} other "
                f"genes of the vocabulary: {self.config.folds} of each are needed."
            )
        encoder = model.tahoe.embeddings.gene_encoder  # type: ignore[union-attr]
        ids = torch.tensor([vocabulary[genes[row]] for row in known], device=next(model.parameters()).device)
        with torch.inference_mode():
            embeddings = encoder(ids).float().cpu().numpy()  # type: ignore[operator]
        return {} if process else {0: embeddings}, labels

    def _genes(self) -> tuple[list[str], np.ndarray]:
        config = self.config
        table = self._table(config.file)
        if config.label is None and config.negatives_file is None:
            raise ValueError(f"{config.name}: set label, or negatives_file.")
        if config.label is not None:
            if config.label not in table:
                raise ValueError(f"label={config.label!r} is not in {config.file}: it has {list(table)}.")
            table = table[table[config.label].notna()]
            return table[config.gene_id_column].astype(str).tolist(), table[config.label].astype(int).to_numpy()
        negatives = self._table(config.negatives_file)
        genes = [*table[config.gene_id_column], *negatives[config.gene_id_column]]
        return genes, np.repeat([1, 0], [len(table), len(negatives)])

    def _table(self, path: str) -> "pd.DataFrame":
        import pandas as pd

        table = pd.read_parquet(path) if path.endswith(".parquet") else pd.read_csv(path)
        column = self.config.gene_id_column
        if column not in table:
            raise ValueError(f"gene_id_column={column!r} is not in {path}: it has {list(table)}.")
        return table.dropna(subset=[column]).drop_duplicates(column)

    def score(self, features: Features, picture: Path, step: int) -> dict[str, float]:
        """Return the area under the ROC curve of predictions for genes that the forest has not seen."""
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        embeddings, labels = features
        folds = StratifiedKFold(self.config.folds, shuffle=True, random_state=self.config.seed)
        forest = RandomForestClassifier(200, random_state=self.config.seed)
        chances = cross_val_predict(forest, embeddings, labels, cv=folds, method="predict_proba")
        return {"auroc": float(roc_auc_score(labels, chances[:, 1]))}
