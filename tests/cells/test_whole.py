"""Files of cells are read as they are, without a vocabulary."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from cells import make_cells

from tahoex1_hf.cells.whole import read_all_genes, read_slot


def test_genes_that_no_vocabulary_knows_are_read(tmp_path: Path) -> None:
    cells = make_cells(9)
    cells.var_names = [f"gene {number}" for number in range(cells.n_vars)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    found = read_all_genes(tmp_path / "cells.h5ad")
    assert found.var_names.tolist() == cells.var_names.tolist()
    assert (found.X != cells.X).nnz == 0


@pytest.mark.parametrize("axis", ["obs", "var"])
def test_slots_are_read_by_key(tmp_path: Path, axis: str) -> None:
    cells = make_cells(9)
    slots, names = (cells.obsm, cells.obs_names) if axis == "obs" else (cells.varm, cells.var_names)
    slots["mine"] = np.arange(2 * len(names), dtype=np.float32).reshape(-1, 2)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    found, values = read_slot(tmp_path / "cells.h5ad", "mine", axis)
    assert found.tolist() == names.tolist()
    np.testing.assert_array_equal(values, slots["mine"])
    with pytest.raises(ValueError, match=rf"cells\.h5ad has no {axis}m\['other'\]; there is mine"):
        read_slot(tmp_path / "cells.h5ad", "other", axis)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "cells.h5ad").write_bytes(b"no HDF5 at all" * 100)
    with pytest.raises(ValueError, match=r"cells\.h5ad cannot be read"):
        read_all_genes(tmp_path / "cells.h5ad")


@pytest.mark.parametrize("name", ["obs/_index", "obsm/mine"])
def test_files_that_would_fill_the_memory_are_refused(tmp_path: Path, name: str) -> None:
    cells = make_cells(9)
    cells.obsm["mine"] = np.ones((9, 2), dtype=np.float32)
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if isinstance(file[name], h5py.Group):  # anndata 0.13 writes nullable strings
            name += "/values"
        attributes, dtype = dict(file[name].attrs), file[name].dtype
        del file[name]
        made = file.create_dataset(name, shape=(10**11,), dtype=dtype, chunks=(1000,), compression="gzip")
        made.attrs.update(attributes)
    for read in (read_all_genes, lambda file: read_slot(file, "mine", "obs")):
        with pytest.raises(ValueError, match=rf"cells\.h5ad: /{name} declares \d+ bytes, and stores"):
            read(path)
