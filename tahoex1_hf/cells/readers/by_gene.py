# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Sorting of counts by cell, on disk, for files that store them by gene (CSC) or in any order (.mtx).

One pass over the file appends every entry to the intermediate file of its piece, a range of cells. Each piece is then
sorted by itself. The memory needed is that of a chunk of the file, or that of the row numbers of a piece.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.cells.readers.csr import chunk_bounds
from tahoex1_hf.common.files import whole_folder

_PARTS = {"cells": np.uint32, "genes": np.int32, "counts": np.float32}


def spool_entries(
    entries: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], num_cells: int, piece_cells: int, folder: Path
) -> None:
    """Write each entry to the piece that it belongs to; do nothing if the folder exists.

    Args:
        entries: Chunks of entries, each as three arrays of equal length: cells, genes and counts.
        num_cells: Number of cells; larger cell numbers are bad input.
        piece_cells: Number of cells of a piece.
        folder: Folder for the pieces, which appears complete or not at all.
    """
    if folder.is_dir():
        return
    try:
        with whole_folder(folder) as partial:
            _spool(entries, num_cells, piece_cells, partial)
            (partial / "piece_cells").write_text(str(piece_cells))
    except OSError:
        if not folder.is_dir():  # else another process has done the same meanwhile, such as one taken for lost
            raise


def _spool(
    entries: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], num_cells: int, piece_cells: int, folder: Path
) -> None:
    for cells, genes, counts in entries:
        if len(cells) and not 0 <= int(cells.min()) <= int(cells.max()) < num_cells:
            raise BadInput(f"an entry belongs to cell {int(cells.max())}, but there are {num_cells}: it is corrupt.")
        pieces = cells // piece_cells
        order = np.argsort(pieces, kind="stable")
        stops = np.searchsorted(pieces[order], np.arange(pieces.max(initial=-1) + 2))
        for piece, (start, stop) in enumerate(pairwise(stops)):
            if start == stop:
                continue
            chosen = order[start:stop]
            values = {"cells": cells[chosen] - piece * piece_cells, "genes": genes[chosen], "counts": counts[chosen]}
            for name, dtype in _PARTS.items():
                with (folder / f"{piece}.{name}").open("ab") as file:
                    values[name].astype(dtype).tofile(file)


def read_spooled(folder: Path, start: int, stop: int, num_genes: int) -> Iterator[csr_matrix]:
    """Yield cells `start` to `stop` as CSR matrices of about `CHUNK_ELEMENTS` entries at most, with genes in order."""
    piece_cells = int((folder / "piece_cells").read_text())
    for piece in range(start // piece_cells, -(-stop // piece_cells)):
        first = piece * piece_cells
        cells, genes, counts = (_part(folder, piece, name) for name in _PARTS)
        # A stable sort by cell keeps the entries of a cell in the order of the file; they are sorted by gene below.
        order = np.argsort(cells.astype(np.uint16) if piece_cells <= 2**16 else cells, kind="stable")
        lengths = np.bincount(cells, minlength=piece_cells)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        low, high = max(start - first, 0), min(stop - first, piece_cells)
        for a, b in chunk_bounds(indptr[low : high + 1]):
            rows = indptr[low + a : low + b + 1]
            chosen = order[rows[0] : rows[-1]]
            matrix = csr_matrix((counts[chosen], genes[chosen], rows - rows[0]), shape=(b - a, num_genes))
            matrix.sort_indices()
            yield matrix


def _part(folder: Path, piece: int, name: str) -> np.ndarray:
    path = folder / f"{piece}.{name}"
    if not path.is_file():  # a piece in which no gene is expressed
        return np.zeros(0, dtype=_PARTS[name])
    return np.memmap(path, dtype=_PARTS[name], mode="r")
