# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Recognise a folder that already holds the result of a conversion, for a command that is run again."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tahoex1_hf.original.verify import MANIFEST, Verification
from tahoex1_hf.original.writing import describe_files

logger = logging.getLogger(__name__)


def finished_conversion(destination: Path, files: Mapping[str, Path], dtype: torch.dtype) -> Verification | None:
    """Return the recorded verification of a folder that is the complete conversion of exactly these files.

    Args:
        destination: Folder that the conversion is to make.
        files: Files of the source, by their name.
        dtype: Type of the weights to write.

    Returns:
        The verification; None if the folder holds anything else, or nothing.
    """
    manifest = _manifest(destination)
    if manifest is None or manifest.get("dtype") != str(dtype).removeprefix("torch."):
        return None
    written = manifest.get("files_written")
    there = {name: destination / name for name in written} if isinstance(written, dict) else {}
    if not there or not all(path.is_file() for path in there.values()):
        return None
    if manifest.get("files_read") != describe_files(files) or written != describe_files(there):
        return None
    recorded = {name: value for name, value in manifest["verification"].items() if name != "tolerance"}
    logger.info("%s is complete: nothing to do.", destination)
    return Verification(**recorded)


def _manifest(destination: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found = json.loads((destination / MANIFEST).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None
