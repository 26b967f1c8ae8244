"""Memory that is free goes back to the system."""

import sys
from pathlib import Path

import pytest

from tahoex1_hf.common import free_memory
from tahoex1_hf.common.free_memory import give_back_memory

NUMBER, SIZE = 40_000, 1_000  # 40 MB of pieces that Python leaves to the C library


def resident_mb() -> float:
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_lies_between_pieces_in_use_is_given_back() -> None:
    if free_memory._trim() is None:
        pytest.skip("another C library than glibc")
    pieces = [bytes(SIZE) for _ in range(NUMBER)]
    kept = pieces[NUMBER - 100 :]  # behind the others, so that the heap's end does not move
    full = resident_mb()
    del pieces
    give_back_memory()
    assert full - resident_mb() > 0.5 * NUMBER * SIZE / 2**20
    assert len(kept) == 100


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_happens(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory._trim.cache_clear()
    try:
        monkeypatch.setattr(sys, "platform", platform)
        assert free_memory._trim() is None
        give_back_memory()
    finally:
        free_memory._trim.cache_clear()
