# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read checkpoints that FSDP wrote in pieces (torch.distributed.checkpoint).

Their index is a pickle of classes of torch. It gets none of them: the names that it asks for are replaced by stand-ins
of this file, which keep what they are given and do nothing, and the index is read from these.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tahoex1_hf.common.pickles import check_memo, may_fill_memo
from tahoex1_hf.common.reading import in_short
from tahoex1_hf.original.files import SHARDED_METADATA

_PREFIX = "state.model."

# What the index of a sharded checkpoint consists of. A plain name stands for each of torch's types of numbers.
_ADMITTED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}
_DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
# Errors that damaged or wrong bytes cause in a pickle. OSError, which the machine causes, is not one of them.
_DAMAGE = (AttributeError, EOFError, IndexError, KeyError, MemoryError, OverflowError, TypeError, ValueError)


class _StandIn:
    """Stand-in for an object of torch, which keeps the arguments and the state that the pickle gives it."""

    __slots__ = ("arguments", "state")
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "_StandIn":
        self = object.__new__(cls)
        self.arguments, self.state = arguments, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler of an index, which makes a class of stand-ins for each admitted name, and refuses all other names."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self._made: dict[tuple[str, str], type[_StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and f"torch.{name}" in _DTYPES:
            return f"torch.{name}"
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return self._made.setdefault((module, name), type(name, (_StandIn,), {"__slots__": ()}))


@dataclass(frozen=True)
class _Piece:
    """A piece of a tensor: where it lies in the tensor, and in which bytes of which file it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    is_compressed: bool


@dataclass(frozen=True)
class _Stored:
    """A tensor of the index."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[_Piece]


def _read_index(path: Path) -> dict[str, _Stored]:
    """Read the tensors that an index lists.

    Raises:
        ValueError: If the file is damaged, or is not such an index; nothing in it is run.
    """
    data = path.read_bytes()
    try:
        file = io.BytesIO(data)
        if may_fill_memo(data):
            check_memo(file, len(data))
        return dict(_tensors(_IndexUnpickler(file).load()))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not the index of a sharded checkpoint: it asks for {error}. Nothing of it was run."
        ) from error
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is damaged, or not the index of a sharded checkpoint: {in_short(error)}. Nothing of it was run."
        ) from error


def _tensors(index: Any) -> Iterator[tuple[str, _Stored]]:
    """Yield every tensor of the index's stand-in."""
    fields = _fields(index, "Metadata")
    places = {}
    for key, place in fields["storage_data"].items():
        at = _fields(key, "MetadataIndex")
        places[at["fqn"], _numbers(at.get("offset"))] = _fields(place, "_StorageInfo")
    for name, entry in fields["state_dict_metadata"].items():
        if not isinstance(name, str) or type(entry).__name__ != "TensorStorageMetadata":
            continue
        tensor = _fields(entry, "TensorStorageMetadata")
        dtype = _DTYPES[_state(tensor["properties"], "TensorProperties")[0]]
        pieces = []
        for chunk in tensor["chunks"]:
            given = _fields(chunk, "ChunkStorageMetadata")
            offsets, sizes = _numbers(given["offsets"]), _numbers(given["sizes"])
            if (name, offsets) not in places:
                raise ValueError(f"it does not say where {name} is stored")
            place = places[name, offsets]
            start, length = _numbers((place["offset"], place["length"]))
            compressed = bool(place.get("transform_descriptors"))
            pieces.append(_Piece(offsets, sizes, str(place["relative_path"]), start, length, compressed))
        yield name, _Stored(_numbers(tensor["size"]), dtype, pieces)


def _state(thing: Any, kind: str) -> Any:
    if not isinstance(thing, _StandIn) or type(thing).__name__ != kind:
        raise ValueError(f"{kind} expected, not {type(thing).__name__}")
    return thing.state


def _fields(thing: Any, kind: str) -> dict[str, Any]:
    """Return the attributes of the stand-in for an object of a class."""
    state = _state(thing, kind)
    if not isinstance(state, dict):
        raise ValueError(f"{kind} without attributes")
    return state


def _numbers(sizes: Any) -> tuple[int, ...]:
    """Return sizes or offsets: a tuple, or the stand-in for a `torch.Size`; none for the place of other values."""
    if isinstance(sizes, _StandIn):
        (sizes,) = sizes.arguments
    if sizes is None:
        return ()
    if not isinstance(sizes, (tuple, list)) or any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"sizes expected, not {sizes!r}")
    return tuple(sizes)


class ShardedReader:
    """Tensors of a sharded checkpoint, put together when they are read.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        FileNotFoundError: If a file that the index names does not exist.
        ValueError: If the index cannot be read, or is not that of a checkpoint.
    """

    def __init__(self, folder: Path):
        self._folder, index = folder, folder / SHARDED_METADATA
        found = _read_index(index)
        self._tensors = {name.removeprefix(_PREFIX): found[name] for name in found if name.startswith(_PREFIX)}
        if not self._tensors:
            raise ValueError(f"{index} lists no tensor of a model ({_PREFIX}*): is it a Composer checkpoint?")
        self.shapes = {name: torch.Size(stored.shape) for name, stored in self._tensors.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._tensors.items()}
        names = {piece.file for stored in self._tensors.values() for piece in stored.pieces}
        self.files = [index, *(self._file(name) for name in sorted(names))]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        whole = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        covered = 0
        for piece in self._tensors[name].pieces:
            values = self._values(piece, name)
            if values.shape != torch.Size(piece.sizes):
                shape = list(values.shape)
                raise ValueError(f"{self._folder}: a piece of {name} has shape {shape}, unlike the index.")
            where = tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))
            whole[where] = values
            covered += values.numel()
        if covered != whole.numel():
            raise ValueError(f"{self._folder}: the pieces of {name} do not add up to its shape {list(whole.shape)}.")
        return whole

    def _file(self, name: str) -> Path:
        if Path(name).name != name:
            raise ValueError(f"{self._folder / SHARDED_METADATA} names a file outside its folder: {name}")
        if not (self._folder / name).is_file():
            raise FileNotFoundError(f"{self._folder / name} is missing from the sharded checkpoint.")
        return self._folder / name

    def _values(self, piece: _Piece, name: str) -> torch.Tensor:
        if piece.is_compressed:
            raise ValueError(f"{self._folder}: {name} is stored compressed, which this reader does not know.")
        path = self._file(piece.file)
        with path.open("rb") as file:
            file.seek(piece.start)
            content = io.BytesIO(file.read(piece.length))
        try:
            values = torch.load(content, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is truncated or damaged at {name}: {in_short(error)}") from error
        if not isinstance(values, torch.Tensor):
            raise ValueError(f"{path} holds a {type(values).__name__} in the place of {name}.")
        return values
