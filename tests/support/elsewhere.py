"""Run code where the package is not installed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from helpers import REPO_ROOT


def run_elsewhere(script: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script in a Python that cannot import the package."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    guard = f"""
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
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(guard) + textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run
