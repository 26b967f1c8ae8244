# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The original's training data: MDS shards with `genes` (token ids) and `expressions`, local or on S3."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.cells.genes import GeneOptions, matched_genes
from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, INDEX, BadInput, check_counts, token_dtype
from tahoex1_hf.data.config import MDSSource
from tahoex1_hf.data.sources.base import FileReport, SourceReader
from tahoex1_hf.data.sources.mds_format import (
    INDEX_FILE,
    Shard,
    ShardReader,
    StoredFile,
    check_stored,
    decoder_of,
    decompress,
    parse_index,
)
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, count_problem, merge_repeats
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

GENES, EXPRESSIONS, CELL_ID = "genes", "expressions", "id"
_UNKNOWN, _SPECIAL, _ABSENT = -1, -2, -3  # marks for source ids that are none of our tokens
_NOT_IN_VOCABULARY = "gene id {id} is not in source_vocab: name the vocab.json that the shards were made with."
_METADATA_TYPES = (str, int, float, bytes, Decimal, type(None))
_Result = TypeVar("_Result")


class _Vocabulary(NamedTuple):
    """Meaning of the ids in the shards: by id, our token (or one of the marks above) and the name."""

    tokens: np.ndarray
    names: dict[int, str]
    match: GeneMatch


class MDSFiles(SourceReader):
    """Shards that mosaicml-streaming wrote. A file is a shard: its folder and the `basename` of its raw form."""

    config: MDSSource

    def __init__(self, config: MDSSource, tokenizer: TahoeX1Tokenizer, spool: Path) -> None:
        super().__init__(config, tokenizer, spool)
        self._roots = [path.removesuffix("/" + INDEX_FILE).rstrip("/") or "/" for path in config.paths]
        self._store = _Store()
        self._shards: dict[str, tuple[str, Shard]] = {}
        self._indexed: set[str] = set()
        self._vocabulary: _Vocabulary | None = None

    def list_files(self) -> list[str]:
        """List the shards that every `index.json` in and below the paths lists, each once.

        Raises:
            FileNotFoundError: If a path does not exist, or has no index.
            BadInput: For an index that is damaged.
        """
        for root in self._roots:
            folders = self._store.folders_with(root, INDEX_FILE)
            if not folders:
                raise FileNotFoundError(
                    f"{root} holds no {INDEX_FILE}, by which MDS shards are found: name their folder, or one above it."
                )
            for folder in folders:
                self._read_index(folder)
        return sorted(self._shards)

    def inspect(self, path: str) -> FileReport:
        """Look a shard up in its index, and check that its file is there; its content is not read."""
        folder, shard = self._shard(path)
        if not shard.samples:
            raise BadInput("it has no cells.")
        for column in (GENES, EXPRESSIONS):
            if column not in shard.columns:
                raise BadInput(f"it has no column {column!r}, only {sorted(shard.columns)}: it holds no cells.")
            decoder_of(shard.columns[column])
        url, _ = self._stored(folder, shard)
        hashes = shard.raw.hashes or (shard.packed.hashes if shard.packed else {})
        known = ", ".join(f"{name} {digest}" for name, digest in sorted(hashes.items()))
        genes = self._source_vocabulary().match
        return FileReport(
            num_cells=shard.samples,
            fingerprint=known or self._store.fingerprint(url),
            num_genes=genes.num_genes,
            num_genes_known=genes.num_genes - genes.num_unknown,
            unknown_genes=list(genes.unknown_examples),
        )

    def read(self, path: str, start: int, stop: int, columns: Sequence[str]) -> Iterator[GeneRows]:
        """Check a shard's hashes, decompress it into the spool folder for as long as it is read, and decode it."""
        folder, shard = self._shard(path)
        wanted = {name: CELL_ID if name == INDEX else name for name in columns}
        others = sorted(set(shard.columns) - {GENES, EXPRESSIONS})
        for name, column in wanted.items():
            if column not in others:
                what = f"no column {CELL_ID!r} to name its cells ({INDEX})" if name == INDEX else f"no column {name!r}"
                raise BadInput(f"it has {what}; its columns of metadata are {others}.")
        if not 0 <= start <= stop <= shard.samples:
            raise ValueError(f"cells {start} to {stop} of {path}, which has {shard.samples}.")
        with self._unpacked(folder, shard) as raw:
            reader = ShardReader(raw, shard)
            places = reader.places(start, stop)
            for first, arrays in _gathered(reader, places, start):
                rows, unknown = self._translate(*arrays, start + first)
                here = places[:, first : first + rows.num_cells]
                values = {name: _metadata(name, reader.column(column, here)) for name, column in wanted.items()}
                obs = pd.DataFrame(values, index=range(here.shape[1]))
                yield rows._replace(first_cell=start + first, obs=obs, unknown_counts=unknown)

    def _translate(
        self, ids: np.ndarray, counts: np.ndarray, offsets: np.ndarray, first_cell: int
    ) -> tuple[GeneRows, float]:
        """Return rows of our tokens, and the sum of the counts of genes that we do not know."""
        vocabulary = self._source_vocabulary()

        def refuse(bad: np.ndarray, text: str) -> None:
            if bad.any():
                place = int(np.argmax(bad))
                cell = first_cell + int(np.searchsorted(offsets, place, side="right")) - 1
                token = vocabulary.names.get(int(ids[place]), "")
                raise BadInput(f"cell {cell}: " + text.format(id=ids[place], token=token, value=counts[place]))

        size = len(vocabulary.tokens)
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            refuse((ids < 0) | (ids >= size), _NOT_IN_VOCABULARY)
        tokens = vocabulary.tokens[ids]
        refuse(tokens == _ABSENT, _NOT_IN_VOCABULARY)
        # Special tokens carry the pad_value of the original, -2; <cls> is the first "gene" of every cell.
        refuse(
            (tokens == _SPECIAL) & ~(counts <= 0),
            "{token} (id {id}) has the count {value}, but is not a gene: source_vocab is not that of the shards.",
        )
        unknown = tokens == _UNKNOWN
        if unknown.any():
            problem, _ = count_problem(GeneRows(ids, counts, offsets).select(unknown), first_cell, vocabulary.names)
            if problem is not None:
                raise BadInput(problem)
        rows = GeneRows(tokens, counts, offsets).select((tokens >= 0) & (counts != 0))
        check_counts(rows, first_cell, self.tokenizer)
        keys = np.sort(rows.cells() * np.int64(2**32) + rows.tokens)
        if (keys[1:] == keys[:-1]).any():
            rows = merge_repeats(rows)
        rows = rows._replace(tokens=rows.tokens.astype(token_dtype(self.tokenizer)))
        return rows, float(counts[unknown].sum(dtype=np.float64))

    def _source_vocabulary(self) -> _Vocabulary:
        if self._vocabulary is None:
            origin = self.config.source_vocab
            try:
                table = json.loads(self._store.read(origin))
            except FileNotFoundError:
                raise FileNotFoundError(f"source_vocab={origin!r} does not exist.") from None
            except ValueError as error:
                raise ValueError(f"source_vocab={origin!r} is not JSON: {error}") from None
            if (
                not isinstance(table, dict)
                or not all(type(i) is int and 0 <= i < 2**31 for i in table.values())
                or len(set(table.values())) < len(table)
            ):
                raise ValueError(f"source_vocab={origin!r} must hold a JSON object token -> id with distinct ids.")
            genes = {name: i for name, i in table.items() if not (name.startswith("<") and name.endswith(">"))}
            match = matched_genes(
                self.tokenizer, list(genes), GeneOptions(min_known_genes=self.config.min_known_genes)
            )
            tokens = np.full(max(table.values()) + 1, _ABSENT, dtype=np.int64)
            tokens[list(table.values())] = _SPECIAL
            tokens[list(genes.values())] = np.where(match.token_ids >= 0, match.token_ids, _UNKNOWN)
            self._vocabulary = _Vocabulary(tokens, {i: name for name, i in table.items()}, match)
        return self._vocabulary

    def _read_index(self, folder: str) -> None:
        if folder in self._indexed:
            return
        url = f"{folder}/{INDEX_FILE}"
        try:
            shards = parse_index(self._store.read(url))
        except BadInput as error:
            raise BadInput(f"{url}: {error}") from None
        for shard in shards:  # merged indices name shards of folders that have their own index
            self._shards.setdefault(f"{folder}/{shard.raw.basename}", (folder, shard))
        self._indexed.add(folder)

    def _shard(self, path: str) -> tuple[str, Shard]:
        """Return the folder of the index that lists a shard, and the entry."""
        folder = path
        while path not in self._shards and folder not in self._roots and "/" in folder:
            folder = folder.rpartition("/")[0]
            if self._store.size(f"{folder}/{INDEX_FILE}") is not None:
                self._read_index(folder)
        if path not in self._shards:
            raise BadInput(f"no {INDEX_FILE} in its folder, or above, lists it: copy the index with the shards.")
        return self._shards[path]

    def _stored(self, folder: str, shard: Shard) -> tuple[str, StoredFile]:
        """Return the address and the form (raw or compressed) in which a shard is there."""
        forms = [form for form in (shard.packed, shard.raw) if form is not None]
        for form in forms:
            if (size := self._store.size(f"{folder}/{form.basename}")) is not None:
                if size != form.size:
                    raise BadInput(
                        f"{form.basename} has {size} bytes, but {INDEX_FILE} says {form.size}: copy it again."
                    )
                return f"{folder}/{form.basename}", form
        names = " and ".join(form.basename for form in forms)
        raise BadInput(f"{names} is missing from {folder}, whose {INDEX_FILE} lists it: copy it again.")

    @contextmanager
    def _unpacked(self, folder: str, shard: Shard) -> Iterator[Path]:
        """Check and decompress a shard, and yield its path."""
        url, form = self._stored(folder, shard)
        self.spool_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="mds-", dir=self.spool_folder) as temporary:
            path = self._store.local(url, Path(temporary) / "stored")
            check_stored(path, form)
            if form is shard.packed:
                raw = Path(temporary) / "raw"
                decompress(path, shard, raw)
                check_stored(raw, shard.raw)
                path = raw
            yield path


