# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What is evaluated: models, untrained twins, simple baselines, and files with embeddings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.hub.adapter_weights import ADAPTER_CONFIG
from tahoex1_hf.hub.loading import find_model

BASELINES = ("pca", "random", "expression")
CEILING = "ceiling"  # the reliability of the truth, which no baseline is
# Baselines of some tasks, with their names: of cells with batches, and of dependencies of cell lines.
MORE_BASELINES = {"harmony": "Harmony", "mean": "mean of the training lines"}
_FILES = (".h5ad", ".npz", ".parquet")
_NAME = re.compile(r"[\w][\w .+-]*")


@dataclass(frozen=True)
class Source:
    """A source of embeddings.

    Attributes:
        name: Name in the tables.
        kind: `model`, `untrained`, `file`, `projected` (PCA of other cells), one of `BASELINES` and
            `MORE_BASELINES`, or what a task adds.
        what: Folder or Hub name of the model, or path of the file or of the other cells; for PCA, the model to whose
            genes it is kept, or empty for PCA of all cells' genes.
        key: Slot of `obsm` or `varm` in an `.h5ad` file.
    """

    name: str
    kind: str
    what: str = ""
    key: str = ""

    @property
    def simple(self) -> bool:
        """Whether it is a simple baseline, which a model has to beat."""
        return self.kind not in ("model", "file", CEILING)

    def fingerprint(self) -> str:
        """Return a text that changes with the content of the model or file; empty for baselines without one.

        Raises:
            FileNotFoundError: If there is no such model or file.
        """
        if not self.what:
            return ""
        is_file = self.kind in ("file", "projected")
        return content_fingerprint(Path(self.what) if is_file else model_folder(self.what))


def model_folder(model: str) -> Path:
    """Return the folder of a model or adapter, in the cache of the Hub if it is one of the Hub's."""
    return Path(model) if (Path(model) / ADAPTER_CONFIG).is_file() else find_model(model)


def read_sources(texts: Sequence[str], more: Sequence[str] = ()) -> list[Source]:
    """Read sources that are written as `NAME=WHAT`.

    Args:
        texts: Sources; WHAT is `pca`, `random`, `expression`, `untrained:MODEL`, `projected:CELLS.h5ad`, a file with
            embeddings (`FILE.h5ad:KEY`, `FILE.npz`, `FILE.parquet`), or the folder or Hub name of a model or adapter.
        more: Baselines of `MORE_BASELINES` that the task has.

    Raises:
        ValueError: For a source that is written otherwise, or a name that is there twice.
    """
    found: list[Source] = []
    for text in texts:
        name, equals, what = text.partition("=")
        if not (equals and what and _NAME.fullmatch(name)):
            raise ValueError(f"--source {text}: write NAME=WHAT, where NAME has letters, digits, spaces, +, - and _.")
        found.append(Source(name, what) if what in more else _source(name, what))
    return with_baselines(found, more)


def _source(name: str, what: str) -> Source:
    path, colon, key = what.rpartition(":")
    if what in BASELINES:
        return Source(name, what)
    if what.startswith("untrained:"):
        return Source(name, "untrained", what.removeprefix("untrained:"))
    if what.startswith("projected:"):
        return Source(name, "projected", what.removeprefix("projected:"))
    if colon and path.endswith(".h5ad"):
        return Source(name, "file", path, key)
    if what.endswith(".h5ad"):
        raise ValueError(f"--source {name}={what}: name the slot of obsm or varm, as in {what}:X_scvi.")
    return Source(name, "file" if what.endswith(_FILES) else "model", what)


def with_baselines(sources: Sequence[Source], more: Sequence[str] = ()) -> list[Source]:
    """Add the baselines that are not among the sources, since without them a score says nothing about a model.

    These are PCA, random numbers and expression, and for each model its untrained twin and PCA on the genes that it
    knows: without the last, a good choice of genes passes for a good model.
    """
    every = list(sources)
    for kind in (*BASELINES, *more):
        if not any(source.kind == kind and not source.what for source in every):
            every.append(Source({"pca": "PCA", **MORE_BASELINES}.get(kind, kind), kind))
    for source in sources:
        if source.kind != "model":
            continue
        if not any(each.kind == "untrained" and each.what == source.what for each in every):
            every.append(Source(f"{source.name} untrained", "untrained", source.what))
        if not any(each.kind == "pca" and each.what == source.what for each in every):
            every.append(Source(f"PCA on {source.name} genes", "pca", source.what))
    names = [source.name for source in every]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--source: {', '.join(twice)} is there twice; baselines that are not named are added by it.")
    return every
