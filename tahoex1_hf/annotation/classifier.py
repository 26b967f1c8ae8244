# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A fine-tuned classifier beside the neighbours: an adapter, a probe or a whole model, with the classes it learnt."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.annotation.methods import Votes
from tahoex1_hf.cells.encoding import EncodeOptions
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.embedding.embedder import Embedder
from tahoex1_hf.finetuning.cells.labelled import SAMPLE_SEED
from tahoex1_hf.finetuning.cells.predictor import CellPredictor, Predictor, load_predictor


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fine-tuned classifier of cells.

    Attributes:
        predictor: Model and tokenizer.
        labels: Names of its classes.
        names: Their joined names; empty for classes that are left out.
    """

    predictor: Predictor
    labels: list[str]
    names: list[str]

    def check(self, known: Collection[str]) -> None:
        """Raise ValueError if no class of the classifier is one of the reference's or the query's labels."""
        if not set(self.names) & set(known):
            raise ValueError(
                f"classifier={self.predictor.name} knows the classes {', '.join(self.labels[:5])}, and the labels are "
                f"{', '.join(sorted(known)[:5])}: none is the same. Join their names with label_map (--label-map), or "
                "take a classifier that was fine-tuned for these labels."
            )

    def votes(self, cells: CellInput, classes: list[str], embedder: Embedder, progress: bool) -> Votes:
        """Return what the classifier says of cells.

        Args:
            cells: Cells, opened with the classifier's tokenizer.
            classes: Names of the reference's classes.
            embedder: Settings with which models run.
            progress: Whether to show a progress bar.

        Returns:
            Probabilities of the reference's classes, then of the others that the classifier knows, in the order of
            `columns`.
        """
        ready = CellPredictor(
            self.predictor, batch_tokens=embedder.batch_tokens, device=embedder.device, dtype=embedder.dtype
        )
        columns = self.columns(classes)
        place = {name: number for number, name in enumerate(columns)}
        to = np.array([place[name] for name in self._named()])
        found = np.zeros((cells.num_cells, len(columns)), dtype=np.float32)
        encoding = EncodeOptions(ready.tokenizer, None, SAMPLE_SEED, "error", 1)
        with progress_bar(progress, total=cells.num_cells, unit="cell", desc="Classifying") as bar:
            for chunk, probabilities, _ in ready.predict_chunks(cells, encoding, bar.update):
                rows = found[chunk.cell_numbers]
                for column, values in zip(to, probabilities.T, strict=True):  # two classes may have one joined name
                    rows[:, column] += values
                found[chunk.cell_numbers] = rows
        return Votes(found, 1 - found.max(1), np.ones(len(found), dtype=np.float32))

    def columns(self, classes: list[str]) -> list[str]:
        """Return the names of the reference's classes and, behind them, of further ones that the classifier knows."""
        return [*classes, *sorted(set(self._named()) - set(classes))]

    def _named(self) -> list[str]:
        """Return the joined names; a class that the table leaves out keeps its own, since a cell may be called so."""
        return [name or label for name, label in zip(self.names, self.labels, strict=True)]


def read_classifier(source: Any, label_map: Mapping[str, str]) -> Classifier | None:
    """Load a fine-tuned classifier; None where there is none.

    Args:
        source: As `model` in `predict_anndata`; None for no classifier.
        label_map: Label -> joined name.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the model predicts numbers, or reads drugs.
    """
    if source is None:
        return None
    predictor = load_predictor(str(source) if isinstance(source, Path) else source)
    if predictor.classes is None:
        raise ValueError(f"classifier={predictor.name} predicts a number, not classes: use `tahoex1 predict`.")
    if predictor.record.get("drugs"):
        raise ValueError(
            f"classifier={predictor.name} was fine-tuned with the drugs of cells, which annotation does not know: use "
            "`tahoex1 predict`."
        )
    return Classifier(predictor, predictor.classes, [label_map.get(name, name) for name in predictor.classes])
