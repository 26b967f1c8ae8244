# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Check of an HDF5 file's heaps of strings, in which the HDF5 library may search forever.

Strings of any length, such as the names of cells and most attributes, lie in heaps. A heap is a sequence of pieces,
each of which gives its length. A blank piece, as where a copy that was cut off left a hole, has the length 0; from it
the library goes on to the same piece again, in a loop that nothing but a kill ends. So heaps are looked at before.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

from tahoex1_hf.cells.readers.base import BadInput

_SIGNATURE, _HEAD = b"GCOL", 16  # bytes before the first piece, and of the head of a piece
_PIECE = struct.Struct("<HHIQ")  # number of the piece, references, nothing, length
_SMALL = 2**20  # bytes of a dataset below which its content is searched, too


def check_heaps(file: Any, path: str, datasets: list[Any]) -> None:
    """Check all heaps of a file.

    Args:
        file: File opened by h5py.
        path: Path of the file.
        datasets: Datasets of the file, whose numbers are not searched for heaps.

    Raises:
        BadInput: If a heap has a blank piece.
    """
    if not os.path.getsize(path) or file.id.get_create_plist().get_sizes() != (8, 8):
        return
    skipped = sorted(region for dataset in datasets for region in _numbers(dataset))
    with open(path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start in _heaps(data, skipped):
            if _has_blank_piece(data, start):
                raise BadInput(
                    f"its heap of strings at byte {start} is blank in part, as where a copy was cut off: it is "
                    "damaged; copy or download it again."
                )


def _numbers(dataset: Any) -> Iterator[tuple[int, int]]:
    """Yield where the numbers of a large dataset lie: first byte, and the byte after the last."""
    if dataset.dtype.kind == "O" or dataset.id.get_storage_size() < _SMALL:
        return
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        if offset is not None:
            yield offset, offset + dataset.id.get_storage_size()
        return
    chunks: list[tuple[int, int]] = []
    dataset.id.chunk_iter(lambda chunk: chunks.append((chunk.byte_offset, chunk.byte_offset + chunk.size)))
    yield from chunks


def _heaps(data: mmap.mmap, skipped: list[tuple[int, int]]) -> Iterator[int]:
    """Yield the first byte of everything that begins like a heap, outside of some regions."""
    at = 0
    for start, stop in [*skipped, (len(data), len(data))]:
        found = data.find(_SIGNATURE, at, start)
        while found >= 0:
            yield found
            found = data.find(_SIGNATURE, found + len(_SIGNATURE), start)
        at = max(at, stop)


def _has_blank_piece(data: mmap.mmap, start: int) -> bool:
    """Return whether the library would stand still in a heap."""
    head = data[start : start + _HEAD]
    if len(head) < _HEAD or head[4:8] != b"\x01\x00\x00\x00":
        return False  # no heap of a version that there is
    size = int.from_bytes(head[8:], "little")
    heap = data[start : start + size] if _HEAD < size <= len(data) - start else b""
    if bytes(_HEAD) not in heap[_HEAD:]:
        return False
    at = _HEAD
    while at + _HEAD <= len(heap):
        number, _, _, length = _PIECE.unpack_from(heap, at)
        if number == 0 and length == 0:
            return True
        at += _HEAD + -(-length // 8) * 8 if number else length
    return False
