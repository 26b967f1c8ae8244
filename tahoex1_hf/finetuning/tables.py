# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables of metrics as text, and in words whether a model beats its baselines."""

from collections.abc import Mapping, Sequence
from typing import Any


def shown(value: Mapping[str, Any] | None) -> str:
    """An `interval` of `metrics.py`."""
    if value is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def beats(differences: Mapping[str, Mapping[str, Any]], ours: str, metric: str, higher: bool) -> str:
    """Which baselines a model beats, and which it does not.

    Args:
        differences: baseline -> `interval` of ours minus its, over folds or conditions.
        ours: name of the model.
        metric: name of what is compared.
        higher: whether more is better.
    """
    said = []
    for name, difference in differences.items():
        gain = difference["mean"] if higher else -difference["mean"]
        sure = ""
        if difference["low"] is not None:
            inside = difference["low"] <= 0 <= difference["high"]
            sure = f", 95 % interval {difference['low']:+.3f} to {difference['high']:+.3f}"
            sure += ": the difference may be chance" if inside else ""
        verb = "beats" if gain > 0 else "does not beat"
        said.append(f"- {ours} {verb} {name} by {metric} ({difference['mean']:+.3f}{sure}).")
    return "\n".join(said)
