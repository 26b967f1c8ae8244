"""Run killed_run.py with a disk so slow that a checkpoint is written when two more steps have been begun."""

import os
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

from tahoex1_hf.training import trainer

original_write, original_clip = FileSystemWriter.write_data, trainer.PretrainingTrainer._clip_grad_norm
begun, changed = [0], threading.Condition()


def held(self: Any, *arguments: Any) -> Any:
    step = int(Path(self.path).parent.name.rpartition("-")[2])
    with changed:
        if not changed.wait_for(lambda: begun[0] >= step + 2, timeout=600):
            os._exit(3)  # nothing was trained meanwhile
    return original_write(self, *arguments)


def counting(self: trainer.PretrainingTrainer, model: Any) -> Any:
    norm = original_clip(self, model)
    with changed:
        begun[0] = self.state.global_step + 1
        changed.notify_all()
    return norm


FileSystemWriter.write_data = held  # type: ignore[method-assign]
trainer.PretrainingTrainer._clip_grad_norm = counting  # type: ignore[method-assign]
script = str(Path(__file__).with_name("killed_run.py"))
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
