"""Gzipped files that unfold into far more than their size."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tahoex1_hf.common import bounded
from tahoex1_hf.common.bounded import BoundedGzip


def test_an_honest_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    lines = [f"{number}\t{number**2}" for number in range(1000)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with BoundedGzip(path) as file:
        assert file.read().decode().split("\n") == lines
    with io.TextIOWrapper(BoundedGzip(path)) as text:
        assert [line.rstrip("\n") for line in text] == lines


READ: dict[str, Callable[[BoundedGzip], object]] = {
    "whole": lambda file: file.read(),
    "pieces": lambda file: list(iter(lambda: file.read(100), b"")),
    "lines": lambda file: list(io.TextIOWrapper(file)),
}


@pytest.mark.parametrize("how", READ)
def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(bounded, "_ALWAYS_BYTES", 10_000)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(10**6)))
    with BoundedGzip(path) as file, pytest.raises(ValueError, match=r"bomb\.gz expands to more than 200 times"):
        READ[how](file)
