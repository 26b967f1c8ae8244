"""A shard finds the same cells in pieces that are mapped and in pieces in a store, of which it reads little."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tahoex1_hf.common.folders import Folder
from tahoex1_hf.data.columns import to_arrow
from tahoex1_hf.data.piece_folder import MappedPieces, StoredPieces, piece_folder
from tahoex1_hf.data.pieces import PieceStatistics

LAST = 2**64 - 1


def made(rng: np.random.Generator, cells: tuple[int, int]) -> list[pa.RecordBatch]:
    """Make the two batches of a piece, whose keys include the first and the last that there can be."""
    batches, texts = [], to_arrow(pd.Series(["B", None, "T", "B"]))
    for number in cells:
        keys = np.sort(rng.integers(0, LAST, number, dtype=np.uint64, endpoint=True))
        keys[:1], keys[1:2] = 0, LAST
        lengths = rng.integers(1, 5, number)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        genes = pa.array(rng.integers(0, 60, lengths.sum()).astype(np.uint16))
        columns = {
            "key": pa.array(np.sort(keys)),
            "genes": pa.ListArray.from_arrays(offsets, genes),
            "counts": pa.ListArray.from_arrays(offsets, genes),
            "type": texts.take(pa.array(rng.integers(0, 4, number))),
            "age": pa.array(rng.normal(size=number)),
        }
        batches.append(pa.RecordBatch.from_pydict(columns))
    return batches


def rows(batches: list[pa.RecordBatch]) -> list[dict[str, Any]]:
    return [row for batch in batches for row in batch.to_pylist()]


def test_a_shard_has_the_same_cells_from_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    mapped, stored = piece_folder(Folder(str(tmp_path))), piece_folder(Folder(f"memory://{tmp_path}"))
    assert isinstance(mapped, MappedPieces)
    assert isinstance(stored, StoredPieces)
    sizes = [(900, 40), (16, 0), (0, 5), (1, 1), (0, 0), (257, 17)]
    names = [f"{number:06d}-000000000000" for number in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        statistics = PieceStatistics(cells_in=sum(size), cells={"train": size[0], "validation": size[1]}, counts=0.5)
        for folder in (mapped, stored):
            folder.write(name, made(np.random.default_rng(sum(size)), size), statistics)
    stored = StoredPieces(stored.folder)  # without what it remembers
    assert mapped.finished() == stored.finished() == set(names)
    assert mapped.summaries(names) == stored.summaries(names)
    fetched: list[int] = []
    read = Folder.read_ranges

    def counted(self: Folder, ranges: Any) -> list[bytes]:
        found = read(self, ranges)
        fetched.extend(len(each) for each in found)
        return found

    monkeypatch.setattr(Folder, "read_ranges", counted)
    for split, total in (("train", sum(size[0] for size in sizes)), ("validation", sum(size[1] for size in sizes))):
        for num_shards in (1, 3, 8, int(rng.integers(9, 60))):
            found = [stored.key_range(names, split, number, num_shards) for number in range(num_shards)]
            expected = [mapped.key_range(names, split, number, num_shards) for number in range(num_shards)]
            assert [rows(each) for each in found] == [rows(each) for each in expected]
            assert sum(batch.num_rows for each in found for batch in each) == total
    # A 60th of the keys: the batches of some 16 cells at its ends, not the 900 cells of the first piece.
    fetched.clear()
    stored.key_range(names[:1], "train", 30, 60)
    whole = Folder(stored.folder.location).size(f"{names[0]}.cells")
    assert whole is not None
    assert sum(fetched) < whole / 10
    for column in ("type", "age"):
        one: set[str] = set()
        two: set[str] = set()
        for name in names:
            mapped.add_values(one, name, column)
            stored.add_values(two, name, column)
        assert one == two
        assert one


def test_a_piece_without_its_index_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("memory://pieces/without-index")
    real = Folder.write_file

    def killed(self: Folder, name: str, content: bytes) -> None:
        if name.endswith(".json"):
            raise KeyboardInterrupt
        real(self, name, content)

    monkeypatch.setattr(Folder, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        StoredPieces(folder).write("a", made(np.random.default_rng(0), (40, 3)), PieceStatistics())
    assert folder.names() == ["a.cells"]
    assert StoredPieces(folder).finished() == set()
