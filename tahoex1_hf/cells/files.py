# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Files with cells to embed: `.h5ad`, `.zarr`, 10x, prepared datasets, and Tahoe-100M, local or on the Hub."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tahoex1_hf.cells import inputs as cell_inputs
from tahoex1_hf.cells.inputs import (
    Block,
    CellInput,
    EncodeOptions,
    MatrixEncoder,
    encode_token_block,
    encoded_blocks,
)
from tahoex1_hf.cells.readers.base import INDEX, BadInput
from tahoex1_hf.cells.readers.by_gene import spool_entries
from tahoex1_hf.cells.readers.paths import expand_paths, local_fingerprint
from tahoex1_hf.cells.readers.prepared import PreparedDataset, check_vocabulary
from tahoex1_hf.cells.readers.stores import (
    column_names,
    csc_entries,
    is_legacy,
    matrix_blocks,
    matrix_format,
    matrix_shape,
    num_rows,
    open_store,
    read_column,
)
from tahoex1_hf.data.config import Tahoe100MSource, TenXSource
from tahoex1_hf.data.sources.anndata_files import is_anndata
from tahoex1_hf.data.sources.base import CellSource
from tahoex1_hf.data.sources.tahoe_100m import SUFFIXES, Tahoe100MFiles
from tahoex1_hf.data.sources.ten_x import TenXFiles, is_ten_x
from tahoex1_hf.encoding_tahoe_x1 import GeneRows

# Cells of one of the pieces into which counts that are stored by gene are sorted.
_PIECE_CELLS = 16384
# Cells of a prepared dataset that are encoded from one view.
_BLOCK_CELLS = 4096
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class _Column(Sequence):
    """A column of obs on disk, of which slices are read."""

    def __init__(self, path: str, name: str, num_cells: int):
        self.path, self.name, self.num_cells = path, name, num_cells

    def __len__(self) -> int:
        return self.num_cells

    def __getitem__(self, part: Any) -> Any:
        start, stop, _ = part.indices(self.num_cells)
        with open_store(self.path) as store:
            return read_column(store["obs"], self.name, start, stop).tolist()

    def tolist(self) -> "_Column":
        """Itself: what asks for a list of all cells' values gets something to slice."""
        return self


class _Obs(dict):
    """Columns of obs on disk."""

    @property
    def columns(self) -> list[str]:
        return list(self)


class _Stored:
    """What the tokenizer asks an AnnData for, of one on disk: nothing of the size of its cells is in memory."""

    raw = None

    def __init__(self, store: Any, path: str, num_cells: int):
        from anndata.io import sparse_dataset

        def on_disk(element: Any) -> Any:
            return element if hasattr(element, "shape") else sparse_dataset(element)

        self._store = store
        self.X = on_disk(store["X"]) if "X" in store else None
        self.layers = {name: on_disk(store["layers"][name]) for name in store.get("layers", ())}
        self.obs = _Obs({name: _Column(path, name, num_cells) for name in column_names(store["obs"])})

    @cached_property
    def var(self) -> Any:
        """The genes, read when they are asked for."""
        from anndata.io import read_elem

        frame = self._store["var"]
        if is_legacy(frame):  # which read_elem does not make a data frame of
            columns = {name: read_column(frame, name) for name in column_names(frame)}
            return pd.DataFrame(columns).set_index(pd.Index(read_column(frame, INDEX)))
        return read_elem(frame)

    @property
    def var_names(self) -> Any:
        """Of the genes."""
        return self.var.index


