"""Pretraining runs in separate processes, as a user starts them."""

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forked

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain.py"
RECIPE = ROOT / "examples" / "configs" / "pretrain" / "debug.yaml"

# A run of some seconds; dropout is off where runs are compared that divide the work differently.
TINY = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "context_length": 32,
    "eval_cells": 20,
    "eval_steps": 4,
    "global_batch_size": 8,
    "microbatch_size": 4,
    "max_steps": 8,
    "save_steps": 3,
    "logging_steps": 2,
    "baselines": False,
    "precision": '"no"',
}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "TahoeX1Layer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
HSDP = {
    **FSDP,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def command(kind: str, output: Path, dataset: Path, script: Path = SCRIPT, **changes: Any) -> list[str]:
    """Return the command as a user gives it, with the launcher unless the kind of run is "single"."""
    settings = {
        **TINY,
        "dataset": dataset,
        "output_dir": output,
        **{k.replace("__", "."): v for k, v in changes.items()},
    }
    start = [sys.executable]
    if kind != "single":
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
        start = [*launcher, "--num_processes", "2", "--main_process_port", str(free_port())]
    return [*start, str(script), str(RECIPE), *(f"{key}={value}" for key, value in settings.items())]


def environment(kind: str) -> dict[str, str]:
    return forked.environment(**{"fsdp": FSDP, "hsdp": HSDP}.get(kind, {}))


def run(
    kind: str, output: Path, dataset: Path, script: Path = SCRIPT, env: Mapping[str, str] = {}, **changes: Any
) -> subprocess.CompletedProcess[str]:
    """Run to the end, in one forked process ("single"), in two ("ddp", "fsdp"), or in two pairs ("hsdp")."""
    arguments = command("single", output, dataset, script, **changes)
    whole = {**environment(kind), **env}
    if kind == "single":
        return forked.run(arguments, whole)
    return forked.launch(4 if kind == "hsdp" else 2, arguments, whole)


def finished(kind: str, output: Path, dataset: Path, **changes: Any) -> str:
    done = run(kind, output, dataset, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def curve(output: Path) -> list[Mapping[str, float]]:
    """Return the log without the entries that depend on the clock."""
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    timed = ("per_second", "utilisation", "memory", "hours", "seconds", "train_runtime", "total_flos", "train_loss")
    lines = [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in history]
    return [line for line in lines if set(line) - {"step", "epoch"}]


def status(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "run_status.json").read_text(encoding="utf-8")))
