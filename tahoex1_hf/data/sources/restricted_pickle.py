# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read pickled numpy arrays, torch tensors, lists and scalars without running any code that a pickle asks for.

The pickle gets no class and no function of numpy or torch. The names that it asks for are replaced by stand-ins of
this file, which record dtype, shape and bytes, and the array is made from these here. So a pickle can neither call
anything nor reach the state of an object, and a tensor needs no `torch.load`, which would take several times as long.
"""

import io
import pickle
import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.common.pickles import check_memo, may_fill_memo

# Plain numbers and strings. Objects (O) would be unpickled inside numpy, and structures have no use here.
_DTYPE = re.compile(r"b1|\?|[iu][1248]|f[248]|[SU]\d{1,9}")
_TORCH_STORAGES = {
    "BoolStorage": "?",
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "BFloat16Storage": "<u2",  # numpy has no such type: made into float32
}
_TORCH_MAGIC, _TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_SCALARS = (bool, int, float, str, bytes, type(None))
# Errors that damaged or wrong bytes cause in a pickle. OSError, which the machine causes, is not one of them.
_DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


def load_restricted(data: bytes) -> Any:
    """Unpickle a value.

    Args:
        data: Result of `pickle.dumps`, of any protocol.

    Returns:
        An array (for a tensor too; bfloat16 as float32), a scalar, or a list of arrays and scalars. A list that
        holds only a list becomes that list.

    Raises:
        BadInput: For anything else, with the name of the class or function that the pickle asks for, which is not run;
            and for damaged bytes.
    """
    try:
        file = io.BytesIO(data)
        if may_fill_memo(data):
            check_memo(file, len(data))
        return _plain(_Unpickler(file).load())
    except BadInput:
        raise
    except _DAMAGE as error:
        raise BadInput(f"a pickled value is damaged: {type(error).__name__}: {error}") from None


def _plain(value: Any) -> Any:
    while isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (list, tuple, _Array)):
        value = value[0]
    return [_item(entry) for entry in value] if isinstance(value, (list, tuple)) else _item(value)


def _item(value: Any) -> Any:
    if isinstance(value, _Array) and value.array is not None:
        return value.array
    if not isinstance(value, _SCALARS):
        kind = type(value).__name__.lstrip("_")
        raise BadInput(
            f"a pickled value holds a {kind}: only numpy arrays, torch tensors, lists and scalars are read."
        )
    return value


class _StandIn:
    """Base of the stand-ins; a pickle cannot set their attributes, as it could set those of a function or a class."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it changes the state of a {type(self).__name__.lstrip('_')}")


class _Function(_StandIn):
    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _DType(_StandIn):
    __slots__ = ("dtype",)

    def __init__(self, name: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise BadInput(f"a pickled array has the dtype {name!r}: only numbers and strings are read, not objects.")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, structure, sizes, flags); for such types, the name says everything but the order.
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"dtype with the byte order {order!r}")
        if order in "<>":
            self.dtype = self.dtype.newbyteorder(order)


class _Array(_StandIn):
    __slots__ = ("array",)

    def __init__(self, array: np.ndarray | None = None) -> None:
        self.array = array

    def __setstate__(self, state: Any) -> None:
        shape, dtype, by_column, content = state[-4:]
        self.array = _from_bytes(content, dtype, shape, "F" if by_column else "C")


class _Storage(_StandIn):
    __slots__ = ("values",)

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class _StorageType(_StandIn):
    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