class StoredInput(CellInput):
    """An `.h5ad` file or a `.zarr` store."""

    def __init__(self, path: str, options: EncodeOptions, spool_folder: Path):
        self.path, self.options, self.spool_folder = path, options, spool_folder
        self.place = "X" if options.layer is None else f"layers/{options.layer}"
        if Path(path).is_file():
            _check_hdf5(path)
        try:
            with open_store(path) as store:
                self._inspect(store)
        except BadInput as error:
            raise ValueError(f"{path}: {error}") from error
        self.fingerprint = local_fingerprint(path)

    def _inspect(self, store: Any) -> None:
        tokenizer, options = self.options.tokenizer, self.options
        self.num_cells = num_rows(store["obs"])
        stored = _Stored(store, self.path, self.num_cells)
        _, self.genes = tokenizer.read_anndata(stored, options.gene_id_column, options.layer, options.gene_symbols)
        shape = matrix_shape(store[self.place])
        if shape != (self.num_cells, self.genes.num_genes):
            raise BadInput(f"counts of shape {shape} for {self.num_cells} cells and {self.genes.num_genes} genes.")
        self.drugs = tokenizer.resolve_drugs(stored, options.drugs)
        self.by_gene = matrix_format(store[self.place]) == "csc"

    @property
    def _spooled(self) -> Path | None:
        key = sha256(f"{os.path.abspath(self.path)}\n{self.place}\n{self.fingerprint}".encode()).hexdigest()[:24]
        return self.spool_folder / key if self.by_gene else None

    def sort_by_cell(self) -> None:
        """Sort a CSC matrix into the spool folder."""
        if self._spooled is not None:
            with open_store(self.path) as store:
                matrix = store[self.place]
                spool_entries(csc_entries(matrix), self.num_cells, _PIECE_CELLS, self._spooled)

    def chunk_tokens(self) -> np.ndarray:
        """From the index of a CSR matrix."""
        with open_store(self.path) as store:
            matrix = store[self.place]
            if matrix_format(matrix) != "csr":
                return super().chunk_tokens()
            lengths = np.diff(np.asarray(matrix["indptr"][:], dtype=np.int64))
        return _chunk_sums(lengths, self.options)

    def blocks(self, start: int, stop: int, names: bool) -> Iterator[Block]:
        """Read rows; a compressed file is read chunk by chunk of its own, each once."""
        with open_store(self.path) as store:
            stored = _Stored(store, self.path, self.num_cells)
            assert self.genes is not None
            encoder = MatrixEncoder(self.options, self.genes, self.num_cells, stored)
            rows = matrix_blocks(store[self.place], start, stop, self._spooled, cell_inputs.BLOCK_ELEMENTS)

            def labels(low: int, high: int) -> list[str]:
                return read_column(store["obs"], INDEX, low, high).astype(str).tolist()

            yield from encoded_blocks(encoder, rows, self.drugs, start, labels if names else None)


def _chunk_sums(num_genes: np.ndarray, options: EncodeOptions) -> np.ndarray:
    """Tokens of each chunk, given `(cells,)` genes."""
    longest = options.tokenizer.context_length
    tokens = 1 + (num_genes if longest is None else np.minimum(num_genes, longest - 1))
    return np.add.reduceat(tokens, np.arange(0, len(tokens), cell_inputs.CHUNK_CELLS)) if len(tokens) else tokens


def _check_hdf5(path: str) -> None:
    import h5py

    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an .h5ad file (not HDF5).")


