"""Sharded checkpoints are read without giving their index, a pickle, a class to work with."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata

from tahoex1_hf.original.sharded import ShardedReader

TENSORS = {
    "model.a": torch.arange(12.0).view(4, 3),
    "model.b": torch.ones(5, dtype=torch.bfloat16),
    "model.none": torch.zeros(0, 3),
    "model.one": torch.tensor(7),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {"state": {"model": TENSORS, "step": 3, "optimizers": {"x": {"m": torch.ones(2)}}}}
    dcp.save(state, checkpoint_id=tmp_path / "sharded", no_dist=True)
    return tmp_path / "sharded"


def read_index(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def write_index(folder: Path, index: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_tensors_are_read_as_they_were_written(folder: Path) -> None:
    reader = ShardedReader(folder)
    assert reader.shapes == {name: tensor.shape for name, tensor in TENSORS.items()}
    assert reader.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())
    assert {path.name for path in reader.files} == {".metadata", "__0_0.distcp"}


def test_a_tensor_in_pieces(folder: Path) -> None:
    """Read a tensor whose two halves several processes would have written."""
    index = read_index(folder)
    entry = index.state_dict_metadata["state.model.model.a"]
    del index.storage_data[next(key for key in index.storage_data if key.fqn == "state.model.model.a")]
    entry.chunks.clear()
    for number, part in enumerate(TENSORS["model.a"].split(2)):
        offsets = torch.Size([2 * number, 0])
        entry.chunks.append(torch_metadata.ChunkStorageMetadata(offsets=offsets, sizes=part.shape))
        torch.save(part.clone(), folder / f"part{number}")
        size = (folder / f"part{number}").stat().st_size
        place = dcp.filesystem._StorageInfo(f"part{number}", 0, size)
        index.storage_data[torch_metadata.MetadataIndex("state.model.model.a", offsets, number)] = place
    write_index(folder, index)
    assert torch.equal(ShardedReader(folder).read("model.a"), TENSORS["model.a"])
    entry.chunks.pop()
    write_index(folder, index)
    with pytest.raises(ValueError, match=r"pieces of model\.a do not add up to its shape \[4, 3\]"):
        ShardedReader(folder).read("model.a")


METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (METADATA + b"(N}S'hacked'\nI01\nstb.", "is damaged, or not the index"),  # sets an attribute of the class
        (METADATA + b".", "Metadata expected, not type"),
        (METADATA + b"(tR.", "Metadata without attributes"),
        (b"ctorch.serialization\nload\n(S'/etc/hostname'\ntR.", r"it asks for torch\.serialization\.load\. Nothing"),
        (b"\x80\x04\x8c\x05torch\x8c\x08Size.mro\x93.", r"it asks for torch\.Size\.mro"),
        (b"cbuiltins\neval\n(S'1'\ntR.", r"it asks for builtins\.eval"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "it numbers an entry of its memo"),
        (b"", "is damaged, or not the index"),
        (pickle.dumps({"state_dict_metadata": {}}), "Metadata expected, not dict"),
    ],
)
def test_an_index_can_do_nothing(content: bytes, message: str, folder: Path) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        ShardedReader(folder)
    assert "Nothing of it was run" in str(error.value)
    assert not hasattr(torch_metadata.Metadata, "hacked")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_path": "../other"}, "names a file outside its folder"),
        ({"relative_path": "other"}, "other is missing from the sharded checkpoint"),
        ({"length": 9}, r"is truncated or damaged at model\.a"),
        ({"offset": -1}, "sizes expected"),
        ({"transform_descriptors": ["zstd"]}, "is stored compressed"),
    ],
)
def test_places_that_cannot_be(changes: dict[str, Any], message: str, folder: Path) -> None:
    index = read_index(folder)
    place = next(place for key, place in index.storage_data.items() if key.fqn == "state.model.model.a")
    for name, value in changes.items():
        setattr(place, name, value)
    write_index(folder, index)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ShardedReader(folder).read("model.a")
