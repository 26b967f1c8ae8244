# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The manifest of a prepared dataset: check its content, and compare the shards that it lists with their digests."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT, FORMAT_VERSION = "tahoex1-dataset", 1
_KINDS = {"file": str, "cells": int, "bytes": int, "sha256": str}
_checked: set[tuple[str, int, int, str]] = set()  # shards that this process has compared with their digests


def parse_manifest(text: bytes | str) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        ValueError: If the text is not a valid manifest, or a shard is outside the dataset's folder; the message does
            not name the manifest.
    """
    manifest = json.loads(text)
    good = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    if not good or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError("its manifest.json is not that of a dataset this version can read.")
    splits = manifest.get("splits")
    if not isinstance(splits, dict) or not all(_is_split(part) for part in splits.values()):
        raise ValueError("its manifest.json is damaged: it does not list the shards of its splits.")
    for part in splits.values():
        for record in part["shards"]:
            _check_name(record["file"])
    return manifest


def _is_split(part: Any) -> bool:
    shards = part.get("shards") if isinstance(part, dict) else None
    return isinstance(shards, list) and all(_is_record(record) for record in shards)


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and all(
        type(record.get(name)) is kind and (kind is str or record[name] >= 0) for name, kind in _KINDS.items()
    )


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name or not path.name:
        raise ValueError(f"its manifest.json names a shard outside its folder: {name!r}.")


def check_local(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Compare a shard on this machine with its digest, and return its path.

    In each process, a shard is read for this only once unless the file changes.

    Args:
        folder: Folder of the dataset.
        record: Entry of the shard in the manifest.

    Raises:
        FileNotFoundError: If the shard is missing.
        ValueError: If the shard is a link that leads out of the folder, or its content differs from the manifest.
    """
    path = Path(folder) / record["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though the dataset's manifest.json lists it: copy it again.")
    if not _lies_inside(Path(folder), path):
        raise ValueError(f"{path} is a link that leads out of the dataset's folder: copy the file to its place.")
    state = path.stat()
    key = (str(path.absolute()), state.st_size, state.st_mtime_ns, record["sha256"])
    if key in _checked:
        return path
    if state.st_size == record["bytes"]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if state.st_size != record["bytes"] or digest != record["sha256"]:
        raise ValueError(
            f"{path} is damaged, or not the shard that the dataset's manifest.json lists (size or sha256): copy it "
            "again, or prepare the dataset again."
        )
    _checked.add(key)
    return path


def _lies_inside(folder: Path, path: Path) -> bool:
    """Return whether a file is in a folder after following links; the Hub's cache may link to its own blobs."""
    target, roots = path.resolve(), [folder.resolve()]
    parts = folder.absolute().parts
    if "snapshots" in parts:
        roots.append(Path(*parts[: parts.index("snapshots")], "blobs").resolve())
    return any(target.is_relative_to(root) for root in roots)
