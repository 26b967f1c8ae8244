# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of a benchmark: every score with its interval, and a verdict on every source."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tahoex1_hf.benchmarking.resampling import Measurement, compare, ends
from tahoex1_hf.benchmarking.sources import Source
from tahoex1_hf.benchmarking.task import Benchmark
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.runs.report import Report, Score, format_value, markdown_table

logger = logging.getLogger(__name__)

MODEL_INDEX = "model-index.yaml"
TITLES = {
    "macro_f1": "macro-F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "macro_auprc": "macro AUPRC",
    "gene_auroc": "gene AUROC",
    "r2": "R²",
    "ari": "ARI",
    "nmi": "NMI",
}
TITLES |= {"pearson": "Pearson r", "explained": "share explained"}


def write_report(
    task: Benchmark,
    sources: Sequence[Source],
    found: Mapping[str, Sequence[Measurement]],
    notes: Sequence[str],
    costs: Mapping[str, Mapping[str, float | None]],
    settings: Mapping[str, Any],
    folder: Path,
) -> str:
    """Write `report.json`, `report.md`, `scores.csv`, `scores.png` and, with models, `model-index.yaml`.

    Args:
        task: Task.
        sources: Sources.
        found: Scores of each source.
        notes: Sentences about the data.
        costs: `seconds`, `cpu_seconds` (None where they are not known) and `peak_memory_gb` of each source.
        settings: Settings of the task.
        folder: Folder to write into.

    Returns:
        The verdicts as text.
    """
    report = Report(task.name, task.dataset)
    for source in sources:
        for measurement in found[source.name]:
            report.scores += _rows(report, source, measurement)
    verdicts = verdicts_of(task.headline, sources, found)
    lines = verdict_sentences(task.headline, verdicts)
    parts = [
        f"# {task.name}: {task.dataset}",
        *notes,
        lines,
        *_tables(sources, found),
        f"Mean over the folds [95 % bootstrap interval over {task.axis}], then ± the standard deviation over folds "
        "and seeds. The intervals do not hold the chance of the training folds. A verdict compares a source with the "
        "best simple baseline on the same resamples; of several kinds of embedding the best counts, on both sides.",
        _spent(costs),
    ]
    facts = {
        "task": task.name,
        "dataset": task.dataset,
        "headline": list(task.headline),
        "settings": dict(settings),
        "notes": list(notes),
        "verdicts": verdicts,
        "cost": {name: dict(cost) for name, cost in costs.items()},
    }
    metric = task.headline[2]
    report.write(folder, facts, "\n\n".join(parts) + "\n", metric, TITLES[metric], task.headline[0])
    _write_model_index(task, sources, found, folder / MODEL_INDEX)
    logger.info("%s", "\n\n".join(parts))
    return lines


