"""Run examples/pretrain.py, which gets KILL_SIGNAL in step KILL_AT, in process KILL_RANK; not after a restart."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from tahoex1_hf.training import trainer

original = trainer.PretrainingTrainer._clip_grad_norm


def dying(self: trainer.PretrainingTrainer, model: Any) -> Any:
    step, rank = self.state.global_step + 1, self.args.process_index
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if (str(step), str(rank)) == (os.environ["KILL_AT"], os.environ["KILL_RANK"]) and not restarted:
        os.kill(os.getpid(), getattr(signal, os.environ["KILL_SIGNAL"]))
    return original(self, model)


trainer.PretrainingTrainer._clip_grad_norm = dying
script = str(Path(__file__).parents[2] / "examples" / "pretrain.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
