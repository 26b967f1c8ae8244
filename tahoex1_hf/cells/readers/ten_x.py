# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Output of Cell Ranger: `.h5` files, and folders with `matrix.mtx`, `barcodes.tsv` and `features.tsv`.

In GEO, the three files of a sample often have a common prefix and are in one folder with those of other samples. In
this case, the path of the matrix file stands for all three.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from tahoex1_hf.cells.feature_types import GENE_EXPRESSION
from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.cells.gene_search import FoundGenes, find_genes
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.looking import places_to_look
from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, INDEX, BadInput, CellInput, gene_rows
from tahoex1_hf.cells.readers.by_gene import read_spooled, spool_entries
from tahoex1_hf.cells.readers.csr import check_indptr, read_rows
from tahoex1_hf.cells.readers.hdf5_bounds import check_hdf5
from tahoex1_hf.cells.readers.unreadable import as_bad_input
from tahoex1_hf.common.bounded import BoundedGzip
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows

if TYPE_CHECKING:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


_MATRIX = re.compile(r"(?P<prefix>(?:.*[_.-])?)matrix\.mtx(?:\.gz)?")
_FEATURES = ("features.tsv", "genes.tsv")


class _Features(NamedTuple):
    ids: list[str]
    symbols: list[str]
    types: list[str]


