"""Fine-tuning runs by processes of torch's launcher, which talk to one another over the loopback interface."""

import subprocess
import sys
from pathlib import Path

from finetuning_runs import SCRIPT, start

from tahoex1_hf.finetuning.config import FinetuneConfig


def in_processes(config: FinetuneConfig, number: int) -> subprocess.CompletedProcess[str]:
    """The run of a configuration. `accelerate launch --cpu --num_processes 2` would start one process."""
    recipe = Path(config.output_dir).with_suffix(".yaml")
    config.write(recipe)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    return start([*launcher, str(SCRIPT), str(recipe)])
