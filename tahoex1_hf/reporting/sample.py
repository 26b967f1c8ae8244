# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The cells of a page: a random sample of a file's, which a run keeps in its folder so that it can be resumed."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tahoex1_hf.cells.fingerprint import agrees, content_fingerprint
from tahoex1_hf.cells.whole import read_sample
from tahoex1_hf.common.files import WholeFile, write_json

if TYPE_CHECKING:
    from anndata import AnnData


@contextmanager
def run_folder(folder: Path, restart: bool) -> Iterator[None]:
    """Make the folder of a run, and remove it when the block ends; after an error, embeddings in it stay.

    Args:
        folder: Place of the folder.
        restart: Whether to discard what an unfinished run has left there.
    """
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if not any(folder.glob("*.parquet*")):
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@dataclass(frozen=True, eq=False)
class Sampled:
    """A sample of a file's cells.

    Attributes:
        adata: The cells, in memory.
        total: Number of cells of the file.
        path: File that holds the sample's cells and no others, which may be the file itself.
    """

    adata: "AnnData"
    total: int
    path: Path


def sampled(path: Path, most: int, seed: int, place: Path) -> Sampled:
    """Read a random sample of a file's cells; where that is not all of them, write it to a file of its own.

    Args:
        path: `.h5ad` file.
        most: Most cells.
        seed: Seed of the sample.
        place: File for the sample; one that an earlier run has written there is left as it is.
    """
    adata, total = read_sample(path, most, seed)
    if adata.n_obs == total:
        return Sampled(adata, total, path)
    record, wanted = place.with_name(f"{place.name}.json"), {"path": str(path.resolve()), "cells": most, "seed": seed}
    fingerprint = content_fingerprint(path)
    if place.exists() and record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if agrees(found.pop("fingerprint"), fingerprint) and found == wanted:
            return Sampled(adata, total, place)
    record.unlink(missing_ok=True)
    with WholeFile(place) as partial:
        _counts_alone(adata).write_h5ad(partial)
    write_json(record, {**wanted, "fingerprint": fingerprint})
    return Sampled(adata, total, place)


def _counts_alone(adata: "AnnData") -> "AnnData":
    """Return the cells with their counts and genes, without what is known of them beside."""
    from anndata import AnnData

    raw = None if adata.raw is None else {"X": adata.raw.X, "var": adata.raw.var}
    return AnnData(adata.X, obs=adata.obs[[]], var=adata.var, layers=dict(adata.layers), raw=raw)
