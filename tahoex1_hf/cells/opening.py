# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The only module that opens cells of any kind, and finds their genes, counts and columns of obs.

`find_sources` finds the files that a path stands for, and `open_cells` opens one of them.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.readers.anndata_inputs import AnnDataInput, StoredInput
from tahoex1_hf.cells.readers.base import INDEX, BadInput, CellInput
from tahoex1_hf.cells.readers.paths import expand_paths, is_zarr_store
from tahoex1_hf.common.reading import reading

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

Kind = Literal["anndata", "10x", "tahoe-100m", "prepared"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_TABLES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Source:
    """A file or store with cells, a folder that counts as one file, or a split of a prepared dataset.

    Attributes:
        path: Path or URL.
        kind: Kind of file or dataset.
        split: Name of the split of a prepared dataset; None for other kinds.
    """

    path: str
    kind: Kind
    split: str | None = None


def open_cells(
    source: "AnnData | str | Path | Source",
    tokenizer: "TahoeX1Tokenizer",
    options: GeneOptions | None = None,
    *,
    spool: str | Path | None = None,
    check: bool = True,
) -> CellInput:
    """Open cells, and find their genes and counts; only some of the counts are read.

    Args:
        source: An AnnData, in memory or backed; the path of an `.h5ad` file, a `.zarr` store, a 10x file or folder, a
            Parquet or Arrow file in the format of Tahoe-100M, or a prepared dataset with one split; or an element of
            the result of `find_sources`.
        tokenizer: Tokenizer whose vocabulary decides which genes are known.
        options: Options that say where genes and counts are; by default `GeneOptions()`.
        spool: Folder for counts that must be sorted by cell, and for copies of remote Arrow files; it need not exist.
        check: Whether to check the index of sparse counts, which must then be read completely.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If the source cannot be used; the message says what is wrong and what to do.
    """
    options = GeneOptions() if options is None else options
    if hasattr(source, "obs_names"):
        try:
            opened = AnnDataInput(source, tokenizer, options)
            opened.look()
            return opened
        except BadInput as error:
            raise ValueError(str(error)) from error
    if not isinstance(source, Source):
        found = find_sources([str(source)])
        if len(found) != 1:
            raise ValueError(f"{source} stands for {len(found)} files: name one.")
        source = found[0]
    with reading(source.path):
        cells = open_source(source, tokenizer, options, None if spool is None else Path(spool))
        if check:
            cells.check()
        cells.look()
    return cells


def check_writable(adata: "AnnData") -> None:
    """Raise ValueError before any work is done if nothing can be written into an AnnData."""
    if getattr(adata, "isbacked", False) and adata.is_view:
        raise ValueError(
            "adata is a view of a backed AnnData, into which nothing can be written: pass adata.to_memory(), or "
            "adata.copy(filename=...)."
        )


def open_source(source: Source, tokenizer: "TahoeX1Tokenizer", options: GeneOptions, spool: Path | None) -> CellInput:
    """Open cells like `open_cells`, but raise `BadInput`, whose message does not name the source."""
    # Each kind needs libraries that the others do not.
    if source.kind == "anndata":
        return StoredInput(source.path, tokenizer, options, spool)
    if source.kind == "10x":
        from tahoex1_hf.cells.readers.ten_x import TenXInput

        return TenXInput(source.path, tokenizer, options, spool)
    if source.kind == "tahoe-100m":
        from tahoex1_hf.cells.readers.tahoe_100m import Tahoe100MInput

        return Tahoe100MInput(source.path, tokenizer, options, spool)
    from tahoex1_hf.cells.readers.prepared import PreparedInput

    return PreparedInput(source.path, str(source.split), tokenizer)


def read_obs_names(path: str) -> set[str]:
    """Read the names of the columns of obs of an `.h5ad` file or `.zarr` store.

    Raises:
        ValueError: If the file cannot be read.
    """
    from tahoex1_hf.cells.readers.stores import column_names, open_store

    with reading(path), open_store(path) as store:
        return set(column_names(store["obs"]))


def read_obs_column(path: str, name: str, argument: str) -> "pd.Series":
    """Read a column of obs of a file, without reading its genes and counts.

    Args:
        path: `.h5ad` file or `.zarr` store.
        name: Name of the column; `INDEX` for the names of the cells.
        argument: Name of the argument that chose the column, for messages.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has no obs or no such column; the message lists its columns.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"data={path} does not exist.")
    if local_kind(Path(path)) != "anndata":
        raise ValueError(f"data={path}: {argument}={name} is a column of obs, which only .h5ad and .zarr have.")
    from tahoex1_hf.cells.readers.stores import column_names, open_store, read_column

    with reading(path), open_store(path) as store:
        columns = column_names(store["obs"])
        if name in columns or name == INDEX:
            return read_column(store["obs"], name)
    raise ValueError(f"{argument}={name} is not a column of obs of {path}; there are {', '.join(sorted(columns))}.")


def read_var(path: Path) -> "pd.DataFrame":
    """Read the genes of an `.h5ad` file, which need not have any cells.

    Returns:
        The columns of var; the index holds the names of the genes as text.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not an `.h5ad` file.
    """
    import h5py

    from tahoex1_hf.cells.readers.hdf5_bounds import check_hdf5
    from tahoex1_hf.cells.readers.stores import read_frame

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an .h5ad file (not HDF5).")
    with reading(path), h5py.File(path, "r") as file:
        check_hdf5(file, str(path))
        if "var" not in file:
            raise ValueError(f"{path} is not a complete .h5ad file: it lacks var.")
        return read_frame(file["var"])


def open_all(
    paths: Sequence[str], tokenizer: "TahoeX1Tokenizer", options: GeneOptions | None = None, *, spool: str | Path
) -> list[CellInput]:
    """Open all sources that paths stand for, in order; see `find_sources` and `open_cells`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a source cannot be used, or there are no cells at all.
    """
    found = [open_cells(source, tokenizer, options, spool=spool) for source in find_sources(paths)]
    if not sum(each.num_cells for each in found):
        raise ValueError(f"{', '.join(paths)} holds no cells.")
    return found


def find_sources(paths: Iterable[str]) -> list[Source]:
    """Find the sources that paths stand for: files, folders and globs, prepared datasets, URLs, datasets on the Hub.

    Args:
        paths: Paths of `.h5ad` files, `.zarr` stores, 10x `.h5` files and folders, and folders and globs of these;
            paths or URLs (`hf://`, `s3://`) of prepared datasets; paths or URLs of Parquet or Arrow files in the
            format of Tahoe-100M; and Hub datasets (`tahoebio/Tahoe-100M`).

    Raises:
        FileNotFoundError: If a path leads to no such file.
        ValueError: If a URL leads to no cells.
    """
    return [source for path in paths for source in _sources_of(path)]


def check_paths(paths: Sequence[str]) -> None:
    """Raise FileNotFoundError before any work is done if a local path does not exist."""
    for path in paths:
        if "://" not in path and not glob.has_magic(path) and not os.path.exists(path) and not _is_repository(path):
            raise FileNotFoundError(f"{path} does not exist.")


def _sources_of(path: str) -> list[Source]:
    if "://" not in path and not os.path.exists(path) and _is_repository(path):
        path = f"hf://datasets/{path}"
    splits = _prepared_splits(path)
    if splits:
        return [Source(path, "prepared", split) for split in splits]
    if "://" in path or _holds_tables(Path(path)):
        inner = f"{path}/data" if re.fullmatch(r"hf://datasets/[^/]+/[^/]+", path) else path
        try:
            return [Source(each, "tahoe-100m") for each in find_files("tahoe-100m", [inner])]
        except BadInput as error:
            raise ValueError(str(error)) from error
    found = expand_paths([path], lambda each: local_kind(each) is not None, ".h5ad, .zarr or 10x files")
    return [Source(each, local_kind(Path(each)) or "anndata") for each in found]


def find_files(kind: Kind, paths: Sequence[str]) -> list[str]:
    """Return the files of one kind that paths stand for, sorted and without repeats.

    Raises:
        FileNotFoundError: If a path leads to no such file.
        BadInput: If a URL leads to no such file.
    """
    if kind == "tahoe-100m":
        from tahoex1_hf.cells.readers.tahoe_100m import find_tables

        return sorted({file for path in paths for file in find_tables(path)})
    names: dict[Any, str] = {
        "anndata": ".h5ad files or .zarr stores",
        "10x": "10x .h5 files or folders with matrix.mtx",
    }
    wanted: Callable[[Path], bool] = lambda path: local_kind(path) == kind  # noqa: E731
    return expand_paths(paths, wanted, names[kind])


def local_kind(path: Path) -> Literal["anndata", "10x"] | None:
    """Return the kind of a file, or of a folder that counts as one, or None for anything else."""
    if (path.suffix == ".h5ad" and path.is_file()) or is_zarr_store(path):
        return "anndata"
    from tahoex1_hf.cells.readers.ten_x import is_ten_x

    return "10x" if is_ten_x(path) else None


def _is_repository(path: str) -> bool:
    """Return whether a path that does not exist looks like a dataset on the Hub."""
    return bool(_REPOSITORY.fullmatch(path)) and Path(path).suffix not in (".h5ad", ".zarr", ".h5", *_TABLES)


def _prepared_splits(path: str) -> list[str]:
    """Return the splits of a prepared dataset that have cells, training first; an empty list for anything else."""
    if "://" not in path:
        manifest = Path(path) / "manifest.json"
        if not manifest.is_file():
            return []
    from tahoex1_hf.cells.readers.prepared import read_manifest

    try:
        splits = read_manifest(path)["splits"]
    except OSError:
        return []
    return [name for name in ("train", "validation") if splits.get(name, {}).get("shards")]


def _holds_tables(path: Path) -> bool:
    """Return whether a path is a Parquet or Arrow file, or a folder that holds such files."""
    inside = (file for suffix in _TABLES for file in path.rglob(f"*{suffix}")) if path.is_dir() else iter(())
    return path.suffix in _TABLES or next(inside, None) is not None
