"""Run examples/pretrain.py with THREADS threads; where KILL_AT is set, it is killed as by `killed_run.py`."""

import os
import runpy
from pathlib import Path

import torch

torch.set_num_threads(int(os.environ["THREADS"]))
name = "tests/support/killed_run.py" if "KILL_AT" in os.environ else "examples/pretrain.py"
runpy.run_path(str(Path(__file__).parents[2] / name), run_name="__main__")
