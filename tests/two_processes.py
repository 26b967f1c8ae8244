"""Fine-tuning runs by two processes of torch's launcher, which talk to each other over the loopback interface."""

import subprocess
import sys
from pathlib import Path

from finetuning_runs import SCRIPT, start

from tahoex1_hf.finetuning.config import FinetuneConfig


def in_two_processes(config: FinetuneConfig) -> subprocess.CompletedProcess[str]:
    """The run of a configuration. `accelerate launch --cpu --num_processes 2` would start one process."""
    recipe = Path(config.output_dir).with_suffix(".yaml")
    config.write(recipe)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return start([*launcher, str(SCRIPT), str(recipe)])
