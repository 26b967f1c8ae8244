"""Run code where the package is not installed."""

import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forked import Forked, environment
from helpers import REPO_ROOT

GUARD = f"""
import sys
sys.path = [path for path in sys.path if path and path != {str(REPO_ROOT)!r}]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
try:
    import tahoex1_hf
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported here, so this would prove nothing")
"""


def run_elsewhere(
    script: str, folder: Path, *arguments: object, as_process: bool = False, **variables: str
) -> subprocess.CompletedProcess:
    """Run a script in a Python that cannot import the package.

    It is a fork of a process that has imported torch and transformers, or `as_process` a process that starts afresh.
    `variables` are set in its environment.
    """
    env = environment(HF_HOME=str(folder / "hf_home"), **variables)
    command = [sys.executable, "-c", GUARD + textwrap.dedent(script), *map(str, arguments)]
    if as_process:
        env = {name: value for name, value in env.items() if not name.startswith("PYTHON")}
        run = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    else:
        run = Forked(command, env, folder, package=False).completed()
    assert run.returncode == 0, run.stderr
    return run


def run_isolated_fork(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, **_: Any
) -> subprocess.CompletedProcess[str]:
    """Stand for `subprocess.run` of `python -I -c SCRIPT ARGUMENTS`: run it as a fork without the package."""
    python, isolated, option, script, *arguments = command
    assert (isolated, option) == ("-I", "-c")
    homes = {name: value for name, value in env.items() if name.startswith("HF_")}
    return Forked([python, option, GUARD + script, *arguments], environment(**homes), cwd, package=False).completed()