def _gathered(
    reader: ShardReader, places: np.ndarray, start: int
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Yield first cell, and ids, counts and offsets of consecutive cells, about `CHUNK_ELEMENTS` genes at a time."""
    genes_of, counts_of = reader.decoder(GENES, places), reader.decoder(EXPRESSIONS, places)
    first, total = 0, 0
    ids: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for i in range(places.shape[1]):
        try:
            ids.append(_flat(genes_of(i), GENES, "iu"))
            counts.append(_flat(counts_of(i), EXPRESSIONS, "biuf"))
        except BadInput as error:
            raise BadInput(f"cell {start + i}: {error}") from None
        if len(ids[-1]) != len(counts[-1]):
            raise BadInput(f"cell {start + i}: it has {len(ids[-1])} genes and {len(counts[-1])} expressions.")
        total += len(ids[-1])
        if total >= CHUNK_ELEMENTS or i + 1 == places.shape[1]:
            offsets = np.concatenate([[0], np.cumsum([len(part) for part in ids])])
            yield (
                first,
                (
                    np.concatenate(ids).astype(np.int64, copy=False),
                    np.concatenate(counts).astype(np.float32, copy=False),
                    offsets,
                ),
            )
            first, total, ids, counts = i + 1, 0, [], []


def _flat(value: Any, column: str, kinds: str) -> np.ndarray:
    """Return the numbers of a cell, also from `(1, genes)`, since the original once wrote batches of one cell."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise BadInput(f"column {column!r} holds a list of lists of different lengths.") from None
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if not array.size and array.ndim == 1:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        wanted = "whole numbers" if kinds == "iu" else "numbers"
        raise BadInput(
            f"column {column!r} holds {array.dtype} of the shape {array.shape}: it must be a row of {wanted}."
        )
    return array


def _metadata(name: str, values: list[Any]) -> list[Any]:
    """Return plain values, and names of cells as strings."""
    plain = [
        value.ravel()[0].item() if isinstance(value, np.ndarray) and value.size == 1 else value for value in values
    ]
    plain = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in plain]
    for value in plain:
        if not isinstance(value, _METADATA_TYPES):
            raise BadInput(f"column {name!r} holds a {type(value).__name__}: metadata must be strings or numbers.")
    return [str(value) for value in plain] if name == INDEX else plain


