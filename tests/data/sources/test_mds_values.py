"""Pickled numbers in MDS shards come back as they were; anything else that a pickle asks for is refused."""

import itertools
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.data.sources.mds_format import decoder_of
from tahoex1_hf.data.sources.restricted_pickle import load_restricted


class Calls:
    """An object that pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "hide",
    [
        lambda evil: evil,
        lambda evil: [1, 2, evil],
        lambda evil: {"a": evil},
        lambda evil: np.array([1, evil], dtype=object),
        lambda evil: Calls(torch._utils._rebuild_tensor_v2, evil, 0, (1,), (1,), False, OrderedDict()),
        lambda evil: Calls(torch.storage._load_from_bytes, pickle.dumps(evil)),
    ],
    ids=["alone", "in_list", "in_dict", "in_object_array", "in_tensor", "in_storage"],
)
def test_nothing_is_run(hide: Callable[[Any], Any], protocol: int, tmp_path: Path) -> None:
    evil = pickle.dumps(hide(Calls(os.system, f"touch {tmp_path / 'was_run'}")), protocol=protocol)
    with pytest.raises(BadInput, match=r"asks for (posix|nt)\.system|dtype 'O8'"):
        load_restricted(evil)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([None]), "dtype 'O8'"),
        (np.zeros(1, dtype=[("a", "O"), ("b", "i4")]), "dtype 'V12'"),
        (np.array(["2020"], dtype="M8[D]"), "dtype 'M8'"),
        ({"a": 1}, "holds a dict"),
        ([1, {2}], r"holds a set|asks for (__builtin__|builtins)\.set"),
        ([[1], [2]], "holds a list"),
        (Decimal(1), r"asks for decimal\.Decimal"),
        (np.dtype("i4"), "holds a DType"),
        (torch.float32, r"asks for torch\.float32"),
        (np.lib.stride_tricks.as_strided, r"asks for numpy.*\.as_strided"),
        (eval, r"asks for (builtins|__builtin__)\.eval"),
    ],
)
def test_other_pickles_are_refused(value: Any, message: str) -> None:
    for protocol in range(2, 6):
        with pytest.raises(BadInput, match=message):
            load_restricted(pickle.dumps(value, protocol=protocol))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        pickle.dumps(np.arange(9))[:-20],
        pickle.dumps(torch.arange(9))[:-20],
        b"cnumpy\nndarray\n}(X\x08\x00\x00\x00__call__K\x01ub.",  # sets an attribute of what it was given
        b"cnumpy\nndarray\n(N}X\x09\x00\x00\x00_functionK\x01stb.",
        b"ctorch.storage\n_load_from_bytes\n}X\x03\x00\x00\x00abcK\x01sb.",
        b"cnumpy._core.multiarray\n_reconstruct\n)R.",  # an array without content
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00i8tR(K\x03X\x01\x00\x00\x00<N}}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb.",
        pickle.dumps(torch.arange(9)).replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        pickle.dumps(torch.arange(9)).replace(b"torch\nLongStorage", b"torch\nFloatStorage"),
        b"P0\n.",  # a persistent id
        b"\x82\x01.",  # a registered extension
        pickle.dumps(Calls(torch.storage._load_from_bytes, b"PK\x03\x04")),
    ],
    ids=(f"case {number}" for number in itertools.count()),  # torch puts addresses into its pickles
)
def test_damaged_and_crafted_pickles(content: bytes) -> None:
    with pytest.raises(BadInput, match="pickled value"):
        load_restricted(content)
    np.testing.assert_array_equal(load_restricted(pickle.dumps(np.arange(3))), np.arange(3))  # still works


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (11,), (1,)), (5, (6,), (1,)), (0, (4,), (4,)), (-1, (2,), (1,)), (0, (99,), (0,))],
)
def test_tensor_outside_its_storage(offset: int, size: tuple[int], stride: tuple[int]) -> None:
    storage = torch.arange(10).storage()
    value = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    with pytest.raises(BadInput, match="tensor of the size"):
        load_restricted(pickle.dumps(value))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("protocol", range(2, 6))
def test_numbers_come_back_as_they_were(protocol: int) -> None:
    arrays = [np.arange(5).astype(dtype) for dtype in "? i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8 >i4 >f8".split()]
    arrays += [np.empty(0), np.arange(12).reshape(3, 4).T, np.arange(9)[::-2], np.array(["a", "bé"]), np.array([b"a"])]
    tensors = [torch.arange(5).to(getattr(torch, name)) for name in "bool uint8 int8 int16 int32 int64".split()]
    tensors += [torch.arange(5).to(getattr(torch, name)) for name in "float16 float32 float64 bfloat16".split()]
    tensors += [torch.empty(0), torch.arange(12).view(3, 4).t()[1:], torch.tensor(3), torch.arange(9)[2::3]]
    for value in (*arrays, *tensors):
        got = load_restricted(pickle.dumps(value, protocol=protocol))
        wanted = (
            value if isinstance(value, np.ndarray) else (value.float() if value.dtype == torch.bfloat16 else value)
        )
        np.testing.assert_array_equal(got, np.asarray(wanted), strict=not str(got.dtype).startswith(">"))
        assert got.dtype.kind == np.asarray(wanted).dtype.kind
    for value in (3, 2.5, "x", None, True, [1, 2.5], [], 10**30, b"", b"x"):
        assert load_restricted(pickle.dumps(value, protocol=protocol)) == value
    assert load_restricted(pickle.dumps((np.float32(1.5), np.int64(2)), protocol=protocol)) == [1.5, 2]


def test_pickles_of_numpy_1() -> None:
    """numpy 1 had other names for its modules."""
    for value in (np.arange(4), np.float64(2)):
        old = pickle.dumps(value, protocol=2).replace(b"numpy._core", b"numpy.core")
        assert b"numpy.core" in old
        np.testing.assert_array_equal(load_restricted(old), value)


def test_array_encodings() -> None:
    decode, size = decoder_of("ndarray:int16:2,3")
    assert size == 12
    np.testing.assert_array_equal(decode(np.arange(6, dtype="<i2").tobytes()), np.arange(6).reshape(2, 3))
    decode, size = decoder_of("ndarray")
    assert size == 0
    got = decode(bytes([66, 2 << 2 | 1, 1, 0, 2, 0]) + np.array([1.5, 2]).tobytes())  # float64, two uint16 of shape
    np.testing.assert_array_equal(got, [[1.5, 2]])
    for bad in ("ndarray:object", "ndarray:int16:", "list[png]", "os.system"):
        with pytest.raises(BadInput, match="is not read"):
            decoder_of(bad)


@pytest.mark.parametrize("note", [b"r\xff\xff\xff\x7f", b"p2147483647\n"], ids=["binary", "text"])
@pytest.mark.parametrize("place", ["outside", "in_storage"])
def test_a_note_under_a_large_number_is_refused(note: bytes, place: str) -> None:
    """The list of notes would be made as long as the number: gigabytes for ten bytes."""
    bomb = b"\x80\x02K\x01" + note + b"."
    if place == "in_storage":
        bomb = pickle.dumps(Calls(torch.storage._load_from_bytes, bomb), protocol=2)
    with pytest.raises(BadInput, match="numbers an entry of its memo 2147483647"):
        load_restricted(bomb)


def test_bytes_of_an_array_that_look_like_notes() -> None:
    array = np.frombuffer(b"r\xff\xff\xff\x7fp2147483647\n..." * 4, dtype=np.uint8)
    for value in (array, torch.tensor(array.copy())):
        np.testing.assert_array_equal(load_restricted(pickle.dumps(value)), array)
