"""Folders that are made once and read by many tests, whichever process of pytest-xdist runs them."""

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
    """Return the folder of this name, which the first test that asks for it has made.

    Tests must leave it as it is; one that changes something copies it before.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' folders lie side by side in it
    folder, made = root / "shared" / name, root / "shared" / f"{name}.made"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
            make(folder)
            made.touch()
    return folder


def name_of_run(kind: str, changes: dict[str, Any]) -> str:
    """Return a folder name that tells runs of other settings apart."""
    settings = json.dumps(changes, sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
