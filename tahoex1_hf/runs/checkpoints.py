# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find, seal and remove the checkpoints of a run.

A checkpoint is many files of many processes. The last thing written is a list of all files and their sizes: a folder
without it, or with other files, was cut short and is never resumed from.
"""

import json
import logging
import re
import shutil
from pathlib import Path

from tahoex1_hf.common.files import sync, write_json

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders of all checkpoints, whole or not, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.search(path.name))]
    return [path for _, path in sorted(found)]


def seal(folder: Path) -> None:
    """Write the list of a checkpoint's files, which declares it whole."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_json(folder / COMPLETE, {"files": sizes})


def is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint is there, with the size that it had."""
    try:
        sizes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def last_whole(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that can be resumed from, or None."""
    for folder in reversed(checkpoints(output_dir)):
        if is_whole(folder):
            return folder
        logger.warning("%s was cut short while it was written: it is not resumed from.", folder)
    return None


def remove_old(output_dir: Path, limit: int, best: Path | None = None) -> None:
    """Remove old checkpoints, and all that were cut short.

    Args:
        output_dir: Folder of the run.
        limit: Number of whole checkpoints to keep, at least 1. The newest always stays.
        best: A checkpoint that stays however old it is; it counts as one of `limit`, unless that is 1.
    """
    whole = []
    for folder in checkpoints(output_dir):
        if is_whole(folder):
            whole.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    kept = whole[-1:] + [folder for folder in whole[:-1] if best is not None and folder.name == best.name]
    for folder in reversed(whole):
        if len(kept) >= limit:
            break
        if folder not in kept:
            kept.append(folder)
    for folder in whole:
        if folder not in kept:
            # The list of files goes first, so that an interrupted removal does not leave an apparent checkpoint.
            (folder / COMPLETE).unlink()
            shutil.rmtree(folder)
