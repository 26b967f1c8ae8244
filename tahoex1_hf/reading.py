"""Opening an .h5ad file whose counts stay on disk, and reading a table of gene symbols."""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData
    from h5py import Dataset, Group

_ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{11}")


@contextmanager
def open_h5ad(path: str | Path) -> Iterator["AnnData"]:
    """Open an .h5ad file for reading rows of its counts.

    Unlike `anndata.read_h5ad(backed="r")`, layers stay on disk too, and `obsm`, `varm`, `obsp` and `uns` are not read.

    Yields:
        AnnData with `obs` and `var` in memory and `X` and `layers` on disk.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is not an .h5ad file.
    """
    import h5py
    from anndata import AnnData
    from anndata.io import read_elem

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an .h5ad file (not HDF5).")
    with h5py.File(path, "r") as file:
        missing = [name for name in ("obs", "var", "X") if name not in file]
        if missing:
            raise ValueError(f"{path} is not a complete .h5ad file: it lacks {', '.join(missing)}.")
        layers = {name: _on_disk(file["layers"][name]) for name in file.get("layers", ())}
        yield AnnData(X=_on_disk(file["X"]), obs=read_elem(file["obs"]), var=read_elem(file["var"]), layers=layers)


def _on_disk(element: "Group | Dataset") -> object:
    import h5py
    from anndata.io import sparse_dataset

    return element if isinstance(element, h5py.Dataset) else sparse_dataset(element)


def read_gene_symbols(path: str | Path | None) -> dict[str, str] | None:
    """Read a CSV whose first two columns are gene symbol and Ensembl id, in either order; a header is skipped.

    None gives None.
    """
    if path is None:
        return None
    pairs = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        for first, second, *_ in (row for row in csv.reader(file) if len(row) >= 2):
            if _ENSEMBL_ID.match(second):
                pairs[first] = second
            elif _ENSEMBL_ID.match(first):
                pairs[second] = first
    if not pairs:
        raise ValueError(
            f"{path} has no line with a gene symbol and an Ensembl id (ENSG...) in its first two columns."
        )
    return pairs
