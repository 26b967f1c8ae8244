# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cell Ranger's output: `.h5` files and folders with `matrix.mtx`, `barcodes.tsv` and `features.tsv`."""

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from tahoex1_hf.cells.gene_symbols import read_gene_symbols
from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, INDEX, BadInput, CellChunk, chunk_of_matrix
from tahoex1_hf.cells.readers.by_gene import read_spooled, spool_entries
from tahoex1_hf.cells.readers.csr import check_indptr, read_rows
from tahoex1_hf.cells.readers.paths import expand_paths, local_fingerprint
from tahoex1_hf.data.config import TenXSource
from tahoex1_hf.data.sources.base import CellSource, FileReport, matched_genes
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

GENE_EXPRESSION = "Gene Expression"


class _Features(NamedTuple):
    ids: list[str]
    symbols: list[str]
    types: list[str]


class TenXFiles(CellSource):
    """Matrices that Cell Ranger writes; the only metadata is the barcode (`_index`), others can be joined to it."""

    config: TenXSource

    def list_files(self) -> list[str]:
        """The `.h5` files and the folders with a `matrix.mtx`, sorted."""
        return expand_paths(self.config.paths, is_ten_x, "10x .h5 files or folders with matrix.mtx")

    def inspect(self, path: str) -> FileReport:
        """Check shapes and genes; the counts are not read."""
        with _reading():
            features, num_cells = _features(path), len(_barcodes(path))
            if not num_cells:
                raise BadInput("it has no cells.")
            if _is_folder(path):
                shape = _mtx_header(path)[:2]
            else:
                with _matrix_group(path) as group:
                    shape = int(group["shape"][0]), int(group["shape"][1])
                    check_indptr(group, num_cells)
            if shape != (len(features.ids), num_cells):
                raise BadInput(
                    f"its matrix has the shape {shape} for {len(features.ids)} genes and {num_cells} cells."
                )
        genes = self._match(features)
        return FileReport(
            num_cells=num_cells,
            fingerprint=local_fingerprint(path),
            num_genes=genes.num_genes,
            num_genes_known=genes.num_genes - genes.num_unknown,
            unknown_genes=list(genes.unknown_examples),
            by_gene=_is_folder(path),
        )

    def cell_names(self, path: str) -> np.ndarray:
        """The barcodes."""
        with _reading():
            return _barcodes(path)

    def spool(self, path: str, piece_cells: int) -> None:
        """Sort the lines of a `matrix.mtx`, which can stand in any order, by cell."""
        with _reading():
            spool_entries(_mtx_entries(path), _mtx_header(path)[1], piece_cells, self._spooled(path))

    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[CellChunk]:
        """Read in chunks of about `CHUNK_ELEMENTS` stored entries."""
        strange = [name for name in columns if name != INDEX]
        if strange:
            raise BadInput(f"10x files have no column {strange[0]!r}, only barcodes ({INDEX}): add others with join.")
        with _reading():
            genes = self._match(_features(path))
            barcodes = _barcodes(path)[start:stop] if columns else None
            done = start
            for matrix in self._rows(path, start, stop, genes.num_genes):
                end = done + matrix.shape[0]
                names = {} if barcodes is None else {INDEX: barcodes[done - start : end - start]}
                metadata = pd.DataFrame(names, index=range(end - done))
                yield chunk_of_matrix(matrix, genes, metadata, done, self.tokenizer)
                done = end

    def _rows(self, path: str, start: int, stop: int, num_genes: int) -> Iterator[csr_matrix]:
        if _is_folder(path):
            yield from read_spooled(self._spooled(path), start, stop, num_genes)
            return
        with _matrix_group(path) as group:
            yield from read_rows(group, start, stop, num_genes)

    def _match(self, features: _Features) -> GeneMatch:
        """Only the features that are genes are looked up: antibodies and guides are none."""
        is_gene = np.array([kind == GENE_EXPRESSION for kind in features.types], dtype=bool)
        if self.config.gene_id_column not in (None, "id", "name"):
            raise BadInput(f"gene_id_column={self.config.gene_id_column!r}: features of 10x have an id and a name.")
        chosen = features.symbols if self.config.gene_id_column == "name" else features.ids
        names = [name for name, gene in zip(chosen, is_gene, strict=True) if gene]
        match = matched_genes(self.tokenizer, names, self.config, read_gene_symbols(self.config.gene_symbols))
        token_ids = np.full(len(is_gene), -1, dtype=np.int64)
        token_ids[is_gene] = match.token_ids
        others = int((~is_gene).sum())
        return replace(match, token_ids=token_ids, num_genes=len(is_gene), num_unknown=match.num_unknown + others)

    def _spooled(self, path: str) -> Path:
        return self.spool_folder / sha256(path.encode()).hexdigest()[:24]


