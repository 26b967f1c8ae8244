# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Labels and groups from columns of obs or of a table of genes, and the checks that they can be learnt."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.texts import MISSING
from tahoex1_hf.finetuning.config import ClassesConfig

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# A column of numbers with more distinct values than this is a quantity, not a set of classes.
MAX_NUMERIC_CLASSES = 50


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of the cells that have one.

    Attributes:
        rows: Row numbers in the file, rising, shape `(labelled,)`.
        values: Class numbers (int64), or numbers (float64), shape `(labelled,)`.
        classes: Names of the classes; None for numbers.
    """

    rows: np.ndarray
    values: np.ndarray
    classes: list[str] | None


def class_labels(column: "pd.Series", config: ClassesConfig, of: str = "cells") -> Labels:
    """Return the classes of cells or genes (`of`); rows without a class are left out with a warning.

    Raises:
        ValueError: For a column that is constant, empty, or holds measurements; for a class with too few rows.
    """
    rows = _labelled(column, config.label, of)
    values = column.iloc[rows]
    _check_not_measured(values, config.label)
    names = _class_names(values)
    kinds, codes, counts = np.unique(names, return_inverse=True, return_counts=True)
    rare = kinds[counts < config.min_class_cells]
    if len(rare):
        listed = ", ".join(f"{kind} ({count})" for kind, count in zip(kinds, counts, strict=True) if kind in rare[:5])
        if config.rare_classes == "error":
            raise ValueError(
                f"label={config.label}: {len(rare)} classes have fewer than {config.min_class_cells} {of}: {listed}. "
                "They cannot be both learnt and tested: merge them with others, or set rare_classes=drop to leave "
                f"their {of} out."
            )
        keep = ~np.isin(names, rare)
        logger.warning(
            "%d %s of %d rare classes are left out: %s%s.",
            (~keep).sum(),
            of,
            len(rare),
            listed,
            ", ..." if len(rare) > 5 else "",
        )
        rows, names = rows[keep], names[keep]
        kinds, codes = np.unique(names, return_inverse=True)
    if len(kinds) < 2:
        raise ValueError(
            f"label={config.label} has the one value {', '.join(map(repr, kinds)) or 'none'}: there is nothing to "
            "tell apart. Choose a column with two classes or more."
        )
    _tell_of_alike(kinds, config.label)
    order = _sorted_classes(kinds)
    return Labels(rows, np.argsort(order)[codes], [str(kind) for kind in kinds[order]])


def _tell_of_alike(kinds: np.ndarray, label: str | None) -> None:
    """Warn of classes whose names differ in blanks or case alone, which hardly anyone means."""
    spellings: dict[str, list[str]] = {}
    for kind in map(str, kinds):
        spellings.setdefault(" ".join(kind.split()).casefold(), []).append(kind)
    alike = ["/".join(map(repr, names)) for names in spellings.values() if len(names) > 1]
    if alike:
        logger.warning(
            "label=%s: %s are taken for classes of their own, though they differ in blanks or case alone.",
            label,
            ", ".join(alike[:5]) + (", ..." if len(alike) > 5 else ""),
        )


def number_labels(column: "pd.Series", label: str) -> Labels:
    """Return the numbers of the cells; cells without one are left out with a warning.

    Raises:
        ValueError: For a column that is constant or empty, or holds a value that is not a finite number.
    """
    import pandas as pd

    rows = _labelled(column, label, "cells")
    values = column.iloc[rows].astype(object)
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64)
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        example = values.iloc[int(np.flatnonzero(wrong)[0])]
        raise ValueError(
            f"label={label}: {wrong.sum()} values are not finite numbers, {example!r} for one. Choose a column "
            "of numbers, or task=classification."
        )
    if len(np.unique(numbers)) < 2:
        raise ValueError(f"label={label} is {numbers[0]:g} in all cells: there is nothing to predict.")
    return Labels(rows, numbers, None)


def group_names(column: "pd.Series", rows: np.ndarray, name: str, of: str = "cells") -> np.ndarray:
    """Return the groups of some rows as text, shape `(rows,)`.

    Raises:
        ValueError: For cells or genes (`of`) without a group.
    """
    groups = column.iloc[rows].astype(object)
    missing = groups.isna().to_numpy() | np.isin(groups.astype(str).to_numpy(), MISSING)
    if missing.any():
        raise ValueError(
            f"group={name}: {missing.sum()} {of} have none, and may belong to any: fill the column in, or remove them."
        )
    return groups.astype(str).to_numpy(dtype=object)


def _labelled(column: "pd.Series", name: str | None, of: str) -> np.ndarray:
    text = column.astype(object)
    missing = text.isna().to_numpy() | np.isin(text.astype(str).to_numpy(), MISSING)
    if missing.all():
        raise ValueError(f"label={name} is empty: none of the {of} has a label.")
    if missing.any():
        logger.warning("%d of %d %s have no %s and are left out.", missing.sum(), len(missing), of, name)
    return np.flatnonzero(~missing)


def _check_not_measured(values: "pd.Series", name: str | None) -> None:
    """Raise ValueError where the labels are measurements; classes may be numbers too, but whole and few."""
    plain: Any = values.astype(object).to_numpy()
    if not all(isinstance(value, (int, float, np.integer, np.floating)) for value in plain):
        return
    numbers = plain.astype(np.float64)
    distinct = len(np.unique(numbers))
    broken = bool((numbers != np.floor(numbers)).any())
    if broken or distinct > MAX_NUMERIC_CLASSES:
        raise ValueError(
            f"label={name} holds numbers with {distinct} distinct values{' and decimals' if broken else ''}, not "
            "classes: set task=regression, or write classes (text) into another column."
        )


def _class_names(values: "pd.Series") -> np.ndarray:
    """Return names as text; whole floats lose their `.0`, since numbered classes are floats where some are missing."""
    names = [str(int(v)) if isinstance(v, (float, np.floating)) else str(v) for v in values.astype(object)]
    return np.array(names, dtype=object)


def _sorted_classes(kinds: np.ndarray) -> np.ndarray:
    """Return the order of the classes: by number where all are numbers, else by name."""
    try:
        return np.argsort(np.array([float(kind) for kind in kinds]), kind="stable")
    except ValueError:
        return np.argsort(kinds.astype(str), kind="stable")
