# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The status file of a run, for the program that started it."""

import json
from pathlib import Path
from typing import Any

from tahoex1_hf.common.files import write_json

STATUS = "run_status.json"


def write_status(output_dir: Path, status: str, **more: Any) -> None:
    """Write the status of a run, since launchers turn every exit code into 1.

    Args:
        output_dir: Folder of the run.
        status: `"running"`, `"preempted"` or `"finished"`.
        **more: Further entries: a step, metrics.
    """
    write_json(output_dir / STATUS, {"status": status, **more})


def read_status(output_dir: Path) -> dict[str, Any]:
    """Read the status of a run as it was last written; empty where there is no run."""
    try:
        return dict(json.loads((output_dir / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
