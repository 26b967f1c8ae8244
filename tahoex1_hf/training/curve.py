# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A picture of losses and learning rate over a run."""

from pathlib import Path
from typing import Any


def draw_curve(history: list[dict[str, Any]], baselines: dict[str, float], path: Path) -> None:
    """Draw losses and learning rate by step.

    Args:
        history: `log_history` of Trainer.
        baselines: Losses of constants by name, drawn as horizontal lines.
        path: PNG file to write.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for key, label, style in (
        ("masked_mse", "training, from each gene's embedding", "C0-"),
        ("mvc_mse", "training, from the cell embedding", "C1-"),
        ("eval_masked_mse", "validation, from each gene's embedding", "C0o--"),
        ("eval_mvc_mse", "validation, from the cell embedding", "C1o--"),
    ):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            thin = {"markersize": 4} if key.startswith("eval") else {"alpha": 0.6, "linewidth": 1}
            losses.plot(*zip(*points, strict=True), style, label=label, **thin)
    for (name, loss), line in zip(baselines.items(), (":", "-."), strict=False):
        losses.axhline(
            loss, color="0.4", linestyle=line, linewidth=1, label=f"predicting the {name.replace('_', ' ')}"
        )
    values = [line[k] for line in history for k in ("masked_mse", "mvc_mse") if k in line] + list(baselines.values())
    if values and max(values) > 20 * min(values):
        losses.set_yscale("log")
    if baselines:  # the first steps are far above all that follows
        losses.set_ylim(top=min(losses.get_ylim()[1], 1.7 * max(baselines.values())))
    losses.set_ylabel("mean squared error at the targets")
    losses.legend(fontsize=8, frameon=False)
    points = [(line["step"], line["learning_rate"]) for line in history if "learning_rate" in line]
    if points:
        rates.plot(*zip(*points, strict=True), "C2-")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
