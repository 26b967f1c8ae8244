"""A shard's file is the same, written at once or handed over in bytes, and gives back what it was made of."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tahoex1_hf.embedding import shards
from tahoex1_hf.embedding.shards import Shard, ShardFolder, packed


def make_shard(cells: int, width: int = 4) -> Shard:
    embeddings = np.random.default_rng(0).standard_normal((cells, width), dtype=np.float32)
    numbers = {"deviation": np.arange(cells, dtype=np.float32)}
    obs = pa.table({"kind": [f"kind{i % 2}" for i in range(cells)]})
    return Shard([f"cell{i}" for i in range(cells)], embeddings, 2, numbers, obs)


@pytest.mark.parametrize(("group", "groups"), [(2**18, 1), (12, 4), (1, 10)])
def test_a_shard_comes_back(group: int, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_GROUP_VALUES", group)
    shard, folder = make_shard(10), ShardFolder(str(tmp_path / "shards"))
    folder.write(0, 3, shard)
    folder.write_packed(3, 6, packed(shard))
    first, second = sorted((tmp_path / "shards").iterdir())
    assert first.read_bytes() == second.read_bytes()
    assert pq.ParquetFile(first).num_row_groups == groups
    for found in (folder.read(0, 3), folder.read(3, 6)):
        np.testing.assert_array_equal(found.embeddings, shard.embeddings)
        np.testing.assert_array_equal(found.numbers["deviation"], shard.numbers["deviation"])
        assert (found.names, found.num_empty) == (shard.names, 2)
        assert found.obs is not None
        assert found.obs.to_pydict() == shard.obs.to_pydict()  # type: ignore[union-attr]


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ShardFolder(str(tmp_path))

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.pq, "write_table", stopped)
    with pytest.raises(KeyboardInterrupt):
        folder.write(0, 3, make_shard(10))
    assert folder.finished() == []
    assert not list(tmp_path.iterdir())
