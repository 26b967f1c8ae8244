"""Ranges of chunked arrays hold the right numbers, and every chunk is read once."""

import itertools
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from tahoex1_hf.cells.readers import csr
from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.cells.readers.csr import AlignedArray, check_indptr


class Counting:
    """An array that records which parts of it are read."""

    def __init__(self, array: np.ndarray, chunks: tuple[int, ...] | None) -> None:
        self.array, self.chunks, self.shape, self.reads = array, chunks, array.shape, []

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self.array))
        if stop > start:
            self.reads.append((start, stop))
        return self.array[part]


@pytest.mark.parametrize("chunk", [1, 3, 10, 64, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_every_chunk_is_read_once(chunk: int, seed: int) -> None:
    values = np.arange(500)
    array = Counting(values, (chunk,))
    aligned = AlignedArray(array)
    rng = np.random.default_rng(seed)
    cuts = np.unique(rng.integers(20, 500, 30))
    for start, stop in itertools.pairwise(cuts):
        np.testing.assert_array_equal(aligned.read(int(start), int(stop)), values[start:stop])
    touched = [c for start, stop in array.reads for c in range(start // chunk, -(-stop // chunk))]
    assert len(touched) == len(set(touched))
    assert all(start % chunk == 0 and (stop % chunk == 0 or stop == 500) for start, stop in array.reads)


def test_gaps_and_empty_ranges() -> None:
    values = np.arange(100)
    aligned = AlignedArray(Counting(values, (8,)))
    for start, stop in ((0, 3), (3, 3), (50, 61), (61, 64), (64, 64), (64, 70), (99, 100)):
        np.testing.assert_array_equal(aligned.read(start, stop), values[start:stop])


def test_an_array_without_chunks_is_read_exactly() -> None:
    array = Counting(np.arange(100), None)
    AlignedArray(array).read(7, 13)
    assert array.reads == [(7, 13)]


def test_real_files(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((90, 5))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=values, chunks=(7, 5), compression="gzip")
        aligned = AlignedArray(file["x"])
        np.testing.assert_array_equal(np.concatenate([aligned.read(i, i + 10) for i in range(0, 90, 10)]), values)
    store = zarr.create_array(tmp_path / "x.zarr", data=values, chunks=(7, 5), shards=(21, 5))
    aligned = AlignedArray(store)
    assert aligned.step == 21
    np.testing.assert_array_equal(np.concatenate([aligned.read(i, i + 10) for i in range(0, 90, 10)]), values)


@pytest.mark.parametrize(("name", "kind"), [("indices", np.float16), ("indices", bool), ("indptr", "S4")])
def test_an_index_of_another_type_is_refused(name: str, kind: Any) -> None:
    group = {"data": np.ones(3), "indices": np.array([0, 2, 1]), "indptr": np.array([0, 2, 3])}
    for whole in (np.int32, np.uint64, np.float64):
        check_indptr({**group, name: group[name].astype(whole)}, 2)
    with pytest.raises(BadInput, match=f"{name} of its sparse counts are stored as .*, not as whole numbers"):
        check_indptr({**group, name: group[name].astype(kind)}, 2)


@pytest.mark.parametrize(("elements", "rows", "expected"), [(10, 100, 3), (10, 2, 2), (1, 100, 1), (None, 4, 4)])
def test_so_many_rows_are_read_at_once(
    elements: int | None, rows: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names come with the rows, so that there is a limit for rows with few entries, too."""
    monkeypatch.setattr(csr, "_MOST_ROWS", rows)
    ranges = list(csr.chunk_bounds(np.arange(0, 33, 3), elements))
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == 10
    assert max(stop - start for start, stop in ranges) == expected
