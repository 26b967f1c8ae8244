# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Datasets made by `tahoex1 prepare`: read their shards as flat arrays, mapped from disk or fetched from a URL."""

import contextlib
import json
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from tahoex1_hf.cells.ragged import RowViews, gather_rows
from tahoex1_hf.cells.readers.base import INDEX, BadInput, CellInput
from tahoex1_hf.cells.readers.manifests import check_local, parse_manifest
from tahoex1_hf.cells.rows import join_cells
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.reading import reading
from tahoex1_hf.encoding_tahoe_x1 import GeneRows

if TYPE_CHECKING:
    import pandas as pd

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Number of cells of a shard that are copied at a time.
_COPIED_CELLS = 4096
_DTYPES = {"uint16": np.uint16, "int32": np.int32, "float": np.float32}


@dataclass(frozen=True, eq=False)
class OpenShard:
    """An open shard.

    Attributes:
        cells: Views of the genes and counts of all cells, which lie in the file.
        table: All columns, for metadata.
        drug_ids: `(cells,)` int64 drug ids; None if no drugs were requested.
    """

    cells: RowViews
    table: pa.Table
    drug_ids: np.ndarray | None

    def gathered(self, start: int, stop: int) -> GeneRows:
        """Copy cells `start` to `stop` into new arrays, one after the other."""
        return self.picked(np.arange(start, stop))

    def picked(self, rows: np.ndarray) -> GeneRows:
        """Copy the cells with these row numbers into new arrays, one after the other."""
        cells, lengths = self.cells, self.cells.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        genes = np.empty(offsets[-1], dtype=cells.genes.dtype)
        counts = np.empty(offsets[-1], dtype=cells.counts.dtype)
        gather_rows(cells.genes, cells.gene_starts[rows], lengths, genes)
        gather_rows(cells.counts, cells.count_starts[rows], lengths, counts)
        return GeneRows(genes, counts.astype(np.float32, copy=False), offsets)


