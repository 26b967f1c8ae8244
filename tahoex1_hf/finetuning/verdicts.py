# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Say in words whether a model beats its baselines."""

from collections.abc import Mapping
from typing import Any


def beats(differences: Mapping[str, Mapping[str, Any]], ours: str, metric: str) -> str:
    """Say which baselines a model beats, and which it does not.

    Args:
        differences: Baseline -> `interval` of our value minus its value, over folds or conditions.
        ours: Name of the model.
        metric: Name of the metric that is compared; more of it is better.
    """
    lines = []
    for name, difference in differences.items():
        sure = ""
        if difference["low"] is not None:
            inside = difference["low"] <= 0 <= difference["high"]
            sure = f", 95 % interval {difference['low']:+.3f} to {difference['high']:+.3f}"
            sure += ": the difference may be chance" if inside else ""
        verb = "beats" if difference["mean"] > 0 else "does not beat"
        lines.append(f"- {ours} {verb} {name} by {metric} ({difference['mean']:+.3f}{sure}).")
    return "\n".join(lines)
