"""Compare ways of fine-tuning with each other and with classical baselines, on the same folds of the same cells.

    python examples/demo_cells.py data/pbmc68k.h5ad
    python examples/compare_finetuning.py classification runs/compare

Every method is a run of `tahoex1 finetune` in its own process, so that its peak memory can be measured. The same
command resumes a stopped comparison. At the end the folder holds comparison.json, comparison.md, comparison.png and a
report for each method.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tahoex1_hf.finetuning import FinetuneConfig, read_finetune_config
from tahoex1_hf.finetuning.cells.report import read_report
from tahoex1_hf.finetuning.metrics import HEADLINE, NAMES, paired_difference

METHODS = ["linear_probe", "lora", "full"]
TITLES = {"linear_probe": "linear probe", "lora": "LoRA", "full": "full fine-tuning"}
# Costs of a method: heading and format.
FACTS = {
    "trainable_parameters": ("trainable parameters", "{:,}"),
    "seconds": ("seconds per fold", "{:.1f}"),
    "peak_memory_gb": ("peak memory (GB)", "{:.2f}"),
}


def run_method(recipe: str, overrides: list[str], config: FinetuneConfig, method: str, rate: float) -> dict[str, Any]:
    """Run one method over the folds at a learning rate, and return its report."""
    folder = Path(config.output_dir) / method
    own = [f"method={method}", f"learning_rate={rate}", f"folds={config.folds}", f"output_dir={folder}", "report=true"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tahoex1_hf", "finetune", recipe, *overrides, *own], check=True)
    print(f"{TITLES[method]}: {time.perf_counter() - started:.0f} s", flush=True)
    return read_report(folder)


def gather(reports: dict[str, dict[str, Any]], config: FinetuneConfig) -> dict[str, Any]:
    """Put the methods' metrics beside the baselines' metrics, which are the same in all reports."""
    first = next(iter(reports.values()))
    baselines = {name: scores for name, scores in first["metrics"].items() if name != "model"}
    for method, report in reports.items():
        if report["splits"] != first["splits"]:
            raise ValueError(f"{method} was tested on other folds than the rest: remove its folder and run again.")
    metric, higher = HEADLINE[first["task"]]
    best = first["comparison"]["best_baseline"]
    return {
        "label": first["label"],
        "model": config.model,
        "data": config.data,
        "cells": first["cells"],
        "classes": None if first["classes"] is None else len(first["classes"]),
        "folds": len(first["splits"]),
        "settings": config.model_dump(mode="json"),
        "metric": metric,
        "higher_is_better": higher,
        "metrics": {TITLES[m]: report["metrics"]["model"] for m, report in reports.items()} | baselines,
        "best_baseline": best,
        "against_best_baseline": {
            TITLES[m]: paired_difference(
                report["metrics"]["model"][metric]["values"], baselines[best][metric]["values"]
            )
            for m, report in reports.items()
        },
        "verdicts": {TITLES[m]: report["comparison"]["text"] for m, report in reports.items()},
        "cost": {TITLES[m]: cost(report) for m, report in reports.items()},
    }


def cost(report: dict[str, Any]) -> dict[str, float]:
    """Return the number of trainable parameters, the mean seconds of a fold and the highest peak of memory."""
    facts = report["cost"]
    return {
        "trainable_parameters": max(each["trainable_parameters"] for each in facts),
        "seconds": float(np.mean([each["seconds"] for each in facts])),
        "peak_memory_gb": max(each["peak_memory_gb"] for each in facts),
    }


def format_table(comparison: dict[str, Any]) -> str:
    """Return metrics and costs as Markdown."""
    columns = [name for name in NAMES if any(name in scores for scores in comparison["metrics"].values())]
    head = [*(NAMES[name] for name in columns), *(heading for heading, _ in FACTS.values())]
    classes = "" if comparison["classes"] is None else f", {comparison['classes']} classes"
    lines = [
        f"# {comparison['label']}: {comparison['cells']} cells{classes}, {comparison['folds']} folds",
        "",
        f"| | {' | '.join(head)} |",
        "|---" * (1 + len(head)) + "|",
    ]
    for name, scores in comparison["metrics"].items():
        entries = [written(scores[column]) if column in scores else "-" for column in columns]
        spent = comparison["cost"].get(name)
        costs = ["-" if spent is None else form.format(spent[fact]) for fact, (_, form) in FACTS.items()]
        lines.append(f"| {name} | {' | '.join([*entries, *costs])} |")
    lines += ["", "Mean and 95 % interval over the folds (Student's t).", ""]
    lines += [f"- {name}: {text}" for name, text in comparison["verdicts"].items()]
    return "\n".join(lines) + "\n"


def written(scores: dict[str, Any]) -> str:
    """Return the mean with its interval as text."""
    text = f"{scores['mean']:.3f}"
    return text if scores["low"] is None else f"{text} [{scores['low']:.3f}, {scores['high']:.3f}]"


def draw(comparison: dict[str, Any], path: Path) -> None:
    """Draw the headline metric of every method with its interval and folds, and the method's costs."""
    metric, names = comparison["metric"], list(comparison["metrics"])[::-1]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4, width_ratios=[3, 1, 1, 1], sharey=True)
    colors = {name: "#4e79a7" if name in comparison["cost"] else "#b0b0b0" for name in names}
    for place, name in enumerate(names):
        scores = comparison["metrics"][name][metric]
        panels[0].barh(place, scores["mean"], color=colors[name], height=0.62)
        panels[0].scatter(scores["values"], [place] * len(scores["values"]), s=10, color="black", alpha=0.45, zorder=3)
        end = scores["mean"]
        if scores["low"] is not None:
            half = scores["mean"] - scores["low"]
            panels[0].errorbar(scores["mean"], place, xerr=half, color="black", capsize=4, linewidth=1.2)
            end = max(scores["high"], *scores["values"])
        panels[0].text(end, place, f"  {scores['mean']:.3f}", va="center", fontsize=9)
        for axes, (fact, (_, form)) in zip(panels[1:], FACTS.items(), strict=True):
            if name not in comparison["cost"]:
                axes.text(0.02, place, "-", va="center", transform=axes.get_yaxis_transform())
                continue
            value = comparison["cost"][name][fact]
            axes.barh(place, value, color=colors[name], height=0.62)
            axes.text(value, place, f" {form.format(value)}", va="center", fontsize=9)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_xlabel(f"{NAMES[metric]}: mean, 95 % interval and folds")
    panels[0].margins(x=0.12)
    for axes, (heading, _) in zip(panels[1:], FACTS.values(), strict=True):
        axes.set_xlabel(heading)
        axes.margins(x=0.6)
        axes.set_xticks([])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    classes = "" if comparison["classes"] is None else f", {comparison['classes']} classes"
    title = f"{comparison['label']}: {comparison['cells']} cells{classes}, {comparison['folds']} folds"
    figure.suptitle(f"{title} (grey: classical baselines)")
    figure.savefig(path, dpi=130)


def main(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Recipe of a classification or regression, by name or path.")
    ],
    output_dir: Annotated[Path, typer.Argument(help="Folder for the runs and the comparison.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Keys of the recipe to change.")
    ] = None,
    full_rate: Annotated[
        float,
        typer.Option(help="Learning rate of full fine-tuning, as a share of the recipe's; smaller for larger models."),
    ] = 0.5,
) -> None:
    """Compare linear probe, LoRA and full fine-tuning with PCA and its classifiers."""
    changes = list(overrides or [])
    if not any(each.startswith("folds=") for each in changes):
        changes.append("folds=5")
    try:
        config = read_finetune_config(recipe, [*changes, f"output_dir={output_dir}"])
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    shares = {"linear_probe": 1.0, "lora": 1.0, "full": full_rate}
    rates = {method: config.learning_rate * share for method, share in shares.items()}
    reports = {method: run_method(recipe, changes, config, method, rates[method]) for method in METHODS}
    comparison = gather(reports, config) | {"learning_rates": rates}
    (output_dir / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    table = format_table(comparison)
    (output_dir / "comparison.md").write_text(table, encoding="utf-8")
    draw(comparison, output_dir / "comparison.png")
    print(table)


if __name__ == "__main__":
    typer.run(main)
