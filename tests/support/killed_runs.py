"""Pretraining runs that are killed."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from training_runs import run

KILLED = Path(__file__).with_name("killed_run.py")
HELD = Path(__file__).with_name("held_saves_run.py")


def killed(
    kind: str,
    output: Path,
    training_dataset: Path,
    signal: str,
    step: int,
    rank: int = 0,
    script: Path = KILLED,
    **changes: Any,
) -> int:
    kill = {"KILL_AT": str(step), "KILL_SIGNAL": signal, "KILL_RANK": str(rank)}
    done = run(kind, output, training_dataset, script, kill, **changes)
    assert done.returncode != 0, done.stderr[-2000:]
    return done.returncode


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
