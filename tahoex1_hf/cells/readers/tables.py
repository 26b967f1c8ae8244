# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Parquet and Arrow files with a row per cell, on disk, on the Hub (or offline in its cache), or at any other URL.

Remote Parquet files are read range by range. Remote Arrow files are first copied to a folder, since they cannot be
read in part without their table of contents.
"""

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, BadInput
from tahoex1_hf.common.files import WholeFile

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".arrow")

_HUB = "hf://datasets/"
# Largest number of cells that are read at once, however few genes they have.
_MOST_CELLS = 8192
# A Parquet column is read in pieces of this size, so that a long row group is never completely in memory.
_BUFFER_BYTES = 2**23


class TableReader(ABC):
    """A file of cells, which is read in batches of rows.

    Attributes:
        schema: Schema of the file.
        num_cells: Number of cells.
    """

    schema: "pa.Schema"
    num_cells: int

    @abstractmethod
    def batches(
        self, start: int, stop: int, columns: list[str], most: int = CHUNK_ELEMENTS
    ) -> Iterator["pa.RecordBatch"]:
        """Yield these columns of rows `start` to `stop`, in batches of about `most` values."""


class ParquetReader(TableReader):
    """A Parquet file, read row group by row group."""

    def __init__(self, file: Any) -> None:
        self.file, self.schema, self.num_cells = file, file.schema_arrow, file.metadata.num_rows

    def batches(
        self, start: int, stop: int, columns: list[str], most: int = CHUNK_ELEMENTS
    ) -> Iterator["pa.RecordBatch"]:
        """Read only the row groups that hold the rows."""
        metadata = self.file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        first, last = (int(number) for number in np.searchsorted(ends, [start, stop - 1], side="right"))
        if start == stop:
            return
        at = int(ends[first]) - sizes[first]
        groups = list(range(first, last + 1))
        for batch in self.file.iter_batches(self._cells_at_once(groups, most), row_groups=groups, columns=columns):
            piece = batch.slice(max(start - at, 0), max(min(stop, at + batch.num_rows) - max(start, at), 0))
            at += batch.num_rows
            if piece.num_rows:
                yield piece
            if at >= stop:
                return

    def _cells_at_once(self, groups: list[int], elements: int) -> int:
        """Return the number of cells that have about `elements` genes, judged by the column with the most values."""
        metadata = self.file.metadata
        most = 1.0
        for number in groups:
            group = metadata.row_group(number)
            values = max((group.column(column).num_values for column in range(group.num_columns)), default=0)
            most = max(most, values / max(group.num_rows, 1))
        return int(min(max(elements / most, 1), _MOST_CELLS))


class ArrowReader(TableReader):
    """An Arrow file of either form: with a table of contents, or a stream as written by `datasets`."""

    def __init__(self, source: Any) -> None:
        import pyarrow as pa

        self.source = source
        magic = source.read(6)
        source.seek(0)
        self.is_file = magic == b"ARROW1"
        self.schema = (pa.ipc.open_file(source) if self.is_file else pa.ipc.open_stream(source)).schema
        self.num_cells = sum(batch.num_rows for batch in self._all([]))

    def _all(self, columns: list[str]) -> Iterator["pa.RecordBatch"]:
        """Yield every batch; the file is mapped, so that only the parts in use are read."""
        import pyarrow as pa

        # An empty list would mean all columns.
        fields = sorted(self.schema.get_field_index(name) for name in columns) or [_lightest(self.schema)]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        self.source.seek(0)
        if self.is_file:
            reader = pa.ipc.open_file(self.source, options=options)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(self.source, options=options)

    def batches(
        self, start: int, stop: int, columns: list[str], most: int = CHUNK_ELEMENTS
    ) -> Iterator["pa.RecordBatch"]:
        """Cut the batches stored in the file."""
        at = 0
        for batch in self._all(columns):
            if at >= stop:
                return
            piece = batch.slice(max(start - at, 0), max(min(stop, at + batch.num_rows) - max(start, at), 0))
            at += batch.num_rows
            for first in range(0, piece.num_rows, _MOST_CELLS):
                yield piece.slice(first, _MOST_CELLS)


def _lightest(schema: "pa.Schema") -> int:
    """Return the number of the first column with one value per cell; 0 if there is none."""
    import pyarrow as pa

    return next((number for number, field in enumerate(schema) if not pa.types.is_nested(field.type)), 0)


@contextmanager
def open_table(path: str, spool: Path | None) -> Iterator["TableReader"]:
    """Open a Parquet or Arrow file, and raise BadInput for errors that come from its content.

    Args:
        path: Path or URL of the file.
        spool: Folder for copies of remote Arrow files; None if there is none.
    """
    import pyarrow as pa

    try:
        if path.endswith(".parquet"):
            with _open_parquet(path) as file:
                yield ParquetReader(file)
        else:
            local = _local_path(path) or _copy(path, spool)
            with pa.memory_map(local) as source:
                yield ArrowReader(source)
    except FileNotFoundError:
        raise BadInput("it does not exist: check the path.") from None
    except (pa.ArrowException, OSError) as error:
        # pyarrow reports damaged content by a plain OSError without a number. Other OSErrors come from the disk or
        # the network, and say nothing about the file.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise BadInput(f"it cannot be read ({str(error).strip()}): fetch or write it again.") from None


def _copy(path: str, spool: Path | None) -> str:
    """Return the path of the copy of a remote file in the spool folder; make the copy if it does not exist."""
    key = hashlib.sha256(f"{path}\0{table_fingerprint(path)}".encode()).hexdigest()[:24]
    if spool is None:
        raise BadInput("it is a remote Arrow file: name a folder for its copy, or use Parquet.")
    target = spool / f"tahoe-100m-{key}.arrow"
    if not target.exists():
        spool.mkdir(parents=True, exist_ok=True)
        filesystem, name = _filesystem(path)
        # If several processes copy the file, each replaces the copy with the same content.
        with WholeFile(target) as partial:
            filesystem.get_file(name, str(partial))
    return str(target)


def find_files(path: str) -> list[str]:
    """Return the files that a path stands for: the file itself, all files in a folder, or all matches of a glob."""
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
    """Return the path of a file on this machine; None for a remote file."""
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
    """Return a dataset's folder in the Hub's cache, the dataset's URL, and the path of the file inside both."""
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

            # Without credentials, s3fs reads public data only if it is told to be anonymous.
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
    # pyarrow requests complete pieces of columns in the order in which it needs them, so reading ahead is useless.
    with filesystem.open(name, "rb", cache_type="none") as source:
        with pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield file


def table_fingerprint(path: str) -> str:
    """Return a text that changes when the file's content does."""
    local = _local_path(path)
    if local is not None:
        if path.startswith(_HUB) and os.path.islink(local):
            return os.path.basename(os.path.realpath(local))  # like the Hub, the cache names content by its hash
        return content_fingerprint(local)
    filesystem, name = _filesystem(path)
    info = filesystem.info(name)
    lfs = info.get("lfs") or {}
    content_hash = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    for value in (content_hash, *(info.get(key) for key in ("blob_id", "ETag", "etag", "checksum", "md5Hash"))):
        if value:
            return str(value).strip('"')
    times = [info[key] for key in ("LastModified", "mtime", "last_modified", "created") if info.get(key)]
    return "-".join(map(str, [info.get("size"), *times[:1]]))