def open_shard(path: Path, drug_ids: Callable[[pa.ChunkedArray], np.ndarray] | None = None) -> OpenShard:
    """Open a shard. Arrow files are mapped without copying; Parquet files are read completely.

    Args:
        path: Path of the shard.
        drug_ids: Function that turns the column of drugs into the drug id of each cell; None for no drugs.

    Raises:
        ValueError: If the file is not a shard of a prepared dataset.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        whole, table = None, pq.read_table(path)
    else:
        whole = pa.memory_map(str(path)).read_buffer()
        table = pa.ipc.open_file(whole).read_all()
    genes, gene_starts, lengths = _flat(table, "genes", whole)
    counts, count_starts, count_lengths = _flat(table, "counts", whole)
    if not np.array_equal(lengths, count_lengths):
        raise ValueError(f"{path}: cells have different numbers of genes and counts.")
    drugs = None
    if drug_ids is not None:
        if "drug" not in table.column_names:
            raise ValueError(f"{path} has no column 'drug', only {table.column_names}: prepare it with drugs.")
        drugs = drug_ids(table.column("drug"))
    return OpenShard(RowViews(genes, gene_starts, counts, count_starts, lengths), table, drugs)


def _flat(table: pa.Table, name: str, whole: pa.Buffer | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values of a list column as one array, with the start and length of every row."""
    if name not in table.column_names or not pa.types.is_list(table.schema.field(name).type):
        raise ValueError(f"it has no list column {name!r}, but {table.schema.names}.")
    column = table.column(name)
    dtype = np.dtype(_DTYPES[str(column.type.value_type)])
    if column.null_count:
        raise ValueError(f"column {name!r} has missing rows.")
    if not len(column):
        return np.zeros(0, dtype=dtype), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    offsets = [np.asarray(chunk.offsets) for chunk in column.chunks]
    bases = _bases(column.chunks, dtype, whole)
    if bases is None:  # not in one mapping: join the chunks
        values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        lengths = np.concatenate([np.diff(part) for part in offsets]).astype(np.int64)
        return values, np.cumsum(lengths) - lengths, lengths
    assert whole is not None
    values = np.frombuffer(whole, dtype=dtype, count=whole.size // dtype.itemsize)
    starts = np.concatenate([part[:-1] + base for part, base in zip(offsets, bases, strict=True)])
    return values, starts.astype(np.int64), np.concatenate([np.diff(part) for part in offsets]).astype(np.int64)


def _bases(chunks: list[pa.ListArray], dtype: np.dtype, whole: pa.Buffer | None) -> list[int] | None:
    """Return the start of each chunk's values in the mapped file, in elements; None if some are not in the file."""
    if whole is None:
        return None
    bases = []
    for chunk in chunks:
        buffer = chunk.values.buffers()[1]
        place = 0 if buffer is None else buffer.address - whole.address
        if not 0 <= place <= whole.size or place % dtype.itemsize:
            return None
        bases.append(place // dtype.itemsize + chunk.values.offset)
    return bases


def _column_alone(path: Path, name: str) -> pa.ChunkedArray:
    """Read a single column of a shard."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name] if name in names else [])
    else:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()  # mapped: other columns are not read
        names = table.column_names
    if name not in names:
        raise ValueError(f"{path} has no column {name!r}, only {names}: prepare it with that column.")
    return table.column(name)


def _codes(column: pa.ChunkedArray) -> Iterator[tuple[list[Any], np.ndarray]]:
    """Yield, for each chunk of a column, its distinct values with None added, and the index of each row's value."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    for chunk in encoded.chunks:
        values = [*chunk.dictionary.to_pylist(), None]
        yield values, chunk.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False).astype(np.int64)


def count_values(column: pa.ChunkedArray) -> Counter[Any]:
    """Count the rows for each value of a column."""
    total: Counter[Any] = Counter()
    for values, codes in _codes(column):
        counts = np.bincount(codes, minlength=len(values)).tolist()
        total.update({value: number for value, number in zip(values, counts, strict=True) if number})
    return total


def column_ids(column: pa.ChunkedArray, to_ids: Callable[[list[Any]], np.ndarray]) -> np.ndarray:
    """Return the ids of a column's values, `(rows,)` int64; each distinct value of a chunk is looked up once."""
    parts = [to_ids(values)[codes] for values, codes in _codes(column)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


class PreparedDataset:
    """A local or remote prepared dataset and its open shards.

    Args:
        location: Folder, or a URL that fsspec supports (`hf://datasets/owner/name`, `s3://bucket/prefix`).
        split: `"train"` or `"validation"`.
        max_open: Number of shards that stay open, by default 16; the least recently used shards are closed.
        cache_folder: Folder for copies of remote shards; by default that of `ShardCache`.
        cache_bytes: Largest size of these copies in bytes, by default 20 GB, unless the shards in use are larger.
        drug_ids: Function that turns the column of drugs into drug ids, as in `open_shard`.
        storage_options: Options for fsspec.

    Raises:
        FileNotFoundError: If there is no prepared dataset.
        ValueError: If it has no such split.
    """

    def __init__(
        self,
        location: str | Path,
        split: str,
        *,
        max_open: int = 16,
        cache_folder: str | Path | None = None,
        cache_bytes: float = 20e9,
        drug_ids: Callable[[pa.ChunkedArray], np.ndarray] | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.location, self.split, self.drug_ids, self.max_open = str(location), split, drug_ids, max_open
        self.cache: ShardCache | None = None
        if "://" in self.location:
            self.cache = ShardCache(self.location, cache_folder, cache_bytes, storage_options or {})
        self.manifest = read_manifest(self.location, self.cache)
        splits = {name: part for name, part in self.manifest["splits"].items() if part["shards"]}
        if split not in splits:
            raise ValueError(f"split={split!r}: {self.location} has cells in {sorted(splits)}.")
        self.shards: list[dict[str, Any]] = splits[split]["shards"]
        self.sizes = [shard["cells"] for shard in self.shards]
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out open files when the object is copied to a worker process of a data loader."""
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def shard(self, number: int) -> OpenShard:
        """Return the shard with this number, opened; several threads may call this method."""
        with self._lock:
            found = self._open.get(number)
            if found is not None:
                self._open.move_to_end(number)
                return found
        record = self.shards[number]

        def opened(path: Path) -> OpenShard:
            with reading(path):
                shard = open_shard(path, self.drug_ids)
            if len(shard.cells.lengths) != record["cells"]:
                raise ValueError(
                    f"{path} has {len(shard.cells.lengths)} cells, not {record['cells']} as its manifest says."
                )
            return shard

        if self.cache is None:
            shard = opened(check_local(self.location, record))
        else:
            shard = self.cache.use(record, opened)
        with self._lock:
            self._open[number] = shard
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
        return shard

    def value_counts(self, name: str) -> Counter[Any]:
        """Count the cells for each value of a column, one shard after the other."""
        total: Counter[Any] = Counter()

        def count(path: Path) -> Counter[Any]:
            return count_values(_column_alone(path, name))

        for record in self.shards:
            local = Path(self.location) / record["file"]
            total.update(count(local) if self.cache is None else self.cache.use(record, count))
        return total

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Start fetching remote shards that will be needed soon."""
        if self.cache is not None:
            self.cache.prefetch([self.shards[number] for number in numbers])


def read_manifest(location: str, cache: "ShardCache | None" = None) -> dict[str, Any]:
    """Read the manifest of a dataset.

    Args:
        location: Folder or URL of the dataset.
        cache: Cache of a remote dataset's shards; if None, one is made for this call.

    Raises:
        FileNotFoundError: If there is no prepared dataset.
        ValueError: If the `manifest.json` is damaged or does not belong to a prepared dataset.
    """
    if cache is None and "://" in location:
        cache = ShardCache(location, None, 0, {})
    try:
        text = (Path(location) / "manifest.json").read_bytes() if cache is None else cache.read("manifest.json")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{location} is not a prepared dataset: it has no manifest.json. Make one with tahoex1 prepare."
        ) from None
    with reading(f"{location}/manifest.json"):
        return parse_manifest(text)


def check_vocabulary(folder: PreparedDataset, tokenizer: "TahoeX1Tokenizer") -> None:
    """Check that a dataset has the vocabulary of the tokenizer.

    Raises:
        ValueError: If the vocabularies differ.
    """
    with reading(f"{folder.location}/vocab.json"):
        if folder.cache is None:
            text = (Path(folder.location) / "vocab.json").read_bytes()
        else:
            text = folder.cache.read("vocab.json")
        vocabulary = json.loads(text)
    if vocabulary != tokenizer.get_vocab():
        raise ValueError(
            f"{folder.location} was prepared with another vocabulary, so its ids mean other genes than the "
            "tokenizer's. Prepare it with the vocab.json of the model."
        )


class PreparedInput(CellInput):
    """One split of a prepared dataset. A cell is named by its `_index`, or otherwise by its shard and row.

    Args:
        location: Folder or URL of the dataset.
        split: `"train"` or `"validation"`.
        tokenizer: Tokenizer with the vocabulary of the dataset.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it has no such split, or has another vocabulary.
    """

    genes = None

    def __init__(self, location: str, split: str, tokenizer: "TahoeX1Tokenizer"):
        self.path, self.tokenizer = f"{location} ({split})", tokenizer
        self.dataset = PreparedDataset(location, split)
        check_vocabulary(self.dataset, tokenizer)
        self.starts = np.concatenate([[0], np.cumsum(self.dataset.sizes)])
        self.num_cells = int(self.starts[-1])
        self.fingerprint = _digest_of(self.dataset.shards)

    def fingerprint_now(self) -> str:
        """Read the manifest again; shards are compared with it when they are opened."""
        return _digest_of(
            read_manifest(self.dataset.location, self.dataset.cache)["splits"][self.dataset.split]["shards"]
        )

    @property
    def obs_columns(self) -> list[str]:
        """Columns of metadata."""
        return [name for name in self.dataset.shard(0).table.column_names if name not in ("genes", "counts", INDEX)]

    def column(self, name: str) -> "pd.Series":
        """Read a column of metadata, or the names of the cells."""
        import pandas as pd

        numbers = range(len(self.dataset.sizes))
        return pd.concat([self._column(name, n, 0, self.dataset.sizes[n]) for n in numbers], ignore_index=True)

    def value_counts(self, name: str) -> Counter[Any]:
        """Count the cells for each value of a column of metadata, one shard after the other."""
        return self.dataset.value_counts(name)

    def _column(self, name: str, number: int, low: int, high: int) -> "pd.Series":
        """Return rows `low` to `high` of a shard's column."""
        import pandas as pd

        table = self.dataset.shard(number).table
        if name in table.column_names:
            values: pd.Series = table.column(name).slice(low, high - low).to_pandas()
            return values
        if name != INDEX:
            raise BadInput(f"it has no column {name!r}; there are {sorted(self.obs_columns)}.")
        stem = Path(self.dataset.shards[number]["file"]).stem
        return pd.Series([f"{stem}:{row}" for row in range(low, high)])

    def num_stored(self) -> np.ndarray | None:
        """Read the lengths of the cells in the shards, unless these are remote."""
        if self.dataset.cache is not None:
            return None
        return np.concatenate([self.dataset.shard(n).cells.lengths for n in range(len(self.dataset.sizes))])

    def rows(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[GeneRows]:
        """Copy rows of the shards, a few thousand cells at a time."""
        import pandas as pd

        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            self.dataset.prefetch(range(number, min(number + 2, len(self.dataset.sizes))))
            shard, first = self.dataset.shard(number), int(self.starts[number])
            for low in range(start, min(int(self.starts[number + 1]), stop), _COPIED_CELLS):
                high = min(low + _COPIED_CELLS, int(self.starts[number + 1]), stop)
                parts = {name: self._column(name, number, low - first, high - first).array for name in columns}
                obs = pd.DataFrame(parts, index=range(high - low))
                yield shard.gathered(low - first, high - first)._replace(first_cell=low, obs=obs)
                start = high
            number += 1

    def rows_at(self, numbers: np.ndarray) -> GeneRows:
        """Copy rows of the shards."""
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        parts = []
        for number in np.unique(owners):
            mine = numbers[owners == number] - self.starts[number]
            shard = self.dataset.shard(int(number))
            parts.append(shard.picked(mine))
        return join_cells(parts)


def _digest_of(shards: list[dict[str, Any]]) -> str:
    return sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()


class ShardCache:
    """Copies of remote shards in a local folder of limited size, compared with the digests in the manifest.

    Several processes may share the folder.

    Args:
        url: URL of the dataset.
        folder: Folder of the cache; by default the environment variable `TAHOEX1_DATA_CACHE`, or else
            `~/.cache/tahoex1_hf/data`.
        max_bytes: Largest size of the copies in bytes, unless the shards in use are larger.
        options: Options for fsspec.
    """

    def __init__(self, url: str, folder: str | Path | None, max_bytes: float, options: dict[str, Any]) -> None:
        self.url = url.rstrip("/")
        default = os.environ.get("TAHOEX1_DATA_CACHE") or Path.home() / ".cache" / "tahoex1_hf" / "data"
        root = default if folder is None else folder
        self.folder = Path(root) / sha256(self.url.encode()).hexdigest()[:16]
        self.max_bytes, self.options = max_bytes, options
        self._wanted: set[str] = set()
        self._running: dict[str, Future[Path]] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out threads when the object is copied to a worker process of a data loader."""
        return {**self.__dict__, "_running": {}, "_lock": None, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def read(self, name: str) -> bytes:
        """Read a small file without keeping a copy."""
        import fsspec

        with fsspec.open(f"{self.url}/{name}", "rb", **self.options) as file:
            return file.read()

    def prefetch(self, records: list[dict[str, Any]]) -> None:
        """Start fetching these shards in the background; only they count as in use from now on."""
        with self._lock:
            self._wanted = {self.path_of(record).name for record in records}
        for record in records:
            self._start(record)

    def fetch(self, record: dict[str, Any]) -> Path:
        """Return the path of a shard's copy, after waiting for it if necessary."""
        while True:
            path = self._start(record).result()
            with contextlib.suppress(FileNotFoundError):  # another process may have made room meanwhile
                with contextlib.suppress(PermissionError):  # the copy may be another user's
                    os.utime(path)
                return path
            with self._lock:
                self._running.pop(path.name, None)

    def use(self, record: dict[str, Any], read: Callable[[Path], _Result]) -> _Result:
        """Return the result of `read` for a shard's copy; repeat it if another process removed the copy first."""
        while True:
            path = self.fetch(record)
            try:
                return read(path)
            except FileNotFoundError:
                if path.is_file():
                    raise

    def _start(self, record: dict[str, Any]) -> "Future[Path]":
        path = self.path_of(record)
        with self._lock:
            running = self._running.get(path.name)
            if running is not None and not (running.done() and (running.exception() or not path.is_file())):
                return running
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2, thread_name_prefix="fetch-shard")
            future = self._running[path.name] = self._pool.submit(self._download, record, path)
            return future

    def path_of(self, record: dict[str, Any]) -> Path:
        """Return the path that a shard's copy has or will have."""
        return self.folder / f"{record['sha256'][:16]}-{Path(record['file']).name}"

    def _download(self, record: dict[str, Any], path: Path) -> Path:
        import fsspec

        if _size_and_time(path)[0] == record["bytes"] and _digest_of_file(path) == record["sha256"]:
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(record["bytes"])
        digest = sha256()
        with WholeFile(path) as partial:
            with (
                fsspec.open(f"{self.url}/{record['file']}", "rb", **self.options) as remote,
                partial.open("wb") as file,
            ):
                while block := remote.read(2**22):
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != record["sha256"]:
                raise ValueError(f"{self.url}/{record['file']} does not have the checksum that its manifest names.")
        return path

    def _make_room(self, size: int) -> None:
        """Remove the least recently used copies that are not in use until there is room for `size` bytes."""
        with self._lock:
            wanted = set(self._wanted)
        files = [(path, *_size_and_time(path)) for path in self.folder.iterdir() if path.name[0] != "."]
        total = size + sum(held for _, held, _ in files)
        for path, held, _ in sorted(files, key=lambda item: item[2]):
            if total <= self.max_bytes:
                break
            if path.name not in wanted:
                path.unlink(missing_ok=True)  # a mapped file stays readable until it is closed
                total -= held


def _digest_of_file(path: Path) -> str:
    """Return a file's digest, or nothing where another process removed it or it may not be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
    return ""


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its time of change in nanoseconds; zeros if another process removed it."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return 0, 0
    return state.st_size, state.st_mtime_ns