class TenXInput(CellInput):
    """A matrix written by Cell Ranger. It has no columns of obs; the name of a cell is its barcode.

    Args:
        path: Path of an `.h5` file, a folder with a `matrix.mtx`, or a `PREFIX_matrix.mtx`.
        tokenizer: Tokenizer whose vocabulary decides which genes are known.
        options: Options that say where the genes are.
        spool: Folder in which the lines of a `matrix.mtx` are sorted by cell; None if there is none.
    """

    genes: GeneMatch
    found: FoundGenes
    counts_from = "X"

    def __init__(self, path: str, tokenizer: "TahoeX1Tokenizer", options: GeneOptions, spool: Path | None):
        self.path, self.tokenizer, self.options, self._spool = path, tokenizer, options, spool
        if options.layer is not None:
            raise BadInput(f"layer={options.layer!r} was given, but it is a 10x file, which has no layers.")
        self.by_gene = _is_mtx(path)
        with as_bad_input():
            shape, features, barcodes = _shape(path), _features(path), _barcodes(path)
            # Some programs write a header line above the features or barcodes.
            self._heads = int(len(barcodes) - 1 in shape and _is_head(barcodes[0]))
            if len(features.ids) - 1 in shape and _is_head(features.ids[0]):
                features = _Features(*(names[1:] for names in features))
            self.num_cells = len(barcodes) - self._heads
        if not self.num_cells:
            raise BadInput("it has no cells.")
        expected = (len(features.ids), self.num_cells)
        self._by_cell = self.by_gene and shape == expected[::-1] != expected  # a matrix of cells x genes
        if shape != expected and not self._by_cell:
            raise BadInput(f"its matrix has the shape {shape} for {expected[0]} genes and {expected[1]} cells.")
        self.found = self._find_genes(features)
        self.genes = self.found.match
        self.fingerprint = content_fingerprint(*files_of(path))

    @property
    def obs_columns(self) -> list[str]:
        """Columns of obs: none."""
        return []

    def column(self, name: str) -> pd.Series:
        """Return the barcodes."""
        _check_columns([name])
        with as_bad_input():
            return pd.Series(_barcodes(self.path)[self._heads :])

    def fingerprint_now(self) -> str:
        """Return the fingerprint of the present files."""
        return content_fingerprint(*files_of(self.path))

    def check(self) -> None:
        """Check the index of an `.h5` file."""
        if not self.by_gene:
            with as_bad_input(), _matrix_group(self.path) as group:
                check_indptr(group, self.num_cells)

    def sort_by_cell(self, piece_cells: int = 16384) -> None:
        """Sort the lines of a `matrix.mtx` by cell, since they can be in any order."""
        if self.by_gene:
            with as_bad_input():
                spool_entries(_mtx_entries(self.path, self._by_cell), self.num_cells, piece_cells, self._spooled())
            self._is_sorted = True
            self.look()

    def some_matrices(self) -> Iterator[csr_matrix]:
        """Read the rows of the cells to check."""
        with as_bad_input():
            for start, stop in places_to_look(self.num_cells):
                yield from self._rows(start, stop, None)

    def rows(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[GeneRows]:
        """Read rows of the matrix; the only column is `INDEX`."""
        _check_columns(columns)
        with as_bad_input():
            barcodes = _barcodes(self.path)[self._heads :][start:stop] if columns else None
            low = start
            for matrix in self._rows(start, stop, elements):
                high = low + matrix.shape[0]
                names = {} if barcodes is None else {INDEX: barcodes[low - start : high - start]}
                rows, unknown = gene_rows(matrix, self.genes, low, self.tokenizer)
                obs = pd.DataFrame(names, index=range(high - low))
                yield rows._replace(first_cell=low, obs=obs, unknown_counts=unknown)
                low = high

    def _rows(self, start: int, stop: int, elements: int | None) -> Iterator[csr_matrix]:
        if self.by_gene:
            yield from read_spooled(self._spooled(), start, stop, self.genes.num_genes)
            return
        with _matrix_group(self.path) as group:
            yield from read_rows(group, start, stop, self.genes.num_genes, elements)

    def _find_genes(self, features: _Features) -> FoundGenes:
        column = self.options.gene_id_column
        if column not in (None, "id", "name"):
            raise BadInput(f"gene_id_column={column!r} (--gene-id-column): features of 10x have an id and a name.")
        table = pd.DataFrame({"name": features.symbols, "feature_types": features.types})
        options = replace(self.options, gene_id_column="name" if column == "name" else None)
        return find_genes(self.tokenizer, table, features.ids, options)

    def _spooled(self) -> Path:
        if self._spool is None:
            raise BadInput("its counts can be in any order: name a folder in which to sort them by cell.")
        return self._spool / sha256(f"{self.path}\n{self.fingerprint}".encode()).hexdigest()[:24]


def _check_columns(columns: Sequence[str]) -> None:
    strange = [name for name in columns if name != INDEX]
    if strange:
        raise BadInput(f"10x files have no column {strange[0]!r}, only barcodes ({INDEX}): add others with join.")


def _shape(path: str) -> tuple[int, int]:
    """Return the numbers of genes and cells of the matrix."""
    if _is_mtx(path):
        return _mtx_header(path)[:2]
    with _matrix_group(path) as group:
        return int(group["shape"][0]), int(group["shape"][1])


def is_ten_x(path: Path) -> bool:
    """Return whether a path is a 10x `.h5` file, a folder with a `matrix.mtx`, or a `PREFIX_matrix.mtx`."""
    if path.is_dir():
        return _prefix(path) is not None
    return path.is_file() and (path.suffix == ".h5" or bool(_MATRIX.fullmatch(path.name)))


def _is_mtx(path: str) -> bool:
    return Path(path).is_dir() or bool(_MATRIX.fullmatch(Path(path).name))


def _prefix(path: Path) -> str | None:
    """Return the prefix of the names of the three files, which may be ""; None if there is not exactly one."""
    if path.is_file():
        found = _MATRIX.fullmatch(path.name)
        return None if found is None else found["prefix"]
    found_all = (_MATRIX.fullmatch(file.name) for file in path.iterdir() if file.is_file())
    prefixes = {found["prefix"] for found in found_all if found}
    prefixes = {prefix for prefix in prefixes if not prefix or _named(path, prefix, "barcodes.tsv")}
    return "" if "" in prefixes else prefixes.pop() if len(prefixes) == 1 else None


def _named(folder: Path, prefix: str, *names: str) -> Path | None:
    """Return the first of these files, plain or gzipped, that is in a folder; None if none is."""
    candidates = (folder / (prefix + name + end) for name in names for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _required(path: str, *names: str) -> Path:
    folder, prefix = (Path(path) if Path(path).is_dir() else Path(path).parent), _prefix(Path(path))
    part = _named(folder, prefix or "", *names)
    if part is None:
        raise BadInput(f"it has no {prefix}{' or '.join(names)} (or the same with .gz) beside {prefix}matrix.mtx.")
    return part


def files_of(path: str) -> list[Path]:
    """Return the files that hold the cells of a path, which may be a single file."""
    if not _is_mtx(path):
        return [Path(path)]
    return [_required(path, *names) for names in (("matrix.mtx",), _FEATURES, ("barcodes.tsv",))]


def _is_head(name: str) -> bool:
    """Return whether a name in the first line of a table of features or barcodes is that of a column."""
    return (
        re.fullmatch(
            r"(gene|feature|ensembl|cell)?[ _.]?(ids?|names?|symbols?|barcodes?)|genes?|cells?|x", name.lower()
        )
        is not None
    )


def _text(path: Path) -> Any:
    if path.suffix == ".gz":
        return io.TextIOWrapper(BoundedGzip(path), encoding="utf-8")
    return path.open(encoding="utf-8")


def _table(path: Path) -> list[list[str]]:
    """Return the fields of each line of a table of features or barcodes."""
    with _text(path) as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    for number, line in enumerate(lines, 1):
        if any("\0" in field for field in line):  # HDF5 cannot store it as a name
            raise BadInput(f"line {number} of {path.name} holds a zero byte: the file is damaged.")
    return lines


def _features(path: str) -> _Features:
    if _is_mtx(path):
        lines = _table(_required(path, *_FEATURES))
        kinds = [line[2] if len(line) > 2 else GENE_EXPRESSION for line in lines]
        return _Features([line[0] for line in lines], [line[1] if len(line) > 1 else line[0] for line in lines], kinds)
    with _matrix_group(path) as group:
        if "features" in group:  # Cell Ranger 3 and later
            table = group["features"]
            return _Features(_strings(table["id"]), _strings(table["name"]), _strings(table["feature_type"]))
        ids = _strings(group["genes"])
        return _Features(ids, _strings(group["gene_names"]), [GENE_EXPRESSION] * len(ids))


def _barcodes(path: str) -> np.ndarray:
    if _is_mtx(path):
        return np.array([line[0] for line in _table(_required(path, "barcodes.tsv"))], dtype=object)
    with _matrix_group(path) as group:
        return np.array(_strings(group["barcodes"]), dtype=object)


def _strings(dataset: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]


@contextmanager
def _matrix_group(path: str) -> Iterator[Any]:
    import h5py

    with h5py.File(path, "r") as file:
        check_hdf5(file, path)
        if "obs" in file and "var" in file:
            raise BadInput("it is an AnnData by another name: rename it so that its name ends in .h5ad.")
        groups = [name for name in file if isinstance(file[name], h5py.Group) and "indptr" in file[name]]
        if len(groups) != 1:
            raise BadInput(
                f"it has {len(groups)} matrices ({groups or list(file)}); Cell Ranger writes one matrix per genome."
            )
        yield file[groups[0]]


def _mtx_header(path: str) -> tuple[int, int, int, int]:
    """Return the numbers of genes, of cells, of entries, and of lines before the entries."""
    with _text(_required(path, "matrix.mtx")) as file:
        first = file.readline().split()
        if first[:3] != ["%%MatrixMarket", "matrix", "coordinate"] or first[3:] not in (
            ["integer", "general"],
            ["real", "general"],
        ):
            raise BadInput(f"its matrix.mtx starts with {' '.join(first)!r}, unlike a matrix of counts.")
        for number, line in enumerate(file, 2):
            if not line.startswith("%"):
                genes, cells, entries = (int(word) for word in line.split())
                return genes, cells, entries, number
    raise BadInput("its matrix.mtx ends before the entries.")


def _mtx_entries(path: str, by_cell: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield all entries in chunks of three arrays: cells, genes and counts.

    Args:
        path: Path of the input.
        by_cell: Whether the matrix is one of cells x genes; otherwise it is one of genes x cells.
    """
    genes, cells, entries, header = _mtx_header(path)
    names, seen = ["gene", "cell", "count"], 0
    if by_cell:
        genes, names = cells, ["cell", "gene", "count"]
    table = (
        pd.read_csv(
            _text(_required(path, "matrix.mtx")),
            sep=r"\s+",
            skiprows=header,
            header=None,
            names=names,
            dtype={"gene": np.int64, "cell": np.int64, "count": np.float32},
            chunksize=CHUNK_ELEMENTS,
        )
        if entries
        else ()
    )
    for chunk in table:
        seen += len(chunk)
        numbers = chunk["gene"].to_numpy() - 1  # the file counts from 1
        if not 0 <= int(numbers.min()) <= int(numbers.max()) < genes:
            raise BadInput(f"gene numbers of its matrix.mtx lie outside 1..{genes}: it is corrupt.")
        yield chunk["cell"].to_numpy() - 1, numbers, chunk["count"].to_numpy()
    if seen != entries:
        raise BadInput(f"its matrix.mtx has {seen} entries instead of {entries}: it is cut off or corrupt.")
