# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What an annotation adds to the query: columns of obs, probabilities and embeddings in obsm, a record in uns."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.annotation.labels import UNKNOWN_NAME
from tahoex1_hf.cells.readers.stores import writable_group
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.inference.h5ad_columns import add_to_column_order
from tahoex1_hf.inference.provenance import provenance_key

if TYPE_CHECKING:
    from anndata import AnnData

    from tahoex1_hf.annotation.methods import Votes

logger = logging.getLogger(__name__)


def check_column(label: str) -> str:
    """Return the name of the column of obs that annotation writes; raise ValueError where no file can have it."""
    if not label or "/" in label:
        raise ValueError(
            f"label={label!r}: .h5ad files take a slash for a folder. Copy the column to a name without one."
        )
    return f"tahoex1_{label}"


@dataclass(frozen=True, eq=False)
class Slots:
    """Everything that is added to the query.

    Attributes:
        obs: Column of obs -> its values, `(cells,)`.
        obsm: Slot of obsm -> its values, `(cells, width)`.
        uns: Slot of uns -> its record.
    """

    obs: dict[str, Any]
    obsm: dict[str, np.ndarray]
    uns: dict[str, dict[str, Any]]


def make_slots(
    column: str,
    classes: list[str],
    called: np.ndarray,
    probabilities: np.ndarray,
    distance: np.ndarray,
    facts: dict[str, Any],
    embeddings: tuple[str, np.ndarray, dict[str, Any]] | None,
    names: list[str] | None = None,
    classified: "Votes | None" = None,
) -> Slots:
    """Return what is added to the query.

    Args:
        column: Name of the column of the labels; the others begin with it.
        classes: Names of the classes.
        called: Class numbers, -1 for unknown, `(cells,)`.
        probabilities: Probability of each class, `(cells, classes)`.
        distance: Mean distance to the neighbours, `(cells,)`.
        facts: Record of how the labels were made.
        embeddings: Slot of obsm, embeddings, and the record of how they were made; None if the query has them.
        names: Names of the classes of a fine-tuned classifier; None where there is none.
        classified: What it says of the cells.
    """
    import pandas as pd

    obsm = {f"{column}_probabilities": probabilities}
    uns = {column: {"classes": np.array(classes, dtype=object), **facts}}
    if embeddings is not None:
        key, values, record = embeddings
        obsm[key], uns[provenance_key(key)] = values, record
    numbers = np.where(called < 0, len(classes), called)
    best = probabilities.argmax(1)
    further = {}
    if names is not None and classified is not None:
        said = classified.probabilities
        further[f"{column}_classifier"] = pd.Categorical.from_codes(said.argmax(1), categories=names)
        further[f"{column}_classifier_probability"] = said.max(1)
    return Slots(
        obs={
            column: pd.Categorical.from_codes(numbers, categories=[*classes, UNKNOWN_NAME]),
            f"{column}_nearest": pd.Categorical.from_codes(best, categories=classes),
            f"{column}_probability": probabilities.max(1).astype(np.float32),
            f"{column}_distance": distance.astype(np.float32),
            **further,
        },
        obsm=obsm,
        uns=uns,
    )


def add_to_anndata(adata: "AnnData", slots: Slots) -> None:
    """Add the slots to an AnnData in memory."""
    for name, values in slots.obs.items():
        adata.obs[name] = values
    for name, values in slots.obsm.items():
        adata.obsm[name] = np.array(values)
    adata.uns.update(slots.uns)


def write_copy(source: Path, output: Path, slots: Slots) -> None:
    """Write a copy of an `.h5ad` file with the slots added; it appears when it is complete."""
    import h5py
    from anndata.io import write_elem

    with WholeFile(output) as partial:
        shutil.copyfile(source, partial)
        with h5py.File(partial, "r+") as file:
            for name, values in slots.obs.items():
                _write(write_elem, output, add_to_column_order(file, name), name, values)
            for name, values in slots.obsm.items():
                _write(write_elem, output, writable_group(file, "obsm"), name, np.asarray(values))
            for name, record in slots.uns.items():
                _write(write_elem, output, writable_group(file, "uns"), name, record)


def _write(write_elem: Any, output: Path, group: Any, name: str, value: Any) -> None:
    if name in group:
        logger.warning("%s has %s[%r], which is replaced in the output.", output, group.name[1:], name)
        del group[name]
    write_elem(group, name, value)
