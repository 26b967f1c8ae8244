# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The format of MDS shards (version 2), which mosaicml-streaming writes.

A folder's `index.json` lists its shards, each with its length, hashes, compression and columns. A decompressed shard
consists of

    uint32 number of samples, uint32 offsets of the samples and of the end, JSON with the columns, the samples

and a sample, which is one cell, of the uint32 lengths of all columns without a fixed length, then the bytes of all
columns.
"""

import bz2
import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.data.sources.restricted_pickle import load_restricted

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """A file as the index describes it: its path below the folder of the index, bytes, and algorithm -> digest."""

    basename: str
    size: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Shard:
    """An entry of an index.

    Attributes:
        raw: The shard itself.
        packed: Its compressed form, None where it has none.
        compression: `zstd`, `gz`, `bz2`, ...; None where it has none.
        samples: Number of samples.
        columns: Column -> encoding, in the order of storage.
        sizes: Fixed length of each column, 0 where it varies.
    """

    raw: StoredFile
    packed: StoredFile | None
    compression: str | None
    samples: int
    columns: Mapping[str, str]
    sizes: tuple[int, ...]


def parse_index(content: bytes) -> list[Shard]:
    """Read the shards that an `index.json` lists.

    Raises:
        BadInput: If it is not an index of MDS shards of version 2.
    """
    try:
        index = json.loads(content)
        version, entries = index["version"], index["shards"]
        if version != 2:
            raise BadInput(f"{INDEX_FILE} has version {version!r}; version 2 is read.")
        return [_parse_shard(entry) for entry in entries]
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{INDEX_FILE} is damaged, or not of MDS shards ({type(error).__name__}: {error}).") from None


def _parse_shard(entry: Mapping[str, Any]) -> Shard:
    if entry["format"] != "mds" or entry["version"] != 2:
        raise BadInput(
            f"{INDEX_FILE} lists shards of format {entry['format']!r}, version {entry['version']!r}, not mds."
        )
    names, encodings, sizes = (entry[f"column_{part}"] for part in ("names", "encodings", "sizes"))
    columns = dict(zip(names, encodings, strict=True))
    fixed = tuple(int(size or 0) for size in sizes)
    if len(columns) != len(names) or len(fixed) != len(names) or min(fixed, default=0) < 0 or entry["samples"] < 0:
        raise BadInput(f"{INDEX_FILE} is damaged: the columns or samples of a shard make no sense.")
    compression = entry["compression"]
    return Shard(
        raw=_parse_file(entry["raw_data"]),
        packed=_parse_file(entry["zip_data"]) if entry["zip_data"] else None,
        compression=compression.split(":")[0] if compression else None,  # "zstd:7" is zstd of level 7
        samples=int(entry["samples"]),
        columns=columns,
        sizes=fixed,
    )


def _parse_file(entry: Mapping[str, Any]) -> StoredFile:
    name = str(entry["basename"])
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "://" in name or not path.name:
        raise BadInput(f"{INDEX_FILE} names a shard outside its folder: {name}")
    return StoredFile(path.as_posix(), int(entry["bytes"]), dict(entry["hashes"]))


def check_stored(path: Path, stored: StoredFile) -> None:
    """Compare a file with its size and all digests in the index.

    Raises:
        BadInput: If one differs.
        ImportError: If xxhash is needed and missing.
    """
    size = path.stat().st_size
    if size != stored.size:
        raise BadInput(f"{stored.basename} has {size} bytes, but {INDEX_FILE} says {stored.size}: copy it again.")
    sums = {name: digest for name in stored.hashes if (digest := _new_hash(name, stored.basename)) is not None}
    if stored.hashes and not sums:
        logger.warning("%s cannot be checked: its hashes %s are not known.", stored.basename, sorted(stored.hashes))
    with path.open("rb") as file:
        while sums and (block := file.read(_BLOCK)):
            for digest in sums.values():
                digest.update(block)
    for name, digest in sums.items():
        if digest.hexdigest() != stored.hashes[name].lower():
            raise BadInput(
                f"{stored.basename} is damaged: its {name} is {digest.hexdigest()}, but {INDEX_FILE} says "
                f"{stored.hashes[name]}. Copy it again."
            )


def _new_hash(name: str, file: str) -> Any:
    """Return a digest that can be updated, or None for an algorithm that is not known."""
    if name.startswith("xxh"):
        try:
            import xxhash
        except ImportError as error:
            raise ImportError(f"Checking {file} needs xxhash: pip install 'tahoex1_hf[mds]'.") from error
        return getattr(xxhash, name)() if name in xxhash.algorithms_available else None
    # Digests of shake_* may have any length.
    return hashlib.new(name) if name in hashlib.algorithms_available and not name.startswith("shake") else None


def decompress(path: Path, shard: Shard, target: Path) -> None:
    """Write the decompressed shard, block by block.

    Raises:
        BadInput: If the compression is not known, or the content damaged or not as long as the index says.
        ImportError: If zstandard is needed and missing.
    """
    written = 0
    opened, errors = _decompressor(path, shard.compression)
    try:
        with opened as source, target.open("wb") as file:
            while block := source.read(_BLOCK):
                written += len(block)
                if written > shard.raw.size:  # otherwise a damaged shard might fill the disk
                    break
                file.write(block)
    except errors as error:
        raise BadInput(f"{path.name} cannot be decompressed: {error}. Copy it again.") from None
    if written != shard.raw.size:
        raise BadInput(
            f"{path.name} decompresses to {'more' if written > shard.raw.size else 'less'} than the {shard.raw.size} "
            f"bytes of {INDEX_FILE}: it is truncated or damaged. Copy it again."
        )


def _decompressor(
    path: Path, compression: str | None
) -> tuple[AbstractContextManager[BinaryIO], tuple[type[Exception], ...]]:
    """Open a file for its decompressed content; also return the errors that damaged content raises."""
    if compression == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f"Reading {path.name} needs zstandard: pip install 'tahoex1_hf[mds]'.") from error
        reader: Any = zstandard.open(path, "rb", dctx=zstandard.ZstdDecompressor())
        return reader, (zstandard.ZstdError,)
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    opened: Any
    if compression == "gz":
        opened = gzip.open(path)
    elif compression == "bz2":
        opened, damage = bz2.open(path), (*damage, OSError)
    else:
        raise BadInput(f"{path.name} is compressed with {compression!r}; zstd, gz and bz2 are read.")
    return opened, damage


class ShardReader:
    """Values of the columns of a decompressed shard, which is mapped into memory, not read."""

    def __init__(self, path: Path, shard: Shard) -> None:
        """Open and check the shard.

        Raises:
            BadInput: If it is truncated, or its offsets make no sense.
        """
        self._shard = shard
        size = path.stat().st_size
        head = 4 * (shard.samples + 2)
        if size < head:
            raise BadInput(f"{shard.raw.basename} is truncated: it ends within its offsets. Copy it again.")
        self._bytes = np.memmap(path, np.uint8, mode="r")
        numbers = self._bytes[:head].view("<u4")
        if numbers[0] != shard.samples:
            raise BadInput(
                f"{shard.raw.basename} has {numbers[0]} samples, but {INDEX_FILE} says {shard.samples}: they do not "
                "belong together."
            )
        self._offsets = numbers[1:].astype(np.int64)
        if self._offsets[0] < head or self._offsets[-1] != size or (np.diff(self._offsets) < 0).any():
            raise BadInput(f"{shard.raw.basename} is damaged or truncated: the offsets of its samples make no sense.")

    def places(self, start: int, stop: int) -> np.ndarray:
        """Return where the columns of some samples lie.

        Returns:
            `(columns + 1, stop - start)` int64: first byte of every column, and the end of the last one.

        Raises:
            BadInput: If they do not add up to the sample.
        """
        begins, ends = self._offsets[start:stop], self._offsets[start + 1 : stop + 1]
        varying = [number for number, size in enumerate(self._shard.sizes) if not size]
        lengths = np.empty((len(self._shard.sizes), stop - start), dtype=np.int64)
        lengths[:] = np.array(self._shard.sizes, dtype=np.int64)[:, None]
        head = 4 * len(varying)
        if (ends - begins < head).any():
            cell = start + int(np.argmax(ends - begins < head))
            raise BadInput(f"{self._shard.raw.basename} is damaged: sample {cell} is too short for its columns.")
        lengths[varying] = self._gather(begins, head).view("<u4").T
        places = np.concatenate([(begins + head)[None], lengths]).cumsum(axis=0)
        if (places[-1] != ends).any():
            cell = start + int(np.argmax(places[-1] != ends))
            raise BadInput(f"{self._shard.raw.basename} is damaged: the columns of sample {cell} do not fill it.")
        return places

    def _gather(self, begins: np.ndarray, size: int) -> np.ndarray:
        """Return the bytes from each place on, `(len(begins), size)` uint8."""
        if not size or not len(begins):
            return np.empty((len(begins), size), dtype=np.uint8)
        return np.asarray(self._bytes)[begins[:, None] + np.arange(size)]

    def decoder(self, column: str, places: np.ndarray) -> Callable[[int], Any]:
        """Return a function that gives the value of a column in the i-th sample of `places`.

        Raises:
            BadInput: If the encoding is not known, or a value does not have it.
        """
        encoding, number = self._shard.columns[column], list(self._shard.columns).index(column)
        decode, size = decoder_of(encoding)
        if size != self._shard.sizes[number]:
            raise BadInput(f"{INDEX_FILE} is damaged: column {column!r} of {encoding} has {size or 'no fixed'} bytes.")
        content = memoryview(self._bytes)  # type: ignore[arg-type]
        begins, ends = places[number].tolist(), places[number + 1].tolist()

        def value(i: int) -> Any:
            try:
                return decode(bytes(content[begins[i] : ends[i]]))
            except BadInput as error:
                raise BadInput(f"column {column!r}: {error}") from None
            except (ValueError, IndexError, KeyError, ArithmeticError, RecursionError) as error:
                raise BadInput(f"column {column!r} holds a value that is not valid {encoding}: {error}") from None

        return value

    def column(self, column: str, places: np.ndarray) -> list[Any]:
        """Return the values of a column in the samples of `places`.

        Raises:
            BadInput: As for `decoder`.
        """
        value = self.decoder(column, places)
        dtype = _SCALARS.get(self._shard.columns[column])
        if dtype is None:
            return [value(i) for i in range(places.shape[1])]
        begins = places[list(self._shard.columns).index(column)]
        return self._gather(begins, np.dtype(dtype).itemsize).view(dtype).ravel().tolist()


_SCALARS = {
    "int": "<i8",
    **{f"{sign}int{8 * n}": f"<{sign or 'i'}{n}" for sign in ("", "u") for n in (1, 2, 4, 8)},
    **{f"float{8 * n}": f"<f{n}" for n in (2, 4, 8)},
}
_PLAIN: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "str": lambda data: data.decode("utf-8"),
    "str_int": lambda data: int(data.decode("utf-8")),
    "str_float": lambda data: float(data.decode("utf-8")),
    "str_decimal": lambda data: Decimal(data.decode("utf-8")),
    "json": json.loads,
    "pkl": load_restricted,
}
# The type of an array is a number in the format: its bits, plus one for a signed one, plus two for a float.
_ARRAY_TYPES = {
    **{8 * n + signed: f"<{'ui'[signed]}{n}" for n in (1, 2, 4, 8) for signed in (0, 1)},
    **{8 * n + 2: f"<f{n}" for n in (2, 4, 8)},
}


def decoder_of(encoding: str) -> tuple[Callable[[bytes], Any], int]:
    """Return the function that decodes a value, and the value's length in bytes, 0 where that varies.

    Raises:
        BadInput: For encodings that are not known, and for pictures.
    """
    if encoding in _SCALARS:
        dtype = np.dtype(_SCALARS[encoding])
        return lambda data: np.frombuffer(data, dtype, count=1)[0].item(), dtype.itemsize
    if encoding in _PLAIN:
        return _PLAIN[encoding], 0
    array = re.fullmatch(r"ndarray(?::(u?int\d+|float\d+)(?::(\d+(?:,\d+)*))?)?", encoding)
    if array is None or (array[1] is not None and array[1] not in _SCALARS):
        raise BadInput(f"the encoding {encoding!r} is not read: numbers, strings, arrays, JSON and pickles are.")
    static = None if array[1] is None else np.dtype(_SCALARS[array[1]])
    shape = None if array[2] is None else tuple(int(size) for size in array[2].split(","))
    fixed = 0 if static is None or shape is None else static.itemsize * int(np.prod(shape))
    return lambda data: _decode_array(data, static, shape), fixed


def _decode_array(data: bytes, dtype: np.dtype | None, shape: tuple[int, ...] | None) -> np.ndarray:
    """Decode an array, whose type and shape stand before its values where the encoding does not say them."""
    place = 0
    if dtype is None:
        dtype, place = np.dtype(_ARRAY_TYPES[data[0]]), 1
    if shape is None:
        dimensions, size = data[place] >> 2, 1 << (data[place] & 3)
        place += 1
        shape = tuple(np.frombuffer(data, f"<u{size}", count=dimensions, offset=place).tolist())
        place += dimensions * size
    return np.frombuffer(data, dtype, offset=place).reshape(shape)
