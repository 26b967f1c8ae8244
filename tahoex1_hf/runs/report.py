# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""One table of scores for every evaluation: a row for each value of a metric, with its interval where there is one.

The same columns serve every task, so that tables of different runs can be put below one another.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.common.files import WholeFile, write_json

CONFIDENCE = 0.95
REPORT, TEXT, TABLE, FIGURE = "report.json", "report.md", "scores.csv", "scores.png"


@dataclass(frozen=True)
class Score:
    """The value of a metric.

    Attributes:
        task: Name of the task.
        dataset: Name of the data.
        split: Part of the data that was scored: `test`, `held-out drug`.
        fold: Number of the fold, from 0; None for the mean over all folds.
        method: Name of the model or baseline.
        metric: Name of the metric.
        value: Its value.
        lower: Lower end of the 95 % confidence interval; None where there is none.
        upper: Upper end of the interval.
        n: Number of cells, genes or conditions that were scored.
        seconds: Time that the method took to train, per fold; None where it was not measured.
    """

    task: str
    dataset: str
    split: str
    fold: int | None
    method: str
    metric: str
    value: float
    lower: float | None = None
    upper: float | None = None
    n: int | None = None
    seconds: float | None = None


COLUMNS = tuple(field.name for field in fields(Score))


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of some values, and its 95 % confidence interval by Student's t.

    The values are assumed to be independent. Values of folds are not quite, since the folds share training cells
    (Bengio and Grandvalet 2004, J. Mach. Learn. Res. 5), so the interval is somewhat too narrow.

    Returns:
        `mean`; `low` and `high`, None where there are fewer than two values; `values`.
    """
    from scipy.stats import t

    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
        low, high = float(mean - half), float(mean + half)
    return {"mean": mean, "low": low, "high": high, "values": [float(value) for value in values]}


def format_value(
    value: float, lower: float | None = None, upper: float | None = None, digits: int | None = None
) -> str:
    """Return a value and its interval as text: `0.612 [0.580, 0.644]`.

    Args:
        value: Value.
        lower: Lower end of its interval; None where there is none.
        upper: Upper end of its interval.
        digits: Digits after the point; by default 3, and fewer for values of 100 and more.
    """
    form = f".{3 if digits is None else digits}f" if digits is not None or abs(value) < 100 else ".5g"
    return f"{value:{form}}" if lower is None else f"{value:{form}} [{lower:{form}}, {upper:{form}}]"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Report:
    """Scores of models and baselines, which it writes as tables and a picture.

    Args:
        task: Name of the task.
        dataset: Name of the data.

    Attributes:
        scores: Rows of the table, in the order in which they were added.
    """

    def __init__(self, task: str, dataset: str):
        self.task, self.dataset = task, dataset
        self.scores: list[Score] = []

    def add(
        self,
        method: str,
        folds: Sequence[Mapping[str, float | Sequence[float]]],
        *,
        numbers: Sequence[int],
        seconds: Sequence[float | None] | None = None,
        split: str = "test",
    ) -> None:
        """Add a method's scores: a row for each metric and fold, and one for each metric's mean.

        The interval of the mean is over the folds' values or, where a fold has several values, over all values.

        Args:
            method: Name of the model or baseline.
            folds: Metrics of each fold: a value, or one for each independent unit that was scored (a held-out drug).
                A metric that is not defined in a fold is left out of it.
            numbers: Number of cells, genes or conditions scored in each fold.
            seconds: Training time of each fold; None where it was not measured.
            split: Part of the data that was scored.
        """
        times = [None] * len(folds) if seconds is None else list(seconds)
        for metric in dict.fromkeys(name for each in folds for name in each):
            everything: list[float] = []
            used = [fold for fold, each in enumerate(folds) if metric in each]
            for fold in used:
                values = np.atleast_1d(np.asarray(folds[fold][metric], dtype=np.float64)).tolist()
                everything += values
                self._add_row(split, fold, method, metric, values, numbers[fold], times[fold])
            measured = [time for fold in used if (time := times[fold]) is not None]
            mean_time = float(np.mean(measured)) if measured else None
            self._add_row(split, None, method, metric, everything, sum(numbers[f] for f in used), mean_time)

    def _add_row(
        self,
        split: str,
        fold: int | None,
        method: str,
        metric: str,
        values: Sequence[float],
        number: int,
        seconds: float | None,
    ) -> None:
        found = interval(values)
        ends = (found["low"], found["high"])
        self.scores.append(
            Score(self.task, self.dataset, split, fold, method, metric, found["mean"], *ends, number, seconds)
        )

    def means(self, split: str | None = None) -> dict[str, dict[str, Score]]:
        """Return the scores over all folds as `{method: {metric: score}}`, of one split or of all."""
        found: dict[str, dict[str, Score]] = {}
        for score in self.scores:
            if score.fold is None and split in (None, score.split):
                found.setdefault(score.method, {})[score.metric] = score
        return found

    def summaries(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return `{method: {metric: summary}}`: `mean`, `low` and `high` over the folds, and the folds' `values`."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for score in self.scores:
            metrics = found.setdefault(score.method, {})
            summary = metrics.setdefault(score.metric, {"mean": 0.0, "low": None, "high": None, "values": []})
            if score.fold is None:
                summary.update(mean=score.value, low=score.lower, high=score.upper)
            else:
                summary["values"].append(score.value)
        return found

    def card_rows(self, method: str, titles: Mapping[str, str] | None = None) -> dict[str, float]:
        """Return a method's mean values by the metrics' titles, for a model card."""
        rows = {}
        for score in self.scores:
            if score.fold is None and score.method == method:
                rows[(titles or {}).get(score.metric, score.metric)] = score.value
        return rows

    def csv(self) -> str:
        """Return the table as CSV, with None as an empty field."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(score) for score in self.scores)
        return text.getvalue()

    def markdown(
        self,
        titles: Mapping[str, str] | None = None,
        methods: Mapping[str, str] | None = None,
        *,
        split: str | None = None,
        digits: int | None = None,
        corner: str = "",
    ) -> str:
        """Return a Markdown table of the means: a row for each method, a column for each metric.

        Args:
            titles: Metric -> heading, in the order of the columns; other metrics are left out. By default all metrics.
            methods: Method -> title; by default its name.
            split: Part of the data; by default all, where no method has scores on two parts.
            digits: Digits after the point; by default as in `format_value`.
            corner: Heading of the column with the methods.
        """
        means = self.means(split)
        metrics = list(dict.fromkeys(name for each in means.values() for name in each))
        titles = {name: name for name in metrics} if titles is None else titles
        shown = [name for name in titles if name in metrics]
        rows = [
            [
                (methods or {}).get(method, method),
                *(
                    format_value(each[name].value, each[name].lower, each[name].upper, digits) if name in each else "-"
                    for name in shown
                ),
            ]
            for method, each in means.items()
        ]
        return markdown_table([corner, *(titles[name] for name in shown)], rows)

    def draw(self, path: Path, metric: str, title: str = "", split: str | None = None) -> None:
        """Draw a metric of every method as a PNG: mean, interval and folds.

        Args:
            path: File to write.
            metric: Name of the metric.
            title: Label of the axis; by default the metric's name.
            split: Part of the data; by default all.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        drawn = [s for s in self.scores if s.metric == metric and split in (None, s.split)]
        splits = list(dict.fromkeys(score.split for score in drawn))
        rows = [score for score in drawn if score.fold is None]
        rows.reverse()  # so that the first stands at the top
        figure = Figure(figsize=(7, 1.2 + 0.4 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, mean in enumerate(rows):
            if mean.lower is not None and mean.upper is not None:
                axes.plot([mean.lower, mean.upper], [place, place], color="#4e79a7", linewidth=2)
            same = (metric, mean.method, mean.split)
            folds = [s.value for s in self.scores if (s.metric, s.method, s.split) == same and s.fold is not None]
            axes.plot(folds, [place] * len(folds), "o", markersize=3, color="black", alpha=0.45)
            axes.plot([mean.value], [place], "o", markersize=6, color="#4e79a7", zorder=3)
        names = [row.method if len(splits) < 2 else f"{row.method} ({row.split})" for row in rows]
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(title or metric)
        axes.set_ylim(-1, len(rows))
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120)

    def write(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        text: str,
        headline: str,
        title: str = "",
        split: str | None = None,
    ) -> None:
        """Write `report.json`, `report.md`, `scores.csv` and `scores.png` into a folder.

        Args:
            folder: Folder, which exists.
            facts: Content of `report.json`, to which the rows of the table are added as `scores`.
            text: Content of `report.md`.
            headline: Metric that is drawn.
            title: Label of its axis; by default the metric's name.
            split: Part of the data that is drawn; by default all.
        """
        write_json(folder / REPORT, {**facts, "scores": [asdict(score) for score in self.scores]})
        for name, content in ((TEXT, text), (TABLE, self.csv())):
            with WholeFile(folder / name) as partial:
                partial.write_text(content, encoding="utf-8")
        self.draw(folder / FIGURE, headline, title, split)