class PreparedInput(CellInput):
    """One split of a dataset that `tahoex1 prepare` made, local or remote."""

    genes = None

    def __init__(self, location: str, split: str, options: EncodeOptions):
        self.path, self.options = f"{location} ({split})", options
        drugs = options.drugs
        if drugs not in (None, "drug"):
            raise ValueError(f"drugs={drugs!r}: a prepared dataset has its drugs in the column 'drug'.")
        table = options.tokenizer.drug_to_id or {}
        self.folder = PreparedDataset(
            location, split, drug_id=None if drugs is None else lambda name: _known_drug(name, table)
        )
        check_vocabulary(self.folder, options.tokenizer)
        self.starts = np.concatenate([[0], np.cumsum(self.folder.sizes)])
        self.num_cells = int(self.starts[-1])
        self.fingerprint = sha256("".join(shard["sha256"] for shard in self.folder.shards).encode()).hexdigest()

    def chunk_tokens(self) -> np.ndarray:
        """From the shards, where they lie on this machine or a file system that it shares."""
        if self.folder.cache is not None:
            return super().chunk_tokens()
        shards = range(len(self.folder.sizes))
        return _chunk_sums(np.concatenate([self.folder.shard(n).cells.lengths for n in shards]), self.options)

    def blocks(self, start: int, stop: int, names: bool) -> Iterator[Block]:
        """Views of the shards. A cell's name is its `_index`, or else its shard and row."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            self.folder.prefetch(range(number, min(number + 2, len(self.folder.sizes))))
            shard, first = self.folder.shard(number), int(self.starts[number])
            for low in range(start, min(int(self.starts[number + 1]), stop), _BLOCK_CELLS):
                high = min(low + _BLOCK_CELLS, int(self.starts[number + 1]), stop)
                rows = shard.gathered(low - first, high - first)
                drugs = None if shard.drug_ids is None else shard.drug_ids[low - first : high - first]
                labels = self._names(shard, number, low - first, high - first) if names else None
                yield Block(low, high, encode_token_block(self.options, rows, drugs, low), labels)
                start = high
            number += 1

    def _names(self, shard: Any, number: int, low: int, high: int) -> list[str]:
        if INDEX in shard.table.column_names:
            return [str(name) for name in shard.table.column(INDEX).slice(low, high - low).to_pylist()]
        stem = Path(self.folder.shards[number]["file"]).stem
        return [f"{stem}:{row}" for row in range(low, high)]


def _known_drug(name: str | None, table: dict[str, int]) -> int:
    if name is not None and name not in table:
        raise ValueError(f"the drug {name!r} of the dataset is not in the model's drug table.")
    return 0 if name is None else table[name]


class SourceInput(CellInput):
    """A file of one of the kinds that `tahoex1 prepare` reads."""

    genes = None

    def __init__(self, source: CellSource, path: str, options: EncodeOptions):
        self.source, self.path, self.options = source, path, options
        if options.drugs is not None and not isinstance(options.drugs, str):
            raise ValueError("drugs: name a column, or one drug, for cells that come from files.")
        try:
            report = source.inspect(path)
        except BadInput as error:
            raise ValueError(f"{path}: {error}") from error
        self.num_cells, self.fingerprint, self.by_gene = report.num_cells, report.fingerprint, report.by_gene
        one_drug = options.tokenizer.drug_to_id is not None and options.drugs in options.tokenizer.drug_to_id
        self.drug_column = None if options.drugs is None or one_drug else options.drugs

    def sort_by_cell(self) -> None:
        """Sort counts in any order into the spool folder."""
        if self.by_gene:
            self.source.spool(self.path, _PIECE_CELLS)

    def blocks(self, start: int, stop: int, names: bool) -> Iterator[Block]:
        """The source's own chunks."""
        columns = [*([INDEX] if names else []), *([self.drug_column] if self.drug_column else [])]
        tokenizer, low = self.options.tokenizer, start
        for chunk in self.source.read(self.path, start, stop, columns):
            high = low + len(chunk.rows.offsets) - 1
            drug_ids = None
            if self.options.drugs is not None:
                column = chunk.metadata[self.drug_column].tolist() if self.drug_column else self.options.drugs
                drug_ids = tokenizer.drug_ids(column, high - low)
            labels = chunk.metadata[INDEX].astype(str).tolist() if names else None
            rows = GeneRows(*chunk.rows)
            yield Block(low, high, encode_token_block(self.options, rows, drug_ids, low), labels)
            low = high


