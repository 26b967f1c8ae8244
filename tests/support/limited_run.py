"""Run examples/pretrain.py, which can write no file of more than LIMIT bytes."""

import os
import resource
import runpy
import sys
from pathlib import Path

limit = int(os.environ["LIMIT"])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
script = str(Path(__file__).parents[2] / "examples" / "pretrain.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
