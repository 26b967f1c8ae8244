"""Run examples/finetune_lora.py, killed in step KILL_AT or (KILL_IN=save) while it writes the checkpoint."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from tahoex1_hf.finetuning import trainer
from tahoex1_hf.runs import checkpoints

clip, seal = trainer.FinetuneTrainer._clip_grad_norm, checkpoints.seal


def dying_step(self: trainer.FinetuneTrainer, model: Any) -> Any:
    if os.environ["KILL_IN"] == "step" and self.state.global_step + 1 == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(self, model)


def dying_seal(folder: Path) -> None:
    if os.environ["KILL_IN"] == "save" and folder.name == f"checkpoint-{os.environ['KILL_AT']}":
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder)


trainer.FinetuneTrainer._clip_grad_norm = dying_step  # type: ignore[method-assign]
checkpoints.seal = dying_seal
script = str(Path(__file__).parents[2] / "examples" / "finetune_lora.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
