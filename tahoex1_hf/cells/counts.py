# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether values are counts: rounding errors on them, what other values look like, and where counts may be instead."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import GeneRows

# Counts that went through arithmetic are not quite whole; a value this near to a whole number is one. The bins of a
# cell depend on which counts are equal, so that an error of 1e-6 would move them all.
NOISE = 1e-3
# Largest rounding error of float32 relative to a value, of counts that were recovered from logarithms.
_RELATIVE_NOISE = 1e-6

# A matrix is judged by this many of its values, taken from this many places.
_VALUES, _PLACES = 65536, 16
# Layers that hold raw counts by their names, in the order in which they are looked at; "raw" is also `.raw`.
NAMED = ("counts", "raw_counts", "raw")
_WORDS = {
    "fractions": "it has values that are not whole numbers",
    "negative": "it has negative values",
    "missing": "it has missing or infinite values",
    "absent": "it is not there",
}


def near_whole(values: np.ndarray) -> np.ndarray:
    """Return which values are whole numbers, up to rounding errors."""
    nearest = np.rint(values)
    with np.errstate(invalid="ignore"):  # of infinity
        return np.abs(values - nearest) <= np.maximum(NOISE, _RELATIVE_NOISE * np.abs(nearest))


def without_noise(rows: GeneRows) -> GeneRows:
    """Round the counts of cells in which all are whole up to rounding errors; other cells stay as they are."""
    nearest = np.rint(rows.counts)
    if (nearest == rows.counts).all():
        return rows
    off = ~near_whole(rows.counts)
    lengths = np.diff(rows.offsets)
    cells = np.bincount(rows.cells(), weights=off, minlength=len(lengths)) == 0
    # A cell in which nothing would be left has values in a tiny unit, which are no noise around zero.
    cells &= np.bincount(rows.cells(), weights=nearest != 0, minlength=len(lengths)) > 0
    counts = np.where(np.repeat(cells, lengths), nearest, rows.counts)
    rows = GeneRows(rows.tokens, counts, rows.offsets)
    return rows.select(counts != 0) if (counts == 0).any() else rows


# Where counts are -------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an AnnData has its counts: `layer` in the meaning of `GeneOptions`, and what there is to say of it."""

    layer: str | None
    note: str = ""


def kind_of(matrix: Any) -> str:
    """Return what a matrix holds, judged by some of its values: "counts", or a key of `_WORDS`; "none" without any."""
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
    """Return some stored values other than 0 as float64, evenly spread."""
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
    """Return a matrix, computed where it is one of dask."""
    return matrix.compute() if hasattr(matrix, "compute") else matrix


def _stretches(total: int, wanted: int, places: int = _PLACES) -> Iterator[tuple[int, int]]:
    """Yield the bounds of stretches of 0..`total`, evenly spread, of about `wanted` together, or one of all."""
    if total <= wanted:
        yield 0, total
        return
    size = -(-wanted // places)
    for start in np.linspace(0, total - size, places).astype(np.int64).tolist():
        yield start, start + size


def find_counts(adata: Any, other_counts: str) -> Place:
    """Find the counts of an AnnData, or of what looks like one, where no layer was named.

    `X` is taken where it holds counts. Otherwise the layers `counts`, `raw_counts` and `raw` and `.raw` are looked at
    in this order; the first is taken that holds counts, if the others hold the same.

    Args:
        adata: what has `X`, `layers` and `raw`.
        other_counts: as in `GeneOptions`.

    Raises:
        ValueError: where two places hold different counts, and where `other_counts` is "refuse" and one holds some.
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
            f"X holds no counts ({why}); {places} some{differ}. Name the one to take with layer= (--layer): "
            f"{' or '.join(repr(name) for name in [first, *others])}."
        )
    return Place(first, f"X holds no counts ({why}): those of {_said(first, adata)} are taken.")


def _named(adata: Any) -> dict[str, Any]:
    """Return the matrices beside X that hold raw counts by their names, in order."""
    found = {name: adata.layers[name] for name in NAMED if name in adata.layers}
    if "raw" not in found and adata.raw is not None:
        found["raw"] = adata.raw.X
    return found


def _said(name: str, adata: Any) -> str:
    return "raw" if name == "raw" and "raw" not in adata.layers else f'layer="{name}"'


def _same(adata: Any, one: str, other: str) -> bool:
    """Return whether two places hold the same counts of the same genes, judged by some."""
    raw = [name == "raw" and "raw" not in adata.layers for name in (one, other)]
    first, second = (_named(adata)[name] for name in (one, other))
    genes = [[str(gene) for gene in (adata.raw if from_raw else adata).var_names] for from_raw in raw]
    if genes[0] != genes[1] or first.shape != second.shape:
        return False
    if any(hasattr(each, "group") and each.format == "csc" for each in (first, second)):
        return np.array_equal(_some_values(first), _some_values(second))  # its first rows are all over the file
    rows = [in_memory(each[:8]) for each in (first, second)]
    dense = [each.toarray() if hasattr(each, "toarray") else np.asarray(each) for each in rows]
    return np.array_equal(dense[0], dense[1])


def counts_elsewhere(adata: Any, layer: str | None) -> str:
    """Say where an AnnData, or what looks like one, has whole numbers beside the place that was taken, as advice."""
    places = {name: adata.layers[name] for name in adata.layers if name is not None}  # None is X since anndata 0.13
    if "raw" not in places and adata.raw is not None:
        places["raw"] = adata.raw.X
    good = [_said(name, adata) for name, matrix in places.items() if name != layer and kind_of(matrix) == "counts"]
    if layer is not None and kind_of(adata.X) == "counts":
        good.append("X (leave out layer=)")
    if not good:
        return " Pass the raw counts; it has no layer and no raw with whole numbers."
    return f" Raw counts seem to be in {' and in '.join(good)}: name that with layer= (--layer)."


# What values look like --------------------------------------------------------------------------------

# Cells with fewer genes are not judged, and fewer cells than that are no evidence.
_FEW_GENES, _FEW_CELLS = 100, 5


def doubt(values: np.ndarray, offsets: np.ndarray) -> str | None:
    """Say what the values of some cells look like if not like counts; None where they are like counts.

    Args:
        values: `(total,)` values above zero, of one cell after the other.
        offsets: `(cells + 1,)` where the cells begin and end.
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
        return f"all values are 1, of {genes} genes per cell: they tell which genes are expressed, and are no counts."
    if genes >= 1000 and most.max() <= 10:
        return f"no count is above {most.max():.0f}, with {genes} genes per cell: they look like rounded logarithms."
    # Nearly half of the expressed genes of a cell, or more, have one count, unless all counts were multiplied.
    if (least >= 2).mean() >= 0.9:
        same = f" and all cells have nearly the same sum, {sums.mean():.0f}" if sums.std() < 0.01 * sums.mean() else ""
        return f"hardly a cell of {genes} genes has a count of 1{same}: they look normalised and rounded."
    return None


def _looks(values: np.ndarray, offsets: np.ndarray) -> str:
    """Return what fractions are, if it can be told: counts k become f(k * s), with s the same in all of a cell."""
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
        # The same sum in all cells is evidence where it shows up only once the logarithm is undone.
        same_sum = "log-" in looks and len(sums) > 1 and sums.max() < np.inf and sums.std() < 0.01 * sums.mean()
        if same_sum or _are_multiples(raw, offsets):
            return looks
    return ""


def _are_multiples(values: np.ndarray, offsets: np.ndarray) -> bool:
    """Return whether in most cells the small values are whole multiples of the least."""
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