def _spent(costs: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return what each source took, as text."""
    texts = []
    for name, cost in costs.items():
        own = "" if cost["cpu_seconds"] is None else f" ({cost['cpu_seconds']:.0f} s of CPU time)"
        texts.append(f"{name}: {cost['seconds']:.0f} s{own}, peak {cost['peak_memory_gb']:.1f} GB")
    return "Time, and peak memory of the process so far: " + "; ".join(texts) + "."


def method(source: str, measurement: Measurement) -> str:
    """Return the name of a row: the source, its kind of embedding, and what reads it."""
    return ", ".join(filter(None, [" ".join(filter(None, [source, measurement.representation])), measurement.reader]))


def titled(metric: str) -> str:
    """Return the title of a metric."""
    return TITLES.get(metric, metric)


def _rows(report: Report, source: Source, measurement: Measurement) -> list[Score]:
    """Return the rows of a measurement: one for each fold, and one for the mean."""

    def row(fold: int | None, value: float, bounds: tuple[float, float], number: int, seconds: float) -> Score:
        name = method(source.name, measurement)
        place = (report.task, report.dataset, measurement.split, fold, name, measurement.metric)
        return Score(*place, value, *bounds, number, seconds)

    numbers, seconds = measurement.numbers, measurement.seconds
    rows = [
        row(fold, float(values[0]), ends(values), numbers[fold], seconds[fold])
        for fold, values in enumerate(measurement.replicates)
    ]
    mean = sum(seconds) / len(seconds)
    return [*rows, row(None, measurement.value, measurement.bounds(), sum(numbers), mean)]


def verdicts_of(
    headline: tuple[str, str, str], sources: Sequence[Source], found: Mapping[str, Sequence[Measurement]]
) -> dict[str, dict[str, Any]]:
    """Compare every source with the best simple baseline; a baseline is compared with the best of the others.

    Args:
        headline: Split, reader and metric by which they are compared; more is better.
        sources: Sources.
        found: Scores of each source.

    Returns:
        For each source with such a score its `method`, `value`, the baseline `against` which it stands, and what
        `compare` returns.
    """
    best: dict[str, Measurement] = {}
    for source in sources:
        rows = [m for m in found[source.name] if (m.split, m.reader, m.metric) == headline]
        if rows:
            best[source.name] = max(rows, key=lambda m: m.value)
    simple = [source.name for source in sources if source.simple and source.name in best]
    verdicts = {}
    for name, ours in best.items():
        against = max((other for other in simple if other != name), key=lambda other: best[other].value)
        verdicts[name] = {
            "method": method(name, ours),
            "value": ours.value,
            "against": method(against, best[against]),
            "baseline": best[against].value,
            **compare(ours, best[against]),
        }
    return verdicts


def verdict_sentences(headline: tuple[str, str, str], verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the verdicts as a list, a sentence each."""
    split, _, metric = headline
    return "\n".join(
        f"- {each['method']}: {TITLES[metric]} {each['value']:.3f} ({split}), **{each['verdict']}** against "
        f"{each['against']}, {each['baseline']:.3f}: {each['difference']:+.3f} "
        f"[{each['lower']:+.3f}, {each['upper']:+.3f}]."
        for each in verdicts.values()
    )


def _tables(sources: Sequence[Source], found: Mapping[str, Sequence[Measurement]]) -> list[str]:
    """Return a table for each split: a row for each source and kind of embedding, a column for reader and metric."""
    every = [(source.name, m) for source in sources for m in found[source.name]]
    tables = []
    for split in dict.fromkeys(m.split for _, m in every):
        chosen = [(name, m) for name, m in every if m.split == split]
        columns = list(dict.fromkeys((m.reader, m.metric) for _, m in chosen))
        rows: dict[str, dict[tuple[str, str], str]] = {}
        for name, m in chosen:
            title = " ".join(filter(None, [name, m.representation]))
            spread = "" if m.spread is None else f" ± {m.spread:.3f}"
            rows.setdefault(title, {})[m.reader, m.metric] = format_value(m.value, *m.bounds()) + spread
        header = [split, *(f"{reader} {titled(metric)}".strip() for reader, metric in columns)]
        tables.append(
            markdown_table(header, ([title, *(row.get(key, "-") for key in columns)] for title, row in rows.items()))
        )
    return tables


def _write_model_index(
    task: Benchmark, sources: Sequence[Source], found: Mapping[str, Sequence[Measurement]], path: Path
) -> None:
    """Write the scores of the models as `model-index` entries, to be put into the head of a model card."""
    import yaml
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    entries: list[dict[str, Any]] = []
    for source in sources:
        if source.kind != "model":
            continue
        results = [
            EvalResult(
                task_type="feature-extraction",
                task_name=task.name,
                dataset_type=task.dataset,
                dataset_name=task.dataset,
                metric_type=m.metric,
                metric_name=", ".join(filter(None, [titled(m.metric), m.representation, m.reader, m.split])),
                metric_value=round(m.value, 4),
            )
            for m in found[source.name]
        ]
        entries += eval_results_to_model_index(source.name, results)
    if entries:
        with WholeFile(path) as partial:
            partial.write_text(yaml.safe_dump({"model-index": entries}, sort_keys=False), encoding="utf-8")
