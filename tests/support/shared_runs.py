"""Folders that are made once and read by many tests, in any process of pytest-xdist."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Path:
    """Return the folder of this name; the first test that asks for it makes it.

    Tests must leave the folder as it is; a test that changes something copies it first.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' folders lie side by side in it
    folder, made = root / "shared" / name, root / "shared" / f"{name}.made"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a try that failed
            make(folder)
            made.touch()
    return folder


def name_of_run(kind: str, changes: dict[str, Any]) -> str:
    """Return a folder name that differs for runs with other settings."""
    settings = json.dumps(changes, sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
