"""Measure tasks in turn, and collect the rows of the resulting table."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.machine import copy_rate, matmul_rate
from tahoex1_hf import TahoeX1Config

T = TypeVar("T")


class Limit:
    """The hardware's highest rate, measured again beside every piece of work."""

    def __init__(self, name: str, unit: str, measure: Callable[[], float]):
        self.name, self.unit, self.measure = name, unit, measure
        self.seen: list[float] = []

    def __call__(self) -> float:
        self.seen.append(self.measure())
        return self.seen[-1]


@dataclass
class Task:
    """One thing to measure.

    Attributes:
        work: Function that does the work once and returns its rate (or its seconds).
        limit: Hardware limit that is measured just before and after; the rate is compared with the mean of both.
        costs: Cost of one unit of the rate in units of the limit (GFLOP or GB per cell), by the way of counting.
    """

    work: Callable[[], float]
    limit: Limit | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Series:
    """Measurements of one task: a value per round, and its shares of the hardware limit."""

    values: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    fractions: dict[str, list[float]] = field(default_factory=dict)


def in_turn(tasks: Mapping[str, Task], rounds: int) -> dict[str, Series]:
    """Do all tasks once per round, so that a disturbed machine slows all alike and ratios within a round hold."""
    series = {name: Series(fractions={count: [] for count in task.costs}) for name, task in tasks.items()}
    for number in range(rounds):
        for name, task in tasks.items():
            progress(f"  round {number + 1} of {rounds}: {name}")
            before = task.limit() if task.limit else 0.0
            value = task.work()
            series[name].values.append(value)
            if task.limit:
                limit = (before + task.limit()) / 2
                series[name].limits.append(limit)
                for count, cost in task.costs.items():
                    series[name].fractions[count].append(value * cost / limit)
    return series


@dataclass
class Row:
    """One line of the table, with all that was measured for it.

    Attributes:
        part: Part of the suite.
        name: What was measured.
        unit: Unit of the values, which are rates unless `smaller_is_better`.
        series: Our values.
        reference: The reference's values of the same rounds.
        remark: Text of the last column.
        not_measured: Reason, where there are no values.
        details: Further figures for the JSON file.
    """

    part: str
    name: str
    unit: str = ""
    series: Series = field(default_factory=Series)
    reference: Series | None = None
    remark: str = ""
    not_measured: str = ""
    smaller_is_better: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[float]:
        """Our values, one per round."""
        return self.series.values

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.values)

    @property
    def best(self) -> float:
        """Best value of all rounds, which the machine's other users disturbed least."""
        return min(self.values) if self.smaller_is_better else max(self.values)

    @property
    def ratio(self) -> float | None:
        """Median ratio of ours to the reference's within a round."""
        if self.reference is None or not self.values:
            return None
        return statistics.median(a / b for a, b in zip(self.values, self.reference.values, strict=True))

    @property
    def fractions(self) -> dict[str, float]:
        """Median share of the hardware limit, by the way of counting."""
        return {count: statistics.median(values) for count, values in self.series.fractions.items() if values}

    def as_json(self) -> dict[str, Any]:
        """Return everything as a dictionary for JSON."""
        row: dict[str, Any] = {"part": self.part, "name": self.name}
        if self.not_measured:
            return row | {"not_measured": self.not_measured}
        row |= {"unit": self.unit, "median": self.median, "best": self.best, "rounds": self.values}
        row["smaller_is_better"] = self.smaller_is_better
        if self.reference is not None:
            row |= {"reference_rounds": self.reference.values, "reference_median": _median(self.reference)}
            row["ratio"] = self.ratio
            if self.reference.fractions:
                row["reference_fraction_rounds"] = self.reference.fractions
        if self.series.limits:
            row |= {"limit_rounds": self.series.limits, "fraction_rounds": self.series.fractions}
            row["fractions"] = self.fractions
        return row | {"remark": self.remark, "details": self.details}


def _median(series: Series) -> float:
    return statistics.median(series.values)


@dataclass(eq=False)
class Suite:
    """One run of the suite: how much to measure, and what its parts share."""

    rounds: int
    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        """Return `full`, or `quick` in a quick run."""
        return quick if self.quick else full

    @cached_property
    def _folder(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="tahoex1-benchmarks-")

    @property
    def folder(self) -> Path:
        """Folder for files of this run, removed at its end."""
        return Path(self._folder.name)

    def config(self, **changes: Any) -> TahoeX1Config:
        """Return the shape of the 70M model, or in a quick run a small one."""
        small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return TahoeX1Config(**{**self.pick({}, small), **changes})

    @property
    def shape_name(self) -> str:
        """Name of the shape that `config` returns."""
        return self.pick("70M shape", "small shape")

    @cached_property
    def limits(self) -> dict[str, Limit]:
        """Hardware limits by name; `matmul bfloat16` is for CPUs that have instructions for it."""
        seconds, megabytes = self.pick((0.5, 256), (0.1, 64))
        found = {
            f"matmul {name}": Limit(f"matmul {name}", "GFLOP/s", partial(matmul_rate, dtype, seconds))
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }
        for threads in (1, 2):
            name = f"memory copy, {threads} core{'s' * (threads > 1)}"
            found[f"copy {threads}"] = Limit(name, "GB/s", partial(copy_rate, threads, megabytes))
        return found


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def progress(message: str) -> None:
    """Print a message to standard error."""
    print(message, file=sys.stderr, flush=True)


def machine_rows(limits: Iterable[Limit]) -> list[Row]:
    """Return the rows of the limits that were measured."""
    return [Row("machine", limit.name, limit.unit, Series(limit.seen)) for limit in limits if limit.seen]
