"""Chunks are embedded in order; on a GPU the next one is begun before the last one is finished."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tahoex1_hf.inference import chunks
from tahoex1_hf.inference.chunks import embed_chunks
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


class Recorder:
    """An encoder that notes what is asked of it."""

    dtype_name, width = "float32", 2

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.done: list[str] = []

    def begin(self, chunk: EncodedCells, *_: Any) -> Callable[[], np.ndarray]:
        number = int(chunk.cell_numbers[0])
        self.done.append(f"begin {number}")

        def finish() -> np.ndarray:
            self.done.append(f"finish {number}")
            return np.full((1, 2), number, dtype=np.float32)

        return finish


def some_chunks(number: int) -> Iterator[EncodedCells]:
    for at in range(number):
        yield EncodedCells(np.array([1]), np.array([0.0]), np.array([0, 1]), None, np.array([at]), np.zeros(0, int))


def embedded(device: str, means: Any = None) -> list[str]:
    encoder = Recorder(device)
    found = []
    for made in embed_chunks(encoder, some_chunks(3), SimpleNamespace(), means):  # type: ignore[arg-type]
        found.append(int(made.embeddings[0, 0]))
        encoder.done.append(f"given {found[-1]}")
    assert found == [0, 1, 2]
    return encoder.done


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "check_results", lambda *_: None)


ONE_BY_ONE = [f"{what} {number}" for number in range(3) for what in ("begin", "finish", "given")]


def test_on_a_gpu_the_next_chunk_is_begun_first() -> None:
    assert embedded("cuda") == [
        "begin 0", "begin 1", "finish 0", "given 0", "begin 2", "finish 1", "given 1", "finish 2", "given 2",
    ]  # fmt: skip


def test_elsewhere_chunks_follow_one_another() -> None:
    assert embedded("cpu") == ONE_BY_ONE


def test_sums_of_gene_embeddings_hold_no_chunk_that_was_not_given() -> None:
    assert embedded("cuda", object()) == ONE_BY_ONE


def test_no_chunks() -> None:
    assert list(embed_chunks(Recorder("cuda"), iter(()), SimpleNamespace())) == []  # type: ignore[arg-type]
