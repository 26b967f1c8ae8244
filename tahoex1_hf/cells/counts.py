# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks whether values are counts: remove rounding errors, describe other values, and find counts elsewhere."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows

# Counts that went through arithmetic are not exactly whole. A value this close to a whole number is taken for it.
# The bins of a cell depend on which of its counts are equal, so an error of 1e-6 would change all of them.
NOISE = 1e-3
# Largest relative rounding error of counts that were computed back from their logarithms in float32.
_RELATIVE_NOISE = 1e-6

# To judge a matrix, this many of its values are read, from this many places.
_VALUES, _PLACES = 65536, 16
# Names of layers that usually hold raw counts, in the order in which they are tried; "raw" also means `.raw`.
NAMED = ("counts", "raw_counts", "raw")
_WORDS = {
    "fractions": "it has values that are not whole numbers",
    "negative": "it has negative values",
    "missing": "it has missing or infinite values",
    "absent": "it is not there",
}


def near_whole(values: np.ndarray) -> np.ndarray:
    """Return a mask of the values that are whole numbers, apart from rounding errors."""
    nearest = np.rint(values)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return np.abs(values - nearest) <= np.maximum(NOISE, _RELATIVE_NOISE * np.abs(nearest))


def without_noise(rows: GeneRows) -> GeneRows:
    """Round the counts of cells in which all counts are nearly whole; leave other cells unchanged."""
    nearest = np.rint(rows.counts)
    if (nearest == rows.counts).all():
        return rows
    off = ~near_whole(rows.counts)
    lengths = np.diff(rows.offsets)
    cells = np.bincount(rows.cells(), weights=off, minlength=len(lengths)) == 0
    # If rounding would leave a cell without counts, its values are in a tiny unit and are not noise around zero.
    cells &= np.bincount(rows.cells(), weights=nearest != 0, minlength=len(lengths)) > 0
    counts = np.where(np.repeat(cells, lengths), nearest, rows.counts)
    rows = GeneRows(rows.tokens, counts, rows.offsets)
    return rows.select(counts != 0) if (counts == 0).any() else rows


