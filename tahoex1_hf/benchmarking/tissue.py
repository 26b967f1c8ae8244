# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tell of which tissue cell lines are by their embeddings: the original's benchmark, and the readers of cell types."""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from tahoex1_hf.benchmarking.cell_types import ALL, CellTypes
from tahoex1_hf.benchmarking.resampling import Measurement, bootstrapped
from tahoex1_hf.benchmarking.sources import Source

_NEIGHBOURS, _LONGEST = 20, 17_000  # as in the original


class Tissue(CellTypes):
    """The task `tissue`; its cells are cell lines, and its label is their tissue."""

    name = "tissue"
    axis = "cell lines"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.computing = replace(self.computing, max_length=self.computing.max_length or _LONGEST)

    def evaluate(self, source: Source) -> list[Measurement]:
        """Return the scores of a source."""
        features = self.embed(source)
        return [*self.scores(features), self.purity(features)]

    def purity(self, features: Any) -> Measurement:
        """Return how many times as often as by chance a line's 20 nearest neighbours are of its tissue."""
        from sklearn.neighbors import NearestNeighbors

        started = time.perf_counter()
        number = min(_NEIGHBOURS, len(self.labels) - 1)
        neighbours = NearestNeighbors(n_neighbors=number).fit(features).kneighbors(return_distance=False)
        same = (self.labels[neighbours] == self.labels[:, None]).mean(axis=1)
        chance = float(((np.bincount(self.labels) / len(self.labels)) ** 2).sum())
        rows = np.arange(len(self.labels))
        values = bootstrapped(lambda _, chosen: float(chosen.mean() / chance), self.labels, same, rows, len(rows))
        seconds = [time.perf_counter() - started]
        return Measurement("", "20 neighbours", ALL, "purity over chance", values[None], [len(rows)], seconds)
