"""Converting a checkpoint gives the same numbers from every place where it may lie, or an error that helps."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import as_composer_file, as_sharded
from helpers import GOLDEN, GOLDEN_VARIANTS, Variant, largest_difference
from huggingface_hub import constants
from safetensors.torch import load_file

from tahoex1_hf import TahoeX1ForPreTraining
from tahoex1_hf.hub.sources import choose_size, convert_checkpoint
from tahoex1_hf.original.convert import convert_original_folder

PLAIN, WITH_DRUGS = GOLDEN / "a_70m_like" / "model", GOLDEN / "b_3b_like_chem" / "model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def as_folder(checkpoint: Path, place: Path) -> str:
    shutil.copytree(checkpoint, place / "src")
    return str(place / "src")


def as_sized_folder(checkpoint: Path, place: Path) -> str:
    shutil.copytree(checkpoint, place / "src" / "3b-model")
    return str(place / "src")


def as_hub(checkpoint: Path, place: Path) -> str:
    repo = place / "hub" / "models--owner--name"
    shutil.copytree(checkpoint, repo / "snapshots" / COMMIT / "3b-model")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return "owner/name"


def as_s3(checkpoint: Path, place: Path, access: str = "private") -> str:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket=(bucket := place.name.replace("_", "-") + "-tahoe"), ACL=access)
    for path in checkpoint.iterdir():
        client.upload_file(str(path), bucket, f"MFM/ckpts/3b/{path.name}", ExtraArgs={"ACL": access})
    return f"s3://{bucket}/MFM/ckpts/"


SOURCES = {
    "folder": (as_folder, None),
    "sized_folder": (as_sized_folder, "3b"),
    "composer_file": (as_composer_file, None),
    "sharded": (as_sharded, None),
    "hub": (as_hub, "3b"),
    "s3": (as_s3, "3b"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_recorded_outputs(
    kind: str, variant: Variant, tmp_path: Path, hub: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    make, size = SOURCES[kind]
    source = make(variant.checkpoint, tmp_path)
    verification = convert_checkpoint(source, tmp_path / "out", size=size)
    assert max(verification.differences.values()) < 1e-5
    model = TahoeX1ForPreTraining.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        outputs = model(**variant.batch("batch_masked", targets=True))
    recorded = variant.recorded("out_masked")
    assert largest_difference(outputs.pooler_output, recorded["cell_emb"]) < 2e-5
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["num_parameters"] == model.num_parameters()
    if kind == "hub":
        assert manifest["source"] == f"https://huggingface.co/owner/name/tree/{COMMIT}/3b-model"
    if kind == "s3":
        assert manifest["source"].endswith("/MFM/ckpts/3b")
    assert {"model_config.yml", "collator_config.yml", "vocab.json"} < set(manifest["files_read"])


def test_sharded_tensors_equal_the_whole(tmp_path: Path) -> None:
    source = as_sharded(WITH_DRUGS, tmp_path)
    convert_original_folder(source, tmp_path / "pieces")
    convert_original_folder(WITH_DRUGS, tmp_path / "whole")
    pieces, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("pieces", "whole"))
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_a_tensor_in_several_pieces(tmp_path: Path) -> None:
    """FSDP cuts tensors along their rows; here one index lists the pieces of two processes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    from tahoex1_hf.original.weights import open_weights

    tensor, name = torch.randn(5, 4), "state.model.model.x"
    chunks, places = [], {}
    for number, part in enumerate(tensor.split([3, 2])):
        offsets = torch.Size([3 * number, 0])
        torch.save(part.clone(), tmp_path / f"__{number}_0.distcp")
        length = (tmp_path / f"__{number}_0.distcp").stat().st_size
        chunks.append(ChunkStorageMetadata(offsets, part.shape))
        places[MetadataIndex(name, offsets)] = _StorageInfo(f"__{number}_0.distcp", 0, length)

    def write(chunks: list[Any], places: dict[Any, Any]) -> None:
        import pickle

        entry = TensorStorageMetadata(TensorProperties(torch.float32), tensor.shape, chunks)
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({name: entry}, storage_data=places)))

    write(chunks, places)
    assert torch.equal(open_weights(tmp_path).read("model.x"), tensor)
    write(chunks[:1], places)
    with pytest.raises(ValueError, match="do not add up"):
        open_weights(tmp_path).read("model.x")
    write(chunks, {index: _StorageInfo("../__0_0.distcp", 0, 10) for index in places})
    with pytest.raises(ValueError, match="outside its folder"):
        open_weights(tmp_path)
    write(chunks, places)
    (tmp_path / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated or damaged at model"):
        open_weights(tmp_path).read("model.x")
    (tmp_path / "__1_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__1_0\.distcp is missing"):
        open_weights(tmp_path)


def test_choosing_a_size() -> None:
    several = ["70m-model/model_config.yml", "1b-model/model_config.yml"]
    assert choose_size(several, "70m", "X") == choose_size(several, "70m-model", "X") == "70m-model"
    assert choose_size(several, "1.3b", "X") == "1b-model"
    assert choose_size(["model_config.yml", *several], None, "X") == ""
    assert choose_size(several[:1], None, "X") == "70m-model"
    with pytest.raises(FileNotFoundError, match="X has no size '3b'; the sizes are: 1b, 70m"):
        choose_size(several, "3b", "X")
    with pytest.raises(FileNotFoundError, match="X holds several sizes; the sizes are: 1b, 70m"):
        choose_size(several, None, "X")
    with pytest.raises(FileNotFoundError, match="no size '3b'; its only checkpoint is at its root"):
        choose_size(["model_config.yml"], "3b", "X")
    with pytest.raises(FileNotFoundError, match=r"X has no model_config\.yml"):
        choose_size([], None, "X")


def test_hub_without_network(tmp_path: Path, hub: Path) -> None:
    with pytest.raises(ConnectionError, match="owner/other"):
        convert_checkpoint("owner/other", tmp_path / "out")
    as_hub(PLAIN, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no size '70m'; the sizes are: 3b"):
        convert_checkpoint("owner/name", tmp_path / "out", size="70m")
    assert convert_checkpoint("owner/name", tmp_path / "out").num_parameters == 205_825  # the only size there is
    with pytest.raises(FileNotFoundError, match="neither a folder or file, nor a Hub repository"):
        convert_checkpoint("./not/here", tmp_path / "out2")
    with pytest.raises(ValueError, match="revision='main' is for Hub repositories"):
        convert_checkpoint(PLAIN, tmp_path / "out2", revision="main")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]


def test_s3_errors(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="There is no S3 bucket nobody-has-this"):
        convert_checkpoint("s3://nobody-has-this/x", tmp_path / "out")
    source = as_s3(PLAIN, tmp_path)
    with pytest.raises(FileNotFoundError, match="no size '70m'; the sizes are: 3b"):
        convert_checkpoint(source, tmp_path / "out", size="70m")
    with pytest.raises(FileNotFoundError, match="holds no file"):
        convert_checkpoint(f"{source}elsewhere", tmp_path / "out")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ConnectionError, match="could not be reached"):
        convert_checkpoint(source, tmp_path / "out", size="3b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("credentials", [True, False])
def test_s3_signs_only_with_credentials(
    credentials: bool, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    source = as_s3(PLAIN, tmp_path, "private" if credentials else "public-read")
    (tmp_path / "private").mkdir()
    private = as_s3(PLAIN, tmp_path / "private")
    if not credentials:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    made: list[bool] = []
    real = s3fs.S3FileSystem.__init__

    def recording(self: Any, *args: Any, anon: bool, **kwargs: Any) -> None:
        made.append(anon)
        real(self, *args, anon=anon, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "__init__", recording)
    convert_checkpoint(source, tmp_path / "out")
    assert made == [not credentials]
    if not credentials:
        with pytest.raises(PermissionError, match="may not be read with your AWS credentials, nor without"):
            convert_checkpoint(private, tmp_path / "out2")


def test_s3_without_s3fs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match=r"pip install 'tahoex1_hf\[s3\]'"):
        convert_checkpoint("s3://bucket/x", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
