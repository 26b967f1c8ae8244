"""Heaps of strings in HDF5 files, in which the HDF5 library would search forever."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from cells import make_cells

from tahoex1_hf.cells.opening import read_var
from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.cells.readers.hdf5_bounds import check_hdf5


def check(path: Path) -> None:
    with h5py.File(path, "r") as file:
        check_hdf5(file, str(path))


def blanked(path: Path, start: int, stop: int) -> Path:
    data = bytearray(path.read_bytes())
    data[start:stop] = bytes(stop - start)
    copy = path.with_name("blanked.h5ad")
    copy.write_bytes(data)
    return copy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_cells(200).write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_a_hole_in_a_heap_is_found_before_the_library_reads_it(path: Path) -> None:
    check(path)
    heap = path.read_bytes().find(b"GCOL")
    assert heap > 0
    for start in (heap + 16, heap + 400):
        hole = blanked(path, start, start + 640)  # the library would not come back from any of these
        with pytest.raises(BadInput, match=rf"heap of strings at byte {heap} is blank in part, .*copy or download it"):
            check(hole)
        with pytest.raises(ValueError, match=r"blanked.h5ad: its heap of strings"):
            read_var(hole)
    check(blanked(path, heap, heap + 4))  # no heap any more, which the library says


def test_numbers_that_look_like_a_heap_are_none(tmp_path: Path) -> None:
    """Contents of large arrays are not searched; in small ones, a signature alone makes no heap."""
    fake = np.frombuffer(b"GCOL\x01\x00\x00\x00" + (4096).to_bytes(8, "little") + bytes(4080), dtype=np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["large"] = np.tile(fake, 300)
        file.create_dataset("chunked", data=np.tile(fake, 600), chunks=(2**19,))
        file["names"] = ["GCOL", "x" * 3000]
        file.attrs["note"] = "GCOL" * 9
    check(tmp_path / "a.h5")


def test_files_from_which_strings_were_removed_are_read(path: Path, tmp_path: Path) -> None:
    """What is deleted leaves holes that the library knows of."""
    with h5py.File(path, "r+") as file:
        del file["obs/sample"]
        names = anndata.io.read_elem(file["obs/_index"]).astype(str)
        del file["obs/_index"]
        file["obs/_index"] = [name * 30 for name in names]
        file["obs"].attrs["column-order"] = np.array(["cell_type"], dtype=object)
    check(path)
    assert anndata.read_h5ad(path).n_obs == 200