# Finding counts ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The place of the counts in an AnnData.

    Attributes:
        layer: Layer, as in `GeneOptions`.
        note: Message to the user about the choice; empty if there is nothing to say.
    """

    layer: str | None
    note: str = ""


def kind_of(matrix: Any) -> str:
    """Return what a matrix seems to hold: "counts", a key of `_WORDS`, or "none" if it has no values other than 0.

    Only some of the values are read.
    """
    if matrix is None:
        return "absent"
    values = _some_values(matrix)
    if not len(values):
        return "none"
    if not np.isfinite(values).all():
        return "missing"
    if values.min() < -NOISE:
        return "negative"
    return "counts" if near_whole(values).all() else "fractions"


def _some_values(matrix: Any) -> np.ndarray:
    """Return some of the non-zero values of a matrix as float64, from evenly spaced places."""
    group = getattr(matrix, "group", None)  # a sparse matrix on disk
    data = group["data"] if group is not None else matrix.data if hasattr(matrix, "tocsr") else None
    if data is not None:
        parts = [np.asarray(data[start:stop]) for start, stop in _stretches(data.shape[0], _VALUES)]
    else:
        rows = _stretches(matrix.shape[0], max(_PLACES, _VALUES // max(1, matrix.shape[1])))
        parts = [_dense_values(in_memory(matrix[start:stop])) for start, stop in rows]
    values = np.concatenate([np.zeros(0), *(part.astype(np.float64) for part in parts)])
    return values[values != 0]


def _dense_values(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.data if hasattr(matrix, "tocsr") else matrix).ravel()


def in_memory(matrix: Any) -> Any:
    """Return a matrix in memory; a dask matrix is computed."""
    return matrix.compute() if hasattr(matrix, "compute") else matrix


def _stretches(total: int, wanted: int, places: int = _PLACES) -> Iterator[tuple[int, int]]:
    """Yield the bounds of evenly spaced ranges in 0..`total` that have about `wanted` elements together.

    If `total` is not larger than `wanted`, there is one range, which holds everything.
    """
    if total <= wanted:
        yield 0, total
        return
    size = -(-wanted // places)
    for start in np.linspace(0, total - size, places).astype(np.int64).tolist():
        yield start, start + size


def find_counts(adata: Any, other_counts: str) -> Place:
    """Find the counts of an AnnData if the user named no layer.

    `X` is taken if it holds counts. Otherwise the layers `counts`, `raw_counts` and `raw`, and then `.raw`, are tried
    in this order. The first that holds counts is taken, provided that the others do not hold different counts.

    Args:
        adata: AnnData, or an object with the same `X`, `layers` and `raw`.
        other_counts: As in `GeneOptions`.

    Raises:
        ValueError: If two places hold different counts, or if `other_counts` is "refuse" and counts are found
            outside `X`.
    """
    if other_counts == "leave":
        return Place(None)
    kind = kind_of(adata.X)
    if kind in ("counts", "none"):
        return Place(None)
    good = {name: matrix for name, matrix in _named(adata).items() if kind_of(matrix) == "counts"}
    if not good:
        return Place(None)
    why, first = _WORDS[kind], next(iter(good))
    others = [name for name in good if name != first and not _same(adata, first, name)]
    if others or other_counts == "refuse":
        places = " and ".join(_said(name, adata) for name in [first, *others]) + (" hold" if others else " holds")
        differ = ", which are not the same" if others else ""
        raise ValueError(
            f"X holds no counts ({why}); {places} some{differ}. Choose one with layer= (--layer): "
            f"{' or '.join(repr(name) for name in [first, *others])}."
        )
    return Place(first, f"X holds no counts ({why}): the counts in {_said(first, adata)} are used.")


def _named(adata: Any) -> dict[str, Any]:
    """Return the matrices other than X whose names say that they hold raw counts, in order."""
    found = {name: adata.layers[name] for name in NAMED if name in adata.layers}
    if "raw" not in found and adata.raw is not None:
        found["raw"] = adata.raw.X
    return found


def _said(name: str, adata: Any) -> str:
    return "raw" if name == "raw" and "raw" not in adata.layers else f'layer="{name}"'


def _same(adata: Any, one: str, other: str) -> bool:
    """Return whether two places seem to hold the same counts of the same genes; only some counts are compared."""
    raw = [name == "raw" and "raw" not in adata.layers for name in (one, other)]
    first, second = (_named(adata)[name] for name in (one, other))
    genes = [[str(gene) for gene in (adata.raw if from_raw else adata).var_names] for from_raw in raw]
    if genes[0] != genes[1] or first.shape != second.shape:
        return False
    if any(hasattr(each, "group") and each.format == "csc" for each in (first, second)):
        # The first rows of a CSC matrix are spread over the whole file.
        return np.array_equal(_some_values(first), _some_values(second))
    rows = [in_memory(each[:8]) for each in (first, second)]
    dense = [each.toarray() if hasattr(each, "toarray") else np.asarray(each) for each in rows]
    return np.array_equal(dense[0], dense[1])


def counts_elsewhere(adata: Any, layer: str | None) -> str:
    """Return advice for an error message: the other places of an AnnData that hold whole numbers.

    Args:
        adata: AnnData, or an object with the same `X`, `layers` and `raw`.
        layer: Layer that was used; None for `X`.
    """
    places = {name: adata.layers[name] for name in adata.layers if name is not None}  # None is X since anndata 0.13
    if "raw" not in places and adata.raw is not None:
        places["raw"] = adata.raw.X
    good = [_said(name, adata) for name, matrix in places.items() if name != layer and kind_of(matrix) == "counts"]
    if layer is not None and kind_of(adata.X) == "counts":
        good.append("X (leave out layer=)")
    if not good:
        return " Pass the raw counts; neither a layer nor raw has whole numbers."
    return f" Raw counts seem to be in {' and in '.join(good)}: choose them with layer= (--layer)."


# Describing other values ------------------------------------------------------------------------------

# Cells with fewer genes than this are not judged, and fewer cells than this prove nothing.
_FEW_GENES, _FEW_CELLS = 100, 5


def doubt(values: np.ndarray, offsets: np.ndarray) -> str | None:
    """Describe the values of some cells if they do not look like counts; return None if they do.

    Args:
        values: `(total,)` values above zero of all cells, one cell after the other.
        offsets: `(cells + 1,)` positions at which the cells begin and end.
    """
    lengths = np.diff(offsets)
    offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64)
    if len(offsets) == 1:
        return None
    values = values.astype(np.float64)
    if near_whole(values).all():
        return _odd_counts(np.rint(values), offsets)
    return f"the values are not integers{_looks(values, offsets)}. The models were trained on raw counts."


def _odd_counts(values: np.ndarray, offsets: np.ndarray) -> str | None:
    starts, lengths = offsets[:-1], np.diff(offsets)
    large = lengths >= _FEW_GENES
    if large.sum() < _FEW_CELLS:
        return None
    least, most = np.minimum.reduceat(values, starts)[large], np.maximum.reduceat(values, starts)[large]
    sums, genes = np.add.reduceat(values, starts)[large], int(np.median(lengths[large]))
    if most.max() == 1:
        return f"all values are 1 ({genes} genes per cell): they say which genes are expressed, and are not counts."
    if genes >= 1000 and most.max() <= 10:
        return f"no count is above {most.max():.0f}, with {genes} genes per cell: values look like rounded logarithms."
    # About half of the expressed genes of a cell, or more, have a count of 1, unless all counts were multiplied.
    if (least >= 2).mean() >= 0.9:
        same = f" and all cells have nearly the same sum, {sums.mean():.0f}" if sums.std() < 0.01 * sums.mean() else ""
        return f"hardly any cell ({genes} genes) has a count of 1{same}: the values look normalised and rounded."
    return None


def _looks(values: np.ndarray, offsets: np.ndarray) -> str:
    """Describe how values that are not whole were computed, or return "" if that cannot be recognised.

    A known computation turns each count k into f(k * s), where the scale s is the same for all genes of a cell.
    """
    starts = offsets[:-1]
    undone: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        " and look normalised, without logarithm": lambda x: x,
        " and look log-normalised": np.expm1,
        " and look log-normalised (to base 2)": lambda x: np.exp2(x) - 1,
        " and look log-normalised (to base 10)": lambda x: 10.0**x - 1,
        " and look like square roots of counts": np.square,
    }
    for looks, undo in undone.items():
        with np.errstate(over="ignore", invalid="ignore"):
            raw = undo(values)
            sums = np.add.reduceat(raw, starts)
        # Equal sums of all cells are evidence if they appear only after the logarithm is undone.
        same_sum = "log-" in looks and len(sums) > 1 and sums.max() < np.inf and sums.std() < 0.01 * sums.mean()
        if same_sum or _are_multiples(raw, offsets):
            return looks
    return ""


def _are_multiples(values: np.ndarray, offsets: np.ndarray) -> bool:
    """Return whether, in most cells, the small values are whole multiples of the smallest value."""
    least = np.minimum.reduceat(values, offsets[:-1])
    cells = np.repeat(np.arange(len(least)), np.diff(offsets))
    with np.errstate(over="ignore", invalid="ignore"):
        ratios = values / least[cells]
    tried = (ratios > 1.01) & (ratios < 40)
    near = tried & (np.abs(ratios - np.rint(ratios)) < 0.01)
    number = np.bincount(cells[tried], minlength=len(least))
    hits = np.bincount(cells[near], minlength=len(least))
    judged = number >= 5
    return bool(judged.any() and (hits[judged] >= 0.9 * number[judged]).mean() > 0.6)
