# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: the identity of the run, and the results of its folds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState

from tahoex1_hf.cells.fingerprint import agrees
from tahoex1_hf.common.files import write_json
from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.finetuning.splits import Split

RESOLVED = "config.resolved.yaml"
DATA = "data.json"
RESULT, ARRAYS = "result.json", "result.npz"  # files of a fold; the first is written last
_MAY_DIFFER = {"output_dir", "report"}  # keys that decide nothing about the weights


def open_run(config: FinetuneConfig, first: bool) -> None:
    """Make the folder of a run, or check that the one that is there belongs to it.

    Args:
        config: Configuration of the run.
        first: Whether this is the main process; the others have nothing to do.

    Raises:
        ValueError: If the folder holds a run with other settings.
    """
    if not first:
        return
    output_dir = Path(config.output_dir)
    earlier = output_dir / RESOLVED
    if earlier.is_file() and has_begun(output_dir):
        changed = changed_settings(config, yaml.safe_load(earlier.read_text(encoding="utf-8")))
        if changed:
            raise ValueError(
                f"output_dir={config.output_dir} holds a run with another {', '.join(changed)}: choose another "
                "folder, or remove it."
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    config.write(earlier)


def changed_settings(config: FinetuneConfig, before: dict[str, Any]) -> list[str]:
    """Return the keys of a configuration whose values differ from those that a run began with.

    Args:
        config: Configuration given now.
        before: Content of the run's `config.resolved.yaml`. Keys of other tasks, which version 0.1 wrote too, do not
            count; a key that is missing is at its default.
    """
    now, fields = config.model_dump(mode="json"), type(config).model_fields
    return sorted(
        name for name in now if name not in _MAY_DIFFER and before.get(name, fields[name].default) != now[name]
    )


def has_begun(output_dir: Path) -> bool:
    """Return whether a folder holds anything that a run could resume from."""
    return any(any(output_dir.glob(pattern)) for pattern in ("checkpoint-*", "folds", RESULT))


def check_data(config: FinetuneConfig, cells: FinetuningData, processes: PartialState) -> None:
    """Check that the run began with the same cells, and note them where it begins.

    Raises:
        ValueError: If the file has changed since.
    """
    folder = Path(config.output_dir)
    path = folder / DATA
    here: dict[str, Any] = {"fingerprint": cells.fingerprint, "cells": len(cells)}
    begun = path.is_file() and has_begun(folder)
    before = json.loads(path.read_text(encoding="utf-8")) if begun else here
    if before["cells"] != here["cells"] or not agrees(before["fingerprint"], cells.fingerprint):
        raise ValueError(f"data={config.data} has changed since the run in {folder} began: choose another folder.")
    processes.wait_for_everyone()
    if processes.is_main_process:
        write_json(path, here)


def write_result(folder: Path, split: Split, facts: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write the arrays and facts of a fold, with the rows of its parts. The facts are written last."""
    folder.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {**arrays, **split.parts()}
    np.savez(folder / ARRAYS, **everything)
    write_json(folder / RESULT, facts)


def read_result(folder: Path, split: Split) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Read the arrays and facts of a fold; None where it is not done.

    Raises:
        ValueError: If the folder holds the result of another split.
    """
    if not (folder / RESULT).is_file():
        return None
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        if not all(np.array_equal(arrays[part], rows) for part, rows in split.parts().items()):
            raise ValueError(f"{folder} holds the result of another split: choose another output_dir, or remove it.")
        return dict(arrays), json.loads((folder / RESULT).read_text(encoding="utf-8"))


def discard_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a fold that is done."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
