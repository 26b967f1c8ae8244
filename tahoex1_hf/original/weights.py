# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read the tensors of a checkpoint one at a time, from any kind of file, without running its code.

Tensors of safetensors files and pickles are views of the file, mapped into memory; those of a sharded checkpoint are
put together when they are read.
"""

import io
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path, PosixPath
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tahoex1_hf.common.weight_files import shards_of, what_is_wrong
from tahoex1_hf.common.wrapped_names import taken_off, unwrapped
from tahoex1_hf.original.files import SHARDED_METADATA

logger = logging.getLogger(__name__)

_SHARDED_PREFIX = "state.model."
_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What Composer stores beside the tensors (the clock, the state of numpy's random numbers): classes that hold data and
# run nothing when they are made. Everything else but tensors and plain containers is refused.
_HARMLESS: list[Any] = [
    timedelta,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    type(np.dtype(np.float64)),
    type(np.dtype(np.int64)),
    np.zeros(0).__reduce__()[0],  # numpy's own constructor of an empty array, whose module has moved between versions
]

# The classes that the index of a sharded checkpoint consists of.
_SHARDED_INDEX_CLASSES = {
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
}


class TensorReader(Protocol):
    """Tensors by name, each read when it is asked for."""

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    files: list[Path]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""


def open_weights(path: Path) -> TensorReader:
    """Open `*.safetensors`, its `*.index.json`, the folder of a sharded checkpoint, or a Composer pickle.

    Raises:
        ValueError: where the file is truncated or of another kind, or a pickle holds more than data.
    """
    if path.is_dir():
        return _ShardedReader(path)
    if path.name.endswith(".index.json"):
        return _SafetensorsReader(shards_of(path))
    return _SafetensorsReader([path]) if path.suffix == ".safetensors" else _PickleReader(path)


def without_wrappers(reader: TensorReader) -> TensorReader:
    """Return a reader that gives tensors the names that they have without DDP, `torch.compile` and the like.

    Where no name has anything of them, it is the reader itself; otherwise an INFO tells what was taken off.
    """
    if all(unwrapped(name) == name for name in reader.shapes):
        return reader
    logger.info("%s: took %s off the names of the tensors.", reader.files[0], taken_off(reader.shapes))
    return _UnwrappedReader(reader)


class UnreadTensor:
    """A tensor that is read when it is sliced, which transformers does when it loads weights."""

    def __init__(self, reader: TensorReader, name: str):
        self._reader = reader
        self._name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._reader.read(self._name)[index]


class _SafetensorsReader:
    """Tensors of one or more safetensors files."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._owners: dict[str, Any] = {}
        for path in files:
            try:
                opened = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} {what_is_wrong(path, error)}") from error
            for name in opened.keys():
                view = opened.get_slice(name)
                self._owners[name] = opened
                self.shapes[name] = torch.Size(view.get_shape())
                self.dtypes[name] = _TORCH_DTYPES.get(view.get_dtype()) or opened.get_tensor(name).dtype

    def read(self, name: str) -> torch.Tensor:
        return self._owners[name].get_tensor(name)


class _UnwrappedReader:
    """Tensors under the names that they have in the model itself, without what wrappers put there."""

    def __init__(self, reader: TensorReader):
        self.files = reader.files
        self._reader, self._wrapped = reader, {unwrapped(name): name for name in reader.shapes}
        if len(self._wrapped) < len(reader.shapes):
            raise ValueError(f"{reader.files[0]} holds tensors under two names, with and without a wrapper's.")
        self.shapes = {name: reader.shapes[wrapped] for name, wrapped in self._wrapped.items()}
        self.dtypes = {name: reader.dtypes[wrapped] for name, wrapped in self._wrapped.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._reader.read(self._wrapped[name])


class _PickleReader:
    """Tensors of a Composer pickle, `{"state": {"model": ...}}`; the rest of the file is not read."""

    def __init__(self, path: Path):
        self.files = [path]
        try:
            with torch.serialization.safe_globals(_HARMLESS):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            found = re.findall(r"GLOBAL ([\w.]+)", str(error))
            named = f"it asks for {', '.join(dict.fromkeys(found))}" if found else _first_line(error)
            raise ValueError(
                f"{path} is not a checkpoint of tensors alone: {named}. Nothing of it was run. If you trust where it "
                "comes from, save its tensors again: torch.save({'state': {'model': state_dict}}, path)."
            ) from error
        except (RuntimeError, OSError, EOFError) as error:
            raise ValueError(
                f"{path} could not be read as a checkpoint of tensors alone; it is truncated, or of an old format: "
                f"{_first_line(error)}"
            ) from error
        try:
            tensors = dict(checkpoint["state"]["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a Composer checkpoint: it has no ['state']['model'].") from error
        others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise ValueError(f"{path}: ['state']['model'] holds more than tensors: {', '.join(map(str, others))}.")
        self._tensors: dict[str, torch.Tensor] = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler of the index of a sharded checkpoint; it refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath"):
            return PosixPath
        if (module, name) not in _SHARDED_INDEX_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _ShardedReader:
    """Tensors of a checkpoint that FSDP wrote in pieces (torch.distributed.checkpoint)."""

    def __init__(self, folder: Path):
        self._folder = folder
        index = folder / SHARDED_METADATA
        try:
            with index.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            tensors = {
                name.removeprefix(_SHARDED_PREFIX): entry
                for name, entry in metadata.state_dict_metadata.items()
                if name.startswith(_SHARDED_PREFIX) and hasattr(entry, "chunks")
            }
            self._places = metadata.storage_data
            self.shapes = {name: torch.Size(entry.size) for name, entry in tensors.items()}
            self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{index} is not the index of a sharded checkpoint: it asks for {error}. Nothing of it was run."
            ) from error
        except (AttributeError, EOFError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{index} is damaged, or not the index of a sharded checkpoint: {error}") from error
        if not tensors:
            raise ValueError(f"{index} lists no tensor of a model ({_SHARDED_PREFIX}*): is it a Composer checkpoint?")
        self._tensors = tensors
        names = {self._place(name, chunk).relative_path for name in tensors for chunk in tensors[name].chunks}
        self.files = [index, *(self._file(name) for name in sorted(names))]

    def read(self, name: str) -> torch.Tensor:
        whole = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        covered = 0
        for chunk in self._tensors[name].chunks:
            piece = self._piece(self._place(name, chunk), name)
            if piece.shape != torch.Size(chunk.sizes):
                raise ValueError(f"{self._folder}: a piece of {name} has shape {list(piece.shape)}, unlike the index.")
            where = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[where] = piece
            covered += piece.numel()
        if covered != whole.numel():
            raise ValueError(f"{self._folder}: the pieces of {name} do not add up to its shape {list(whole.shape)}.")
        return whole

    def _place(self, name: str, chunk: Any) -> Any:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        try:
            return self._places[MetadataIndex(_SHARDED_PREFIX + name, chunk.offsets)]
        except KeyError:
            raise ValueError(f"{self._folder / SHARDED_METADATA} does not say where {name} is stored.") from None

    def _file(self, name: str) -> Path:
        if Path(name).name != name:
            raise ValueError(f"{self._folder / SHARDED_METADATA} names a file outside its folder: {name}")
        if not (self._folder / name).is_file():
            raise FileNotFoundError(f"{self._folder / name} is missing from the sharded checkpoint.")
        return self._folder / name

    def _piece(self, place: Any, name: str) -> torch.Tensor:
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{self._folder}: {name} is stored compressed, which this reader does not know.")
        path = self._file(place.relative_path)
        with path.open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        try:
            return torch.load(content, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is truncated or damaged at {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
