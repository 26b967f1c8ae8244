# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Short names for files and models in outputs, since the paths of one machine mean nothing on another."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the base name of each path, with as many parent folders as are needed to tell equal names apart.

    Addresses (`s3://bucket/cells.h5ad`) stay as they are.
    """
    parts = [[path] if "://" in path else list(PurePath(path).parts)[::-1] for path in paths]
    lengths = [1] * len(paths)
    while True:
        names = ["/".join(part[:length][::-1]) for part, length in zip(parts, lengths, strict=True)]
        owners = Counter(name for name, _ in set(zip(names, paths, strict=True)))
        longer = [
            min(length + 1, len(part)) if owners[name] > 1 else length
            for name, length, part in zip(names, lengths, parts, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def public_name(path: str) -> str:
    """Return the base name of a path of this machine, `owner/name` of one in the Hub's cache, or any other text."""
    if "://" in path:
        return path
    for part in reversed(PurePath(path).parts):
        if part.startswith(("models--", "datasets--")):
            return "/".join(part.split("--")[1:])
    return Path(path).name if os.path.isabs(path) or os.path.exists(path) else path