def _from_bytes(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(content, (bytes, bytearray)) or not isinstance(dtype, _DType) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("array without bytes, dtype or shape")
    if any(type(size) is not int or size < 0 for size in shape):
        raise pickle.UnpicklingError(f"array of the shape {shape}")
    if prod(shape) * dtype.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"array of the shape {shape} with {len(content)} bytes")
    flat = np.frombuffer(content, dtype.dtype) if content else np.empty(0, dtype.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _empty_array(*_: Any) -> _Array:
    """Stand in for numpy's `_reconstruct`; the content of the array comes later, as its state."""
    return _Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    """Stand in for numpy's `_frombuffer`, in pickles of protocol 5."""
    if order not in ("C", "F") and len(shape) > 1:
        raise pickle.UnpicklingError(f"array in the order {order!r}")
    return _Array(_from_bytes(content, dtype, shape, order))


def _scalar(dtype: Any, content: Any) -> Any:
    return _from_bytes(content, dtype, (), "C").item()


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand in for `codecs.encode`, by which pickles of protocol 2 make bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codecs.encode to {encoding!r}")
    return text.encode("latin-1")


def _empty(kind: type) -> Callable[[], Any]:
    def make() -> Any:
        return kind()

    return make


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Array:
    """Stand in for torch's `_rebuild_tensor_v2`; the arguments after the strides are for gradients."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("tensor without storage, size or strides")
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"tensor of the size {size} with strides {stride}")
    values = storage.values
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if prod(size) and (last >= len(values) or prod(size) > len(values)):
        raise pickle.UnpicklingError(f"tensor of the size {size} in a storage of {len(values)} values")
    if not prod(size):
        return _Array(np.empty(size, values.dtype))
    if stride == (1,):  # the usual case
        return _Array(values[offset : last + 1])
    steps = [step * values.itemsize for step in stride]
    return _Array(np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False))


def _storage(data: Any) -> _Storage:
    """Stand in for torch's `_load_from_bytes`: read a file of `torch.save` in the old format, with one storage.

    The file holds five pickles one after another (a magic number, the version, the byte order, the type and length of
    the storage, and its key), then its length again as an int64, and its bytes.
    """
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("torch storage without bytes")
    file, head, suspicious = io.BytesIO(data), [], may_fill_memo(data)
    for _ in range(5):
        if suspicious:
            check_memo(file, len(data))
        head.append(_StorageUnpickler(file).load())
    (kind, key, length), keys = head[3], head[4]
    if head[:2] != [_TORCH_MAGIC, _TORCH_PROTOCOL] or head[2].get("little_endian") is not True or keys != [key]:
        raise pickle.UnpicklingError("torch storage of another format")
    content = data[file.tell() :]
    dtype = np.dtype(_TORCH_STORAGES[kind])
    if int.from_bytes(content[:8], "little") != length or len(content) != 8 + length * dtype.itemsize:
        raise pickle.UnpicklingError(f"torch storage of {length} values is truncated")
    values = np.frombuffer(content, dtype, offset=8) if length else np.empty(0, dtype)
    if kind == "BFloat16Storage":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _Storage(values)


_ADMITTED: dict[tuple[str, str], _StandIn] = {
    ("numpy", "ndarray"): _Function(_empty_array),
    ("numpy", "dtype"): _Function(_DType),
    ("_codecs", "encode"): _Function(_encode),
    ("builtins", "bytes"): _Function(_empty(bytes)),
    ("__builtin__", "bytes"): _Function(_empty(bytes)),
    ("collections", "OrderedDict"): _Function(_empty(dict)),  # a tensor's hooks; there are none
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch.storage", "_load_from_bytes"): _Function(_storage),
}
for _module in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _ADMITTED[_module + ".multiarray", "_reconstruct"] = _Function(_empty_array)
    _ADMITTED[_module + ".multiarray", "scalar"] = _Function(_scalar)
    _ADMITTED[_module + ".numeric", "_frombuffer"] = _Function(_frombuffer)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _refusal(module, name) from None


class _StorageUnpickler(pickle.Unpickler):
    """Unpickler of the head of a torch storage: numbers, a dict of them, and the type of the storage."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TORCH_STORAGES:
            return _StorageType(name)
        raise _refusal(module, name)

    def persistent_load(self, pid: Sequence[Any]) -> tuple[str, str, int]:
        mark, kind, key, _, length, view = pid
        if mark != "storage" or not isinstance(kind, _StorageType) or type(length) is not int or view is not None:
            raise pickle.UnpicklingError("torch storage of another format")
        return kind.name, key, length


def _refusal(module: str, name: str) -> BadInput:
    return BadInput(
        f"a pickled value asks for {module}.{name}, and only numpy arrays, torch tensors, lists and scalars are read. "
        "Nothing of it was run. If you trust where it comes from, write the column again as numpy arrays."
    )
