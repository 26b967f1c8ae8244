# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read the tensors of a checkpoint one at a time, from any kind of file, without running its code.

Tensors of safetensors files and pickles are views of the file, mapped into memory; those of a sharded checkpoint are
put together when they are read.
"""

import logging
import pickle
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tahoex1_hf.common.weight_files import shards_of, what_is_wrong
from tahoex1_hf.common.wrapped_names import taken_off, unwrapped
from tahoex1_hf.original.sharded import ShardedReader

logger = logging.getLogger(__name__)

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
        ValueError: If the file is truncated or of another kind, or a pickle holds more than data.
    """
    if path.is_dir():
        return ShardedReader(path)
    if path.name.endswith(".index.json"):
        return _SafetensorsReader(shards_of(path))
    return _SafetensorsReader([path]) if path.suffix == ".safetensors" else _PickleReader(path)


def without_wrappers(reader: TensorReader) -> TensorReader:
    """Return a reader under whose names no tensor has the parts of DDP, `torch.compile` and other wrappers.

    If no name has a wrapper's part, that is `reader` itself; otherwise an INFO reports what was removed.
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
    """Tensors under their names in the model itself, without what wrappers have added."""

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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