class _Store:
    """Files on disk, or at an address that fsspec knows, such as `s3://`."""

    def __init__(self) -> None:
        self._anonymous: dict[str, bool] = {}  # by bucket, once it has answered
        self._filesystems: dict[tuple[int, bool], Any] = {}  # by process, since they do not survive a fork

    def read(self, url: str) -> bytes:
        """Read a small file; raise FileNotFoundError where it is missing."""
        if "://" not in url:
            return Path(url).read_bytes()
        return self._remote(url, lambda files: files.cat_file(url))

    def size(self, url: str) -> int | None:
        """Return the size of a file in bytes, None where it is missing."""
        if "://" not in url:
            return os.path.getsize(url) if os.path.isfile(url) else None
        try:
            info = self._remote(url, lambda files: files.info(url))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def fingerprint(self, url: str) -> str:
        """Return a text that changes with the content of a file."""
        if "://" not in url:
            return content_fingerprint(url)
        info = self._remote(url, lambda files: files.info(url))
        mark = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime")
        return f"{info['size']} bytes, {mark}"

    def local(self, url: str, target: Path) -> Path:
        """Return a path at which the file can be opened; a remote file is fetched to `target`."""
        if "://" not in url:
            return Path(url)
        self._remote(url, lambda files: files.get_file(url, str(target)))
        return target

    def folders_with(self, root: str, name: str) -> list[str]:
        """List all folders at and below `root` with a file `name`; raise FileNotFoundError where `root` is missing."""
        if "://" in root:
            scheme = root.split("://")[0]
            try:
                found = [f"{scheme}://{path}" for path in self._remote(root, lambda files: files.find(root))]
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{root} does not exist: {error}. Check the address.") from None
            return sorted(path.removesuffix("/" + name) for path in found if path.endswith("/" + name))
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root} is not a folder: name a folder with MDS shards and their {name}.")
        folders, seen = [], set[tuple[int, int]]()
        for folder, below, files in os.walk(root, followlinks=True):
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in seen:  # by a link, which may lead up and so round in a circle
                below.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            below[:] = sorted(entry for entry in below if not entry.startswith("."))
            if name in files:
                folders.append(folder)
        return folders

    def _remote(self, url: str, action: Callable[[Any], _Result]) -> _Result:
        """Call `action` with the file system of an address; for S3, signed where there are credentials."""
        scheme = url.split("://")[0]
        if scheme != "s3":
            import fsspec

            return action(fsspec.filesystem(scheme))
        try:
            import botocore.session
            import s3fs
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError as error:
            raise ImportError(f"Reading {url} needs s3fs: pip install 'tahoex1_hf[s3]'.") from error
        bucket = url.removeprefix("s3://").split("/")[0]
        signed = botocore.session.get_session().get_credentials() is not None
        try:
            for anonymous in (self._anonymous[bucket],) if bucket in self._anonymous else (not signed, True):
                key = (os.getpid(), anonymous)
                if key not in self._filesystems:
                    self._filesystems[key] = s3fs.S3FileSystem(
                        anon=anonymous, skip_instance_cache=True, use_listings_cache=False
                    )
                try:
                    result = action(self._filesystems[key])
                except PermissionError:
                    if anonymous or bucket in self._anonymous:
                        raise
                    continue  # a public bucket may refuse credentials, but be open without
                self._anonymous[bucket] = anonymous
                return result
        except PermissionError as error:
            raise PermissionError(f"{url} may not be read with your AWS credentials, nor without: {error}") from error
        except (BotoCoreError, ClientError) as error:
            raise ConnectionError(f"{url} could not be reached: {error}") from error
        raise AssertionError("unreachable")