def is_ten_x(path: Path) -> bool:
    """Whether a path is a 10x `.h5` file or a folder with a `matrix.mtx`."""
    return (path.suffix == ".h5" and path.is_file()) or _part(path, "matrix.mtx") is not None


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except (OSError, EOFError, RuntimeError, KeyError, ValueError) as error:
        raise BadInput(f"it cannot be read: {type(error).__name__}: {error}") from error


def _is_folder(path: str) -> bool:
    return Path(path).is_dir()


def _part(folder: Path, *names: str) -> Path | None:
    """The first of these files, plain or gzipped, that a folder has."""
    candidates = [folder / (name + end) for name in names for end in ("", ".gz")] if folder.is_dir() else []
    return next((path for path in candidates if path.is_file()), None)


def _required(path: str, *names: str) -> Path:
    part = _part(Path(path), *names)
    if part is None:
        raise BadInput(f"it has no {' or '.join(names)} (or the same with .gz) beside matrix.mtx.")
    return part


def _text(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _features(path: str) -> _Features:
    if _is_folder(path):
        with _text(_required(path, "features.tsv", "genes.tsv")) as file:
            lines = [line.rstrip("\r\n").split("\t") for line in file]
        kinds = [line[2] if len(line) > 2 else GENE_EXPRESSION for line in lines]
        return _Features([line[0] for line in lines], [line[1] if len(line) > 1 else line[0] for line in lines], kinds)
    with _matrix_group(path) as group:
        if "features" in group:  # Cell Ranger 3 and later
            table = group["features"]
            return _Features(_strings(table["id"]), _strings(table["name"]), _strings(table["feature_type"]))
        ids = _strings(group["genes"])
        return _Features(ids, _strings(group["gene_names"]), [GENE_EXPRESSION] * len(ids))


def _barcodes(path: str) -> np.ndarray:
    if _is_folder(path):
        with _text(_required(path, "barcodes.tsv")) as file:
            return np.array([line.rstrip("\r\n").split("\t")[0] for line in file], dtype=object)
    with _matrix_group(path) as group:
        return np.array(_strings(group["barcodes"]), dtype=object)


def _strings(dataset: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]


@contextmanager
def _matrix_group(path: str) -> Iterator[Any]:
    import h5py

    with h5py.File(path, "r") as file:
        groups = [name for name in file if isinstance(file[name], h5py.Group) and "indptr" in file[name]]
        if len(groups) != 1:
            raise BadInput(
                f"it has {len(groups)} matrices ({groups or list(file)}); Cell Ranger writes one for one genome."
            )
        yield file[groups[0]]


def _mtx_header(path: str) -> tuple[int, int, int, int]:
    """Genes, cells, entries, and the number of lines before the entries."""
    with _text(_required(path, "matrix.mtx")) as file:
        first = file.readline().split()
        if first[:3] != ["%%MatrixMarket", "matrix", "coordinate"] or first[3:] not in (
            ["integer", "general"],
            ["real", "general"],
        ):
            raise BadInput(f"its matrix.mtx starts with {' '.join(first)!r}, not as a matrix of counts does.")
        for number, line in enumerate(file, 2):
            if not line.startswith("%"):
                genes, cells, entries = (int(word) for word in line.split())
                return genes, cells, entries, number
    raise BadInput("its matrix.mtx ends before the entries.")


def _mtx_entries(path: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    genes, _, entries, header = _mtx_header(path)
    names, seen = ["gene", "cell", "count"], 0
    table = (
        pd.read_csv(
            _required(path, "matrix.mtx"),
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
        numbers = chunk["gene"].to_numpy() - 1  # from 1 in the file
        if not 0 <= int(numbers.min()) <= int(numbers.max()) < genes:
            raise BadInput(f"gene numbers of its matrix.mtx lie outside 1..{genes}: it is corrupt.")
        yield chunk["cell"].to_numpy() - 1, numbers, chunk["count"].to_numpy()
    if seen != entries:
        raise BadInput(f"its matrix.mtx has {seen} entries instead of {entries}: it is cut off or corrupt.")
