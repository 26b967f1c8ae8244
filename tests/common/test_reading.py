"""Errors that name the file they come from."""

import errno
import json
from pathlib import Path

import pytest

from tahoex1_hf.common.disguises import disguise
from tahoex1_hf.common.reading import reading


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (KeyError("shape"), ValueError, "data/a.h5ad cannot be read (KeyError: 'shape'): it is damaged"),
        (TypeError("one\ntwo"), ValueError, "data/a.h5ad cannot be read (TypeError: one): it is damaged"),
        (TypeError("of a:\n  b\nc"), ValueError, "data/a.h5ad cannot be read (TypeError: of a: b): it is damaged"),
        (MemoryError(), ValueError, "data/a.h5ad cannot be read (what it declares does not fit into memory"),
        (ValueError("a row is short"), ValueError, "data/a.h5ad: a row is short"),
        (ValueError("a.h5ad: a row is short"), ValueError, "a.h5ad: a row is short"),
        (OSError("no signature"), ValueError, "data/a.h5ad cannot be read (OSError: no signature)"),
        (PermissionError(errno.EACCES, "no"), PermissionError, "data/a.h5ad: [Errno 13] no"),
        (ImportError("h5py is missing"), ImportError, "h5py is missing"),
    ],
)
def test_errors_name_the_file(error: Exception, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised, reading("data/a.h5ad"):
        raise error
    assert str(raised.value).startswith(message)


def test_errors_of_other_libraries_that_are_value_errors(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^vocab\.json cannot be read \(JSONDecodeError: Expecting value"),
        reading(Path("vocab.json")),
    ):
        json.loads("")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer, not the file"),
        (b"\n<!DOCTYPE html>\n<html>", "is a web page, not the file itself"),
        (b"", "is empty"),
        (bytes(2000), "begins with zeros"),
    ],
)
def test_files_that_are_something_else_are_called_so(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "good.h5ad").write_bytes(b"\x89HDF")
    (tmp_path / "cells.h5ad").write_bytes(content)
    for error in (KeyError("shape"), ValueError("cells.h5ad is damaged"), OSError("no signature")):
        with (
            pytest.raises(ValueError, match=rf"cells\.h5ad {told}"),
            reading(tmp_path / "good.h5ad", tmp_path / "cells.h5ad"),
        ):
            raise error
    for other in (tmp_path, tmp_path / "missing", "s3://bucket/cells.h5ad"):
        assert disguise(other) is None


def test_nothing_happens_without_an_error() -> None:
    with reading("a"):
        pass
    with pytest.raises(KeyboardInterrupt), reading("a"):
        raise KeyboardInterrupt
