"""Errors of other libraries as bad input."""

from collections.abc import Iterator

import pytest

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.cells.readers.unreadable import as_bad_input, guarded


@pytest.mark.parametrize(
    "error", [KeyError("X"), OSError("truncated file"), UnicodeDecodeError("utf-8", b"", 0, 1, "")]
)
def test_what_a_file_holds(error: Exception) -> None:
    with pytest.raises(BadInput, match=rf"^it cannot be read \({type(error).__name__}"), as_bad_input():
        raise error


@pytest.mark.parametrize("error", [PermissionError("no"), ImportError("no h5py"), OSError(28, "disk full")])
def test_what_the_system_says(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, as_bad_input():
        raise error
    assert raised.value is error


def test_errors_of_whoever_reads_on_are_left_alone() -> None:
    def read() -> Iterator[int]:
        yield 1
        raise KeyError("indptr")

    with pytest.raises(ZeroDivisionError):
        sum(1 // (item - 1) for item in guarded(read()))
    with pytest.raises(BadInput, match="indptr"):
        list(guarded(read()))
