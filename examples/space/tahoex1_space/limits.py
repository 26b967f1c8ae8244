"""What a Space takes: limits on a file's size, cells, genes and time, held before any of its counts are read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import h5py

from tahoex1_hf.cells.readers.stores import matrix_format, matrix_shape, num_rows, open_store
from tahoex1_hf.common.reading import reading

VARIABLE = "TAHOEX1_SPACE_"


@dataclass(frozen=True)
class Limits:
    """Limits of a Space; each can be set by an environment variable, such as TAHOEX1_SPACE_CELLS=2000.

    Attributes:
        megabytes: Largest size of an uploaded file.
        unpacked_megabytes: Largest size of all that a file holds, without its compression.
        cells: Most cells of a file.
        genes: Most genes of a file.
        minutes: Longest time of one piece of work, after which it is ended.
        jobs: Pieces of work that are done at once.
        waiting: Most pieces of work that wait.
    """

    megabytes: int = 200
    unpacked_megabytes: int = 4000
    cells: int = 5000
    genes: int = 100_000
    minutes: int = 15
    jobs: int = 1
    waiting: int = 8

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Limits":
        """Return the limits that the environment sets, and the defaults of all others.

        Raises:
            ValueError: If a variable is not a positive whole number.
        """
        given = {}
        for each in fields(cls):
            name = VARIABLE + each.name.upper()
            text = environment.get(name)
            if text is None:
                continue
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"{name}={text!r} must be a whole number of at least 1.")
            given[each.name] = int(text)
        return cls(**given)


@dataclass(frozen=True)
class Extent:
    """How much a file holds.

    Attributes:
        cells: Number of cells.
        genes: Number of genes.
        tokens: Number of tokens of all cells; where the counts are stored dense, the most that it can be.
    """

    cells: int
    genes: int
    tokens: int


def check_file(path: str | Path, limits: Limits, context_length: int) -> Extent:
    """Look at the sizes that an `.h5ad` file states, without reading its counts.

    Args:
        path: Path of the file.
        limits: Limits that it must keep.
        context_length: Most tokens of a cell that the model sees.

    Raises:
        ValueError: If the file is beyond a limit, or cannot be used; the message says what to do.
    """
    path = Path(path)
    megabytes = path.stat().st_size / 1e6
    if megabytes > limits.megabytes:
        raise ValueError(
            f"{path.name} has {megabytes:,.0f} MB, and {limits.megabytes:,} are allowed here: upload fewer cells, "
            "without layers that the model does not need."
        )
    if path.suffix.lower() != ".h5ad" or not h5py.is_hdf5(path):
        raise ValueError(
            f"{path.name} is not an .h5ad file, which is what AnnData and scanpy write by adata.write_h5ad(...)."
        )
    with reading(path), open_store(str(path)) as store:
        unpacked = _stored_bytes(store) / 1e6
        if unpacked > limits.unpacked_megabytes:
            raise ValueError(
                f"{path.name} unpacks to {unpacked:,.0f} MB, and {limits.unpacked_megabytes:,} are allowed here: "
                "upload fewer cells, with sparse counts."
            )
        cells, genes = num_rows(store["obs"]), num_rows(store["var"])
        matrices = [store[place] for place in _places(store)]
        genes = max([genes, *(matrix_shape(matrix)[1] for matrix in matrices)])
        tokens = _tokens(matrices, cells, genes, context_length)
    if not cells:
        raise ValueError(f"{path.name} holds no cells.")
    for what, number, most in (("cells", cells, limits.cells), ("genes", genes, limits.genes)):
        if number > most:
            way = f"adata[:{most}].write_h5ad(...) writes the first {most:,}" if what == "cells" else "leave some out"
            raise ValueError(
                f"{path.name} has {number:,} {what}, and {most:,} are allowed here: {way}. On your own machine, "
                "`tahoex1 embed` has no such limit."
            )
    return Extent(cells, genes, tokens)


def check_time(extent: Extent, limits: Limits, tokens_per_second: float, seconds_besides: float) -> float:
    """Return the seconds that the work will take, computed from the file's sizes.

    Args:
        extent: Sizes of all that must be embedded.
        limits: Limits of the Space.
        tokens_per_second: Speed of the model on this machine.
        seconds_besides: Seconds of everything that is not embedding.

    Raises:
        ValueError: If it would take longer than is allowed.
    """
    seconds = extent.tokens / tokens_per_second + seconds_besides
    if seconds > 60 * limits.minutes:
        share = max(60 * limits.minutes - seconds_besides, 0) / max(seconds - seconds_besides, 1e-9)
        raise ValueError(
            f"{extent.cells:,} cells would take about {seconds / 60:,.0f} minutes here, and {limits.minutes} are "
            f"allowed: upload about {int(extent.cells * share):,} cells at most, or use `tahoex1 embed` on your own "
            "machine."
        )
    return seconds


def _places(store: Any) -> list[str]:
    layers = [f"layers/{name}" for name in store.get("layers", ())]
    return [place for place in ("X", "raw/X", "raw.X", *layers) if place in store]


def _tokens(matrices: list[Any], cells: int, genes: int, context_length: int) -> int:
    """Return the number of tokens, by the matrix that stores fewest values: the others are made from the counts."""
    per_cell = float(genes)
    for matrix in matrices:
        if matrix_format(matrix) != "dense":
            per_cell = min(per_cell, matrix["data"].shape[0] / max(cells, 1))
    return cells * min(int(per_cell) + 1, context_length)


def _stored_bytes(store: Any) -> int:
    sizes: list[int] = []

    def add(name: str, element: Any) -> None:
        if isinstance(element, h5py.Dataset) and element.shape is not None:
            sizes.append(element.size * element.dtype.itemsize)

    store.visititems(add)
    return sum(sizes)