def open_inputs(
    paths: Sequence[str], options: EncodeOptions, spool_folder: Path, gene_metadata: str | None = None
) -> list[CellInput]:
    """Find out what the paths are, and look at every file without reading its counts.

    Args:
        paths: `.h5ad` files, `.zarr` stores, 10x `.h5` files and matrix folders, folders and globs of such; folders of
            prepared datasets, also `hf://` and `s3://`; Parquet or Arrow files in the form of Tahoe-100M, and Hub
            datasets (`tahoebio/Tahoe-100M`).
        options: for all of them.
        spool_folder: for counts that must be sorted by cell.
        gene_metadata: gene table of files in the form of Tahoe-100M; by default that dataset's own.

    Raises:
        FileNotFoundError: for a path that stands for no such file.
        ValueError: for a file that cannot be used.
    """
    found: list[CellInput] = []
    for path in paths:
        found.extend(_open_path(path, options, spool_folder, gene_metadata))
    if not sum(each.num_cells for each in found):
        raise ValueError(f"{', '.join(paths)} holds no cells.")
    return found


def check_paths(paths: Sequence[str]) -> None:
    """Raise FileNotFoundError for a local path that stands for nothing, before any work is done."""
    for path in paths:
        if "://" not in path and not glob.has_magic(path) and not os.path.exists(path) and not _is_repository(path):
            raise FileNotFoundError(f"{path} does not exist.")


def _is_repository(path: str) -> bool:
    """Whether a path that does not exist looks like a dataset on the Hub."""
    return bool(_REPOSITORY.fullmatch(path)) and Path(path).suffix not in (".h5ad", ".zarr", ".h5", *SUFFIXES)


def _open_path(path: str, options: EncodeOptions, spool_folder: Path, gene_metadata: str | None) -> list[CellInput]:
    if "://" not in path and not os.path.exists(path) and _is_repository(path):
        path = f"hf://datasets/{path}"
    splits = _prepared_splits(path)
    if splits:
        return [PreparedInput(path, split, options) for split in splits]
    if "://" in path or _holds_tables(Path(path)):
        inner = f"{path}/data" if re.fullmatch(r"hf://datasets/[^/]+/[^/]+", path) else path
        more = {} if gene_metadata is None else {"gene_metadata": gene_metadata}
        config = Tahoe100MSource(kind="tahoe-100m", paths=[inner], **more)
        source: CellSource = Tahoe100MFiles(config, options.tokenizer, spool_folder)
        return [SourceInput(source, each, options) for each in _listed(source)]
    files = expand_paths([path], lambda each: is_anndata(each) or is_ten_x(each), ".h5ad, .zarr or 10x files")
    inputs: list[CellInput] = []
    for each in files:
        if is_anndata(Path(each)):
            inputs.append(StoredInput(each, options, spool_folder))
            continue
        for name in ("layer", "gene_symbols"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name} was given, but {each} is a 10x file: it has no layers, and Ensembl ids.")
        ten_x = TenXSource(kind="10x", paths=[each], gene_id_column=options.gene_id_column)
        source = TenXFiles(ten_x, options.tokenizer, spool_folder)
        inputs.append(SourceInput(source, each, options))
    return inputs


def _listed(source: CellSource) -> list[str]:
    try:
        return source.list_files()
    except BadInput as error:
        raise ValueError(str(error)) from error


def _prepared_splits(path: str) -> list[str]:
    """Splits with cells of a prepared dataset, training first; none where it is something else."""
    if "://" not in path:
        manifest = Path(path) / "manifest.json"
        if not manifest.is_file():
            return []
    for split in ("train", "validation"):
        try:
            splits = PreparedDataset(path, split).manifest["splits"]
            return [name for name in ("train", "validation") if splits.get(name, {}).get("shards")]
        except ValueError:
            continue
        except OSError:
            return []
    return []


def _holds_tables(path: Path) -> bool:
    """Whether a path is, or a folder holds, Parquet or Arrow files."""
    inside = (file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}")) if path.is_dir() else iter(())
    return path.suffix in SUFFIXES or next(inside, None) is not None
