"""Fine-tuning runs in separate processes: several that talk to one another, and one that is killed."""

import signal
import subprocess
import sys
from pathlib import Path

import forked
import torch
from finetuning_runs import ROOT, SCRIPT, start
from safetensors.torch import load_file

from tahoex1_hf.finetuning.config import FinetuneConfig


def in_processes(config: FinetuneConfig, number: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a configuration in several processes that find one another."""
    recipe = Path(config.output_dir).with_suffix(".yaml")
    config.write(recipe)
    return forked.launch(number, [sys.executable, str(SCRIPT), str(recipe), *options], forked.environment())


def check_that_a_killed_run_resumes(config: FinetuneConfig, whole: FinetuneConfig, step: int) -> None:
    """Kill the run of a configuration in a step, start it again, and compare it with a whole one bit for bit."""
    recipe = Path(config.output_dir).with_suffix(".yaml")
    config.write(recipe)
    killer = [sys.executable, str(ROOT / "tests" / "support" / "killed_finetuning.py"), str(recipe)]
    killed = start(killer, KILL_IN="step", KILL_AT=str(step))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert sorted(Path(config.output_dir).rglob("checkpoint-*/complete.json"))  # there is a checkpoint to resume from
    runs = [start([sys.executable, str(SCRIPT), str(recipe)]), in_processes(whole, 1)]
    for done in runs:
        assert done.returncode == 0, done.stderr[-2000:]
    assert "checkpoint-" in runs[0].stderr
    weights = [load_file(Path(run.output_dir) / "adapter_model.safetensors") for run in (config, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
