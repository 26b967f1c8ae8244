# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Search for the local files that folders and globs stand for."""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

# Advice about files that hold cells in other formats, by the ending of their name.
_WAYS = {
    ".loom": "read it with anndata.io.read_loom, and write it with write_h5ad",
    ".h5mu": 'write its RNA as .h5ad: mudata.read_h5mu(path)["rna"].write_h5ad(...)',
    ".h5seurat": "it is Seurat's: write it as .h5ad in R, with SeuratDisk's Convert",
    ".rds": "it is R's: write it as .h5ad there, with zellkonverter's writeH5AD",
    ".rdata": "it is R's: write it as .h5ad there, with zellkonverter's writeH5AD",
    ".csv": "read it with anndata.io.read_csv (cells in rows), and write it with write_h5ad",
    ".tsv": "read it with anndata.io.read_csv (cells in rows), and write it with write_h5ad",
    ".txt": "read it with anndata.io.read_csv (cells in rows), and write it with write_h5ad",
    ".mtx": "its barcodes.tsv and features.tsv must lie beside it, under names that begin like its own",
    ".gz": "unpack it",
    ".zip": "unpack it",
    ".tar": "unpack it",
}

ZARR_MARKS = (".zgroup", "zarr.json", ".zattrs")


def is_zarr_store(path: Path) -> bool:
    """Return whether a folder is a zarr store."""
    return path.is_dir() and any((path / mark).is_file() for mark in ZARR_MARKS)


def expand_paths(paths: Iterable[str], is_wanted: Callable[[Path], bool], what: str) -> list[str]:
    """Return the files and folders that `is_wanted` accepts: named, matched by a glob, or found in a folder.

    Args:
        paths: Files, folders (searched at any depth) and globs.
        is_wanted: Function that returns whether a path is a file of the wanted kind, or a folder that counts as one.
        what: Name of this kind, for the message.

    Returns:
        The paths, sorted and without repeats.

    Raises:
        FileNotFoundError: If a path leads to no such file.
    """
    found: set[str] = set()
    for text in paths:
        named = [text] if os.path.exists(text) else glob.glob(text, recursive=True)
        here = [hit for name in named for hit in _search(Path(name), is_wanted)]
        if not here:
            missing = "does not exist" if not named else f"holds no {what}"
            way = next((way for end, way in _WAYS.items() if text.lower().removesuffix(".gz").endswith(end)), None)
            way = _WAYS[".gz"] if way is None and text.endswith(".gz") else way
            raise FileNotFoundError(
                f"{text} {missing}: name {what}, a folder with them or a glob."
                if not named or way is None
                else f"{text} is none of {what}: {way}."
            )
        found.update(here)
    return sorted(found)


def _search(path: Path, is_wanted: Callable[[Path], bool]) -> list[str]:
    if is_wanted(path):
        return [str(path)]
    if not path.is_dir() or is_zarr_store(path):
        return []
    entries = _without_copies(sorted(entry for entry in path.iterdir() if entry.name[0] != "."))
    return [hit for entry in entries for hit in _search(entry, is_wanted)]


def _without_copies(entries: list[Path]) -> list[Path]:
    """Leave out the files that Cell Ranger writes beside its filtered matrix: all droplets, a copy, molecules."""
    stems = {entry.name.removesuffix(".h5") for entry in entries}
    kept = []
    for entry in entries:
        is_matrix = "_bc_matri" in entry.name  # a name that Cell Ranger gives; a user's raw_a.h5ad is not a copy
        filtered = re.sub(r"(^|_)raw_", r"\1filtered_", entry.name, count=1)
        if is_matrix and filtered != entry.name and filtered.removesuffix(".h5") in stems:
            why = f"{filtered.removesuffix('.h5')} lies beside it and holds the droplets that are cells"
        elif is_matrix and entry.with_name(f"{entry.name}.h5") in entries:
            why = f"{entry.name}.h5 holds the same cells"
        elif entry.name.endswith("molecule_info.h5"):
            why = "it holds molecules, not cells"
        else:
            kept.append(entry)
            continue
        logger.info("%s is left out: %s. Name it to read it.", entry, why)
    return kept
