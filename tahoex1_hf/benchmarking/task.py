# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark gives to the module that runs it and to its report."""

from collections.abc import Sequence
from typing import Any, Protocol

from tahoex1_hf.benchmarking.resampling import Measurement
from tahoex1_hf.benchmarking.sources import Source


class Benchmark(Protocol):
    """A task: what is scored, and how.

    Attributes:
        name: Name of the task.
        axis: What is scored, `cells` or `genes`.
        headline: Split, reader and metric by which sources are compared.
        notes: Sentences about the data for the report.
    """

    name: str
    axis: str
    headline: tuple[str, str, str]
    notes: list[str]

    @property
    def dataset(self) -> str:
        """Name of the data."""

    def settings(self) -> dict[str, Any]:
        """Return everything on which the scores depend but the source."""

    def prepare(self, sources: Sequence[Source]) -> None:
        """Check the sources before any work is done."""

    def evaluate(self, source: Source) -> list[Measurement]:
        """Return the scores of a source."""

    def judge(self, found: dict[str, list[Measurement]], sources: Sequence[Source]) -> list[str]:
        """Say whether the scores of the baselines allow any conclusion."""
