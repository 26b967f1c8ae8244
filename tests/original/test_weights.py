"""Weights are read wherever they lie; damaged, malicious or ambiguous files are refused."""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import as_composer_file, as_sharded, composer_state, copy_settings
from helpers import GOLDEN, GOLDEN_VARIANTS, Variant
from mapped import names_in_memory
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tahoex1_hf import TahoeX1ForPreTraining
from tahoex1_hf.original.convert import convert_original_folder, open_original
from tahoex1_hf.original.restore import restore_original_folder
from tahoex1_hf.original.tensor_names import our_shapes
from tahoex1_hf.original.weights import open_weights

PLAIN, WITH_DRUGS = GOLDEN / "a_70m_like" / "model", GOLDEN / "b_3b_like_chem" / "model"
every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PLAIN, tmp_path / "source"))


def test_shards_and_index(tmp_path: Path) -> None:
    convert_original_folder(PLAIN, tmp_path / "one")
    convert_original_folder(PLAIN, tmp_path / "many", max_shard_size=200_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 205_825, "total_size": 4 * 205_825}
    found = {}
    for name in shards:
        tensors = load_file(tmp_path / "many" / name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 200_000
        assert {index["weight_map"][key] for key in tensors} == {name}
        found |= tensors
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    _, report = TahoeX1ForPreTraining.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("pickled", [False, True])
def test_weights_stay_in_their_file(pickled: bool, tmp_path: Path) -> None:
    """A conversion holds no weights in memory but a matrix that it transposes."""
    source = Path(as_composer_file(PLAIN, tmp_path)) if pickled else PLAIN
    model = open_original(source).load_model()
    path = source if pickled else source / "model.safetensors"
    assert names_in_memory(model, path) == {"cell_decoder.cell_proj.weight"}


@every_variant
def test_bfloat16(variant: Variant, tmp_path: Path) -> None:
    convert_original_folder(variant.checkpoint, tmp_path / "out", dtype=torch.bfloat16)
    whole = open_original(variant.checkpoint).load_model().state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    verification = json.loads((tmp_path / "out" / "conversion.json").read_text())["verification"]
    assert verification["tensors"] == "equal after rounding"


@pytest.mark.parametrize("keep", [0, 5, 1000, 500_000])
def test_truncated_safetensors(keep: int, source: Path) -> None:
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(keep)
    with pytest.raises(ValueError, match=r"is truncated|is empty"):
        convert_original_folder(source, source.parent / "out")


@pytest.mark.parametrize("keep", [0, 1000, 500_000])
def test_truncated_pickle(keep: int, tmp_path: Path) -> None:
    path = Path(as_composer_file(PLAIN, tmp_path))
    with path.open("r+b") as file:
        file.truncate(keep)
    with pytest.raises(ValueError, match=r"as a checkpoint of tensors alone|is empty"):
        convert_original_folder(path, tmp_path / "out")


def test_wrong_vocabulary_and_renamed_tensor_and_unknown_key(source: Path) -> None:
    vocab = json.loads((source / "vocab.json").read_text())
    (source / "vocab.json").write_text(json.dumps(vocab | {"ENSG_extra": len(vocab)}))
    with pytest.raises(ValueError, match=r"vocab_size = 603, but vocab\.json has 604 tokens"):
        convert_original_folder(source, source.parent / "out")
    (source / "vocab.json").write_text(json.dumps(vocab))
    tensors = load_file(source / "model.safetensors")
    tensors["model.flag_enc.weight"] = tensors.pop("model.flag_encoder.weight")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)missing: model\.flag_encoder.*unexpected: model\.flag_enc\.weight"):
        convert_original_folder(source, source.parent / "out")


@pytest.mark.parametrize("write", [None, as_composer_file, as_sharded], ids=["safetensors", "pickle", "sharded"])
def test_names_of_wrappers_are_taken_off(write: Any, source: Path, tmp_path: Path, caplog: Any) -> None:
    convert_original_folder(source, tmp_path / "expected")
    tensors = {f"module._orig_mod.{name}": t.clone() for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    wrapped = source if write is None else Path(write(source, tmp_path / "written"))
    with caplog.at_level(logging.INFO, logger="tahoex1_hf"):
        convert_original_folder(wrapped, tmp_path / "out")
    assert any("took module._orig_mod. off the names" in record.message for record in caplog.records)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # And the other way, from a converted folder whose weights were saved by a wrapper.
    save_file({f"module.{name}": t for name, t in expected.items()}, tmp_path / "out" / "model.safetensors")
    restore_original_folder(tmp_path / "out", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(PLAIN / "model.safetensors").keys()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_not_converted(value: float, source: Path, tmp_path: Path) -> None:
    convert_original_folder(source, tmp_path / "good")
    for folder, name, convert in (
        (source, "model.flag_encoder.weight", convert_original_folder),
        (tmp_path / "good", "tahoe.norm.bias", restore_original_folder),
    ):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        tensors[name].view(-1)[5] = value
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"model\.safetensors holds 1 values that are NaN .* in {name}"):
            convert(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_pointers_are_called_so(source: Path) -> None:
    for name in ("model.safetensors", "vocab.json", "model_config.yml", "collator_config.yml"):
        content = (source / name).read_bytes()
        (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
            convert_original_folder(source, source.parent / "out")
        (source / name).write_bytes(content)


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_malicious_pickles_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    copy_settings(PLAIN, tmp_path / "src")
    state = composer_state(load_file(PLAIN / "model.safetensors"))
    torch.save(state | {"extra": Runs(marker)}, tmp_path / "src" / "ep1.pt")
    with pytest.raises(ValueError, match=r"it asks for posix\.system\. Nothing of it was run"):
        convert_original_folder(tmp_path / "src" / "ep1.pt", tmp_path / "out")

    sharded = Path(as_sharded(PLAIN, tmp_path / "dcp")) / "ep4-ba104156"
    (sharded / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Runs(marker)}))
    with pytest.raises(ValueError, match=r"it asks for posix\.system\. Nothing of it was run"):
        convert_original_folder(sharded, tmp_path / "out")

    with_fingerprints = Path(shutil.copytree(WITH_DRUGS, tmp_path / "drugs"))
    np.save(with_fingerprints / "drug_fps_pad.npy", np.array([Runs(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="could not be read as an array of numbers"):
        convert_original_folder(with_fingerprints, tmp_path / "out")
    assert not marker.exists()
    np.load(with_fingerprints / "drug_fps_pad.npy", allow_pickle=True)  # here the command does run
    assert marker.exists()


def test_ambiguous_weights_are_refused(tmp_path: Path) -> None:
    path = Path(as_composer_file(PLAIN, tmp_path))
    convert_original_folder(path.parent, tmp_path / "the only one")
    shutil.copy(path, path.parent / "ep5.pt")
    with pytest.raises(FileNotFoundError, match=r"several checkpoints.*ep4-ba104156-rank0\.pt, ep5\.pt"):
        convert_original_folder(path.parent, tmp_path / "out")


def test_reader_of_converted_shards(tmp_path: Path) -> None:
    convert_original_folder(PLAIN, tmp_path / "many", max_shard_size=200_000)
    reader = open_weights(tmp_path / "many" / "model.safetensors.index.json")
    assert reader.shapes == our_shapes(open_original(PLAIN).config)
