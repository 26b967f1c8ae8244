"""Run examples/pretrain.py. The process that loads an export without the package is a fork of FORK_SERVER's."""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
from elsewhere import run_isolated_fork

from tahoex1_hf.hub import isolated_load

forked._server = forked.ForkServer(str(Path(os.environ["FORK_SERVER"]).parent))
isolated_load.subprocess = SimpleNamespace(run=run_isolated_fork)  # type: ignore[attr-defined]
script = str(Path(__file__).parents[2] / "examples" / "pretrain.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
