# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cells in the columns of the Hub dataset `tahoebio/Tahoe-100M`: Parquet and Arrow files, local or remote.

A row is a cell: `genes` (numbers of the dataset's gene table) and `expressions` (their counts), both starting with
`<cls>`, and columns of metadata. Remote Parquet is read range by range; remote Arrow files, which cannot be read in
part without their table of contents, are copied to the spool folder first.
"""

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, INDEX, BadInput, CellChunk
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.data.sources.base import CellSource, FileReport, matched_genes
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, as_counts, count_problem, merge_repeats

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from tahoex1_hf.data.config import Tahoe100MSource

GENES, COUNTS, BARCODE = "genes", "expressions", "BARCODE_SUB_LIB_ID"
SUFFIXES = (".parquet", ".arrow")

_CLS_TOKEN, _CLS_VALUE = 1, -2
_HUB = "hf://datasets/"
# Most cells read at once, however few genes they have.
_MOST_CELLS = 8192
# A Parquet column is read in pieces of this size, so that a long row group is never in memory whole.
_BUFFER_BYTES = 2**23


class Tahoe100MFiles(CellSource):
    """Parquet and Arrow files with the columns of Tahoe-100M. The name of a cell is its `BARCODE_SUB_LIB_ID`."""

    config: "Tahoe100MSource"

    def list_files(self) -> list[str]:
        """The files: paths, or addresses (`hf://`, `s3://`, ...), which are the same online and offline."""
        files: set[str] = set()
        for path in self.config.paths:
            found = _find(path)
            if not found:
                raise BadInput(f"{path} has no file that ends in {' or '.join(SUFFIXES)}: check the path.")
            files.update(found)
        return sorted(files)

    def inspect(self, path: str) -> FileReport:
        """Count the cells, check the columns, and match the gene table with the vocabulary."""
        genes = self._genes
        with self._opened(path) as reader:
            _check_schema(reader.schema)
            num_cells = reader.num_cells
        if not num_cells:
            raise BadInput("it has no cells: leave the file out.")
        return FileReport(
            num_cells=num_cells,
            fingerprint=_fingerprint(path),
            num_genes=genes.match.num_genes,
            num_genes_known=int((genes.match.token_ids >= 0).sum()),
            unknown_genes=list(genes.match.unknown_examples),
        )

    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[CellChunk]:
        """Cells `start` to `stop`; only row groups and columns that are needed are read."""
        wanted = list(dict.fromkeys([GENES, COUNTS, *(BARCODE if name == INDEX else name for name in columns)]))
        with self._opened(path) as reader:
            _check_schema(reader.schema)
            missing = [name for name in wanted if name not in reader.schema.names]
            if missing:
                raise BadInput(f"it has no columns {missing}, only {reader.schema.names}.")
            if not 0 <= start <= stop <= reader.num_cells:
                raise ValueError(f"cells {start} to {stop} of a file with {reader.num_cells}.")
            first = start
            for batch in reader.batches(start, stop, wanted):
                for piece in _bounded(batch):
                    yield self._chunk(piece, first, columns)
                    first += piece.num_rows
        if first < stop:
            raise BadInput(f"it ends after {first} cells: it changed, or is damaged.")

    @cached_property
    def _genes(self) -> "_GeneTable":
        """The gene table and its tokens, read once per process."""
        try:
            with self._opened(self.config.gene_metadata) as reader:
                lacks = [name for name in ("token_id", "ensembl_id") if name not in reader.schema.names]
                if lacks:
                    raise BadInput(f"it has no columns {lacks}, only {reader.schema.names}.")
                batches = list(reader.batches(0, reader.num_cells, ["token_id", "ensembl_id"]))
        except BadInput as error:
            raise BadInput(f"gene_metadata={self.config.gene_metadata!r}: {error}") from None
        numbers = [number for batch in batches for number in batch["token_id"].to_pylist()]
        names = [name for batch in batches for name in batch["ensembl_id"].to_pylist()]
        whole = all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers)
        named = all(isinstance(name, str) for name in names)
        if not numbers or not whole or not named or len(set(numbers)) < len(numbers):
            raise BadInput(
                f"gene_metadata={self.config.gene_metadata!r} must give each token_id, a whole number that stands "
                "once, an ensembl_id."
            )
        return _GeneTable.make(numbers, names, matched_genes(self.tokenizer, names, self.config, None))

    def _chunk(self, batch: "pa.RecordBatch", first_cell: int, columns: Sequence[str]) -> CellChunk:
        tokens, counts, offsets = _without_cls(batch, first_cell)
        ours = self._genes.translate(tokens, offsets, first_cell)
        problem, _ = count_problem(GeneRows(tokens, counts, offsets), first_cell, self._genes.names)
        if problem is not None:
            raise BadInput(problem)
        known = ours >= 0
        unknown = float(counts[~known].sum(dtype=np.float64))
        rows = GeneRows(ours, counts, offsets).select(known & (counts > 0))
        return CellChunk(merge_repeats(rows) if _may_repeat(rows) else rows, _metadata(batch, columns), unknown)

    @contextmanager
    def _opened(self, path: str) -> Iterator["_Reader"]:
        """Open a file of either kind; what its content makes of reading it becomes BadInput."""
        import pyarrow as pa

        try:
            if path.endswith(".parquet"):
                with _open_parquet(path) as file:
                    yield _ParquetReader(file)
            else:
                local = _local_path(path) or self._copy(path)
                with pa.memory_map(local) as source:
                    yield _ArrowReader(source)
        except FileNotFoundError:
            raise BadInput("it does not exist: check the path.") from None
        except (pa.ArrowException, OSError) as error:
            # pyarrow has plain OSErrors without a number for damaged content; others are the disk's or the network's,
            # and say nothing about the file.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            raise BadInput(f"it cannot be read ({str(error).strip()}): fetch or write it again.") from None

    def _copy(self, path: str) -> str:
        """A copy of a remote file in the spool folder, made once."""
        key = hashlib.sha256(f"{path}\0{_fingerprint(path)}".encode()).hexdigest()[:24]
        target = self.spool_folder / f"tahoe-100m-{key}.arrow"
        if not target.exists():
            self.spool_folder.mkdir(parents=True, exist_ok=True)
            filesystem, name = _filesystem(path)
            # Several processes may copy it: each replaces it with the same content.
            with WholeFile(target) as partial:
                filesystem.get_file(name, str(partial))
        return str(target)


# The gene table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GeneTable:
    """Numbers of the dataset -> tokens of the vocabulary.

    Attributes:
        names: number -> Ensembl id.
        tokens: number -> token; -1 where the vocabulary lacks the gene, -2 where the table has no such number.
        match: how the table was matched.
    """

    names: dict[int, str]
    tokens: np.ndarray
    match: GeneMatch

    @classmethod
    def make(cls, numbers: list[int], names: list[str], match: GeneMatch) -> "_GeneTable":
        tokens = np.full(max(numbers) + 1, -2, dtype=np.int64)
        tokens[numbers] = match.token_ids
        return cls(dict(zip(numbers, names, strict=True)), tokens, match)

    def translate(self, numbers: np.ndarray, offsets: np.ndarray, first_cell: int) -> np.ndarray:
        """Tokens of the vocabulary, -1 for genes that it lacks."""
        inside = (numbers >= 0) & (numbers < len(self.tokens))
        tokens = np.where(inside, self.tokens[np.where(inside, numbers, 0)], -2)
        wrong = np.flatnonzero(tokens == -2)
        if len(wrong):
            cell = first_cell + int(np.searchsorted(offsets, wrong[0], side="right")) - 1
            some = np.unique(numbers[wrong])[:5].tolist()
            raise BadInput(
                f"{GENES}: cell {cell} has the number {numbers[wrong[0]]}, which is not in gene_metadata (those that "
                f"are not: {some}). Name the gene table that belongs to the file."
            )
        return tokens


# Rows of the files ------------------------------------------------------------------------------------


class _Reader(ABC):
    """A file of cells: its schema, how many cells, and batches of rows."""

    schema: "pa.Schema"
    num_cells: int

    @abstractmethod
    def batches(self, start: int, stop: int, columns: list[str]) -> Iterator["pa.RecordBatch"]:
        """Rows `start` to `stop`, of these columns."""


class _ParquetReader(_Reader):
    def __init__(self, file: Any) -> None:
        self.file, self.schema, self.num_cells = file, file.schema_arrow, file.metadata.num_rows

    def batches(self, start: int, stop: int, columns: list[str]) -> Iterator["pa.RecordBatch"]:
        metadata = self.file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        first, last = (int(number) for number in np.searchsorted(ends, [start, stop - 1], side="right"))
        if start == stop:
            return
        at = int(ends[first]) - sizes[first]
        groups = list(range(first, last + 1))
        for batch in self.file.iter_batches(self._cells_at_once(groups), row_groups=groups, columns=columns):
            piece = batch.slice(max(start - at, 0), max(min(stop, at + batch.num_rows) - max(start, at), 0))
            at += batch.num_rows
            if piece.num_rows:
                yield piece
            if at >= stop:
                return

    def _cells_at_once(self, groups: list[int]) -> int:
        """About as many as have `CHUNK_ELEMENTS` genes: the widest column tells how many a cell has."""
        metadata = self.file.metadata
        most = 1.0
        for number in groups:
            group = metadata.row_group(number)
            values = max((group.column(column).num_values for column in range(group.num_columns)), default=0)
            most = max(most, values / max(group.num_rows, 1))
        return int(min(max(CHUNK_ELEMENTS / most, 1), _MOST_CELLS))


class _ArrowReader(_Reader):
    """Either form of an IPC file: with a table of contents, or a stream, as `datasets` writes it."""

    def __init__(self, source: Any) -> None:
        import pyarrow as pa

        self.source = source
        magic = source.read(6)
        source.seek(0)
        self.is_file = magic == b"ARROW1"
        self.schema = (pa.ipc.open_file(source) if self.is_file else pa.ipc.open_stream(source)).schema
        self.num_cells = sum(batch.num_rows for batch in self._all([]))

    def _all(self, columns: list[str]) -> Iterator["pa.RecordBatch"]:
        """Every batch; the file is mapped, so that what is not looked at is not read."""
        import pyarrow as pa

        # an empty list would mean all columns
        fields = sorted(self.schema.get_field_index(name) for name in columns) or [_lightest(self.schema)]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        self.source.seek(0)
        if self.is_file:
            reader = pa.ipc.open_file(self.source, options=options)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(self.source, options=options)

    def batches(self, start: int, stop: int, columns: list[str]) -> Iterator["pa.RecordBatch"]:
        at = 0
        for batch in self._all(columns):
            if at >= stop:
                return
            piece = batch.slice(max(start - at, 0), max(min(stop, at + batch.num_rows) - max(start, at), 0))
            at += batch.num_rows
            for first in range(0, piece.num_rows, _MOST_CELLS):
                yield piece.slice(first, _MOST_CELLS)


def _lightest(schema: "pa.Schema") -> int:
    """A column of one value per cell, where there is one."""
    import pyarrow as pa

    return next((number for number, field in enumerate(schema) if not pa.types.is_nested(field.type)), 0)


def _check_schema(schema: "pa.Schema") -> None:
    import pyarrow as pa

    for name, wanted in ((GENES, pa.types.is_integer), (COUNTS, _is_number)):
        if name not in schema.names:
            raise BadInput(f"it has no column {name!r}, only {schema.names}: it is not in the layout of Tahoe-100M.")
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not wanted(kind.value_type):
            raise BadInput(f"its column {name!r} is {kind}, no list of {'integers' if name == GENES else 'numbers'}.")


def _is_number(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _bounded(batch: "pa.RecordBatch") -> Iterator["pa.RecordBatch"]:
    """Cut a batch so that no piece of several cells has more than `CHUNK_ELEMENTS` genes."""
    import pyarrow.compute as pc

    ends = np.cumsum(
        pc.fill_null(pc.list_value_length(batch[GENES]), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    first = 0
    while first < batch.num_rows:
        before = int(ends[first - 1]) if first else 0
        upto = int(np.searchsorted(ends, before + CHUNK_ELEMENTS, side="right"))
        upto = max(upto, first + 1)
        yield batch.slice(first, upto - first)
        first = upto


def _without_cls(batch: "pa.RecordBatch", first_cell: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the genes and counts of all cells, and offsets, without the first pair of every cell."""
    import pyarrow.compute as pc

    lengths, flat = {}, {}
    for name in (GENES, COUNTS):
        values = batch[name].flatten()
        if batch[name].null_count or values.null_count:
            raise BadInput(f"{name}: cells {first_cell} to {first_cell + batch.num_rows - 1} have missing values.")
        lengths[name] = pc.list_value_length(batch[name]).to_numpy(zero_copy_only=False).astype(np.int64)
        flat[name] = values.to_numpy(zero_copy_only=False)
    sizes = lengths[GENES]
    uneven = np.flatnonzero(sizes != lengths[COUNTS])
    if len(uneven):
        cell = uneven[0]
        raise BadInput(f"cell {first_cell + cell} has {sizes[cell]} {GENES}, but {lengths[COUNTS][cell]} {COUNTS}.")
    starts = np.cumsum(sizes) - sizes
    wrong = sizes == 0
    places = starts[~wrong]
    wrong[~wrong] = (flat[GENES][places] != _CLS_TOKEN) | (flat[COUNTS][places] != _CLS_VALUE)
    if wrong.any():
        cell = int(np.flatnonzero(wrong)[0])
        pair = [flat[name][starts[cell]].item() for name in (GENES, COUNTS)] if sizes[cell] else "nothing"
        raise BadInput(
            f"cell {first_cell + cell} starts with {pair}, not with <cls> ({_CLS_TOKEN}, {_CLS_VALUE}): it is not "
            "in the layout of Tahoe-100M."
        )
    keep = np.ones(len(flat[GENES]), dtype=bool)
    keep[starts] = False
    offsets = np.concatenate([[0], np.cumsum(sizes - 1)])
    return flat[GENES][keep].astype(np.int64), as_counts(flat[COUNTS][keep]), offsets


def _may_repeat(rows: GeneRows) -> bool:
    """False where the tokens of every cell rise, so that none can stand twice: spares a sort."""
    falls = np.flatnonzero(np.diff(rows.tokens) <= 0) + 1
    return not np.isin(falls, rows.offsets).all()


def _metadata(batch: "pa.RecordBatch", columns: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    values = {name: batch[BARCODE if name == INDEX else name].to_pandas() for name in columns}
    return pd.DataFrame(values, index=pd.RangeIndex(batch.num_rows), columns=list(columns))


# Addresses --------------------------------------------------------------------------------------------


def _find(path: str) -> list[str]:
    """Files of a path: itself, those in a folder at any depth, or those that a glob matches."""
    local = _local_path(path)
    if local is None:
        filesystem, name = _filesystem(path)
        try:
            found = filesystem.glob(name) if glob.has_magic(name) else filesystem.find(name)
        except FileNotFoundError:
            found = []
        return [filesystem.unstrip_protocol(each) for each in found if each.endswith(SUFFIXES)]
    if os.path.isfile(local):
        return [path] if path.endswith(SUFFIXES) else []
    pattern = os.path.join(glob.escape(local), "**", "*") if os.path.isdir(local) else local
    found = [each for each in glob.glob(pattern, recursive=True) if each.endswith(SUFFIXES) and os.path.isfile(each)]
    if not path.startswith(_HUB):
        return found
    root, address, _ = _cached_snapshot(path)
    return [f"{address}/{os.path.relpath(each, root).replace(os.sep, '/')}" for each in found]


def _local_path(path: str) -> str | None:
    """Where a file is on this machine, None for one that is read from afar."""
    if path.startswith(_HUB):
        import huggingface_hub.constants

        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            return None
        root, _, inside = _cached_snapshot(path)
        local = os.path.join(root, inside)
        if not glob.has_magic(inside) and not os.path.exists(local):
            raise BadInput(f"{path} is not in the Hub's cache ({root}), and HF_HUB_OFFLINE is set.{_DOWNLOAD}")
        return local
    if path.startswith("file://"):
        return path.removeprefix("file://")
    return None if "://" in path else path


_DOWNLOAD = " Download it (hf download --repo-type dataset), or unset HF_HUB_OFFLINE."


def _cached_snapshot(path: str) -> tuple[str, str, str]:
    """Folder of a dataset in the Hub's cache, the dataset's address, and the path inside both."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    owner, _, rest = path.removeprefix(_HUB).partition("/")
    name, _, inside = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise BadInput(f"{path} names no dataset: write {_HUB}OWNER/NAME/PATH.")
    try:
        root = snapshot_download(
            f"{owner}/{name}", repo_type="dataset", revision=unquote(revision) or None, local_files_only=True
        )
    except LocalEntryNotFoundError:
        raise BadInput(
            f"the dataset {owner}/{name} is not in the Hub's cache, and HF_HUB_OFFLINE is set.{_DOWNLOAD}"
        ) from None
    address = _HUB + "/".join(path.removeprefix(_HUB).split("/")[:2])
    return root, address, inside


def _filesystem(path: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    try:
        if path.startswith("s3://"):
            import botocore.session

            # without credentials s3fs would refuse to read what is open to all
            options["anon"] = botocore.session.get_session().get_credentials() is None
        return url_to_fs(path, **options)
    except ImportError as error:
        extra = " (pip install 'tahoex1_hf[s3]')" if path.startswith("s3://") else ""
        raise ImportError(f"Reading {path} needs a package that is not installed{extra}: {error}") from error
    except ValueError as error:
        raise BadInput(f"{path} cannot be read: {error}") from None


@contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    local = _local_path(path)
    if local is not None:
        with pq.ParquetFile(local, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield file
        return
    filesystem, name = _filesystem(path)
    # pyarrow asks for whole pieces of columns, in the order in which it needs them: reading ahead would be wasted
    with filesystem.open(name, "rb", cache_type="none") as source:
        with pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield file


def _fingerprint(path: str) -> str:
    """What changes when a file's content does."""
    local = _local_path(path)
    if local is not None:
        if path.startswith(_HUB) and os.path.islink(local):
            return os.path.basename(os.path.realpath(local))  # the cache names content by its hash, as the Hub does
        status = os.stat(local)
        return f"{status.st_size}-{status.st_mtime_ns}"
    filesystem, name = _filesystem(path)
    info = filesystem.info(name)
    lfs = info.get("lfs") or {}
    content_hash = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    for value in (content_hash, *(info.get(key) for key in ("blob_id", "ETag", "etag", "checksum", "md5Hash"))):
        if value:
            return str(value).strip('"')
    times = [info[key] for key in ("LastModified", "mtime", "last_modified", "created") if info.get(key)]
    return "-".join(map(str, [info.get("size"), *times[:1]]))
