"""Adapters whose tensors are not those that they need are refused."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import peft
import pytest
import torch
from cells import make_cells
from finetuning_runs import write_base
from wrong_weights import KEY, LAYER, LFS, Tensors, changed, embedded, read, renamed, save, with_value, without

from tahoex1_hf import (
    TahoeX1ForSequenceClassification,
    TahoeX1Model,
    TahoeX1Tokenizer,
    embed_anndata,
    load_adapter,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return make_cells(6)


@pytest.fixture(scope="module")
def adapter(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an adapter with a head, by PEFT alone."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    base = TahoeX1ForSequenceClassification.from_pretrained(whole, num_labels=3)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(folder)
    return folder


LORA = "base_model.model.tahoe.layers.0.self_attn.q_proj.lora_B.weight"
HEAD = "base_model.model.classifier.weight"
WRONG_ADAPTERS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda w: without(w, LORA), r"lacks 1 tensors of the adapter .*lora_B"),
    "no head": (lambda w: without(w, HEAD), r"lacks base_model\.model\.classifier\.weight"),
    "renamed": (
        lambda w: renamed(w, lambda n: n.replace("q_proj", "query")),
        r"holds 4 tensors for which this base has no place, .*query",
    ),
    "of three layers": (
        lambda w: {**w, **{n.replace("layers.0", "layers.2"): t.clone() for n, t in w.items() if "layers.0" in n}},
        r"no place, base_model\.model\.tahoe\.layers\.2",
    ),
    "NaN": (lambda w: with_value(w, LORA, float("nan")), r"NaN or infinite in .*lora_B"),
    "wrong shape": (lambda w: {**w, LORA: w[LORA][:-1]}, r"does not fit this base.*lora_B.*31, 2"),
}


def changed_adapter(adapter: Path, folder: Path, change: Callable[[Tensors], Any]) -> Path:
    shutil.copytree(adapter, folder)
    tensors = read(folder / "adapter_model.safetensors")
    save(change(tensors), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("change", "message"), WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS)
def test_wrong_adapters(change: Callable[[Tensors], Any], message: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_adapter(changed_adapter(adapter, tmp_path / "adapter", change))


def test_files_of_an_adapter_that_are_not_what_they_are_called(
    adapter: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    for damaged, message in (
        (LFS.encode(), "is a Git LFS pointer"),
        (content[:-9], "is truncated"),
        (b"", "is empty"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"adapter_model.safetensors {message}"):
            load_adapter(tmp_path / "adapter")
        with pytest.raises(ValueError, match=message):
            embedded(tmp_path / "adapter", cells)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"but no adapter_model\.safetensors"):
        load_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(LFS)
    with pytest.raises(ValueError, match=r"adapter_config\.json is a Git LFS pointer"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("front", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_are_taken_off_adapters(front: str, adapter: Path, tmp_path: Path, caplog: Any) -> None:
    def wrapped(name: str) -> str:
        return f"{front}base_model.model._orig_mod.{name.removeprefix('base_model.model.')}"

    folder = changed_adapter(adapter, tmp_path / "adapter", lambda tensors: renamed(tensors, wrapped))
    with caplog.at_level(logging.INFO, logger="tahoex1_hf"):
        found = load_adapter(folder)[0].state_dict()
    expected = load_adapter(adapter)[0].state_dict()
    assert found.keys() == expected.keys()
    kept = [name for name in expected if ".original_module." not in name]  # random in the base, which has no head
    assert all(torch.equal(found[name], expected[name]) for name in kept)
    assert any("off the names of the tensors" in record.message for record in caplog.records)


def test_the_base_of_an_adapter_must_be_whole(whole: Path, adapter: Path, tmp_path: Path) -> None:
    changes: list[tuple[Callable[[Tensors], Any], str]] = [
        (lambda w: without(w, LAYER), r"lacks 1 of the 46 tensors .*, tahoe\.layers\.0\.self_attn\.q_proj"),
        (lambda w: with_value(w, LAYER, float("nan")), r"NaN or infinite in tahoe\.layers\.0\.self_attn\.q_proj"),
        (
            lambda w: {**w, f"{LAYER}_x": torch.ones(1)},
            r"holds 1 tensors that the model of config\.json",
        ),
    ]
    for number, (change, message) in enumerate(changes):
        folder = changed(whole, tmp_path / str(number), change)
        with pytest.raises(ValueError, match=message):
            load_adapter(adapter, folder)


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_an_adapter_that_was_trained_without_a_head(
    task: str | None, whole: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task, init_lora_weights=False)
    adapted = peft.get_peft_model(TahoeX1Model.from_pretrained(whole), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    copy = cells.copy()
    embed_anndata(copy, adapted, TahoeX1Tokenizer.from_pretrained(whole), progress=False, dtype="float32")
    np.testing.assert_array_equal(embedded(tmp_path / "adapter", cells), copy.obsm[KEY])
    assert not np.allclose(copy.obsm[KEY], embedded(whole, cells), atol=1e-4)
