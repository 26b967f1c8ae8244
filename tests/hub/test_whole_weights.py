"""Weights that are not what they say never give results: every way of asking for them ends in a sentence."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from cells import GENES, make_cells
from finetuning_runs import write_base
from helpers import tiny_config, tiny_model
from typer.testing import CliRunner
from wrong_weights import LAYER, LFS, Tensors, changed, embedded, read, renamed, save, with_value, without

from tahoex1_hf import (
    TahoeX1ForPreTraining,
    TahoeX1ForSequenceClassification,
    TahoeX1Model,
    TahoeX1Tokenizer,
    perturb_genes,
    predict_anndata,
)
from tahoex1_hf.cli.app import app
from tahoex1_hf.hub.loading import load_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return make_cells(6)


def configured(whole: Path, folder: Path, **settings: Any) -> Path:
    """Copy a model whose configuration is changed."""
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def sharded(whole: Path, folder: Path) -> Path:
    """Copy a model with its weights in three files."""
    shutil.copytree(whole, folder)
    tensors = read(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{number % 3 + 1:05}-of-00003.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save({name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# Names that wrappers leave -----------------------------------------------------------------------------


def in_layers(name: str) -> str:
    """Return a name as FSDP's wrappers, and compiling layer by layer inside a compiled model, make it."""
    parts = name.split(".")
    at = 3 if parts[:2] == ["tahoe", "layers"] else 1
    return ".".join(["_orig_mod", *parts[:at], "_orig_mod", "_checkpoint_wrapped_module", *parts[at:]])


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (lambda name: f"module.{name}", "module."),
        (lambda name: f"_orig_mod.{name}", "_orig_mod."),
        (lambda name: f"module._orig_mod.{name}", "module._orig_mod."),
        (lambda name: f"base_model.model.{name}", "base_model.model."),
        (lambda name: f"model.{name}", "model."),
        (lambda name: f"_forward_module.model.{name}", "_forward_module.model."),
        (lambda name: f"module.{name.removeprefix('tahoe.')}", "module."),
        (in_layers, "_checkpoint_wrapped_module., _orig_mod."),
    ],
    ids=["ddp", "compile", "ddp+compile", "peft", "lightning", "deepspeed", "no head's prefix", "fsdp in layers"],
)
@pytest.mark.parametrize("files", ["one", "sharded", "pickle"])
def test_names_of_wrappers_are_taken_off(
    rename: Callable[[str], str],
    told: str,
    files: str,
    whole: Path,
    cells: anndata.AnnData,
    tmp_path: Path,
    caplog: Any,
) -> None:
    folder = changed(whole, tmp_path / "wrapped", lambda tensors: renamed(tensors, rename))
    if files == "sharded":
        folder = sharded(folder, tmp_path / "sharded")
    if files == "pickle":
        torch.save(read(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with caplog.at_level(logging.INFO, logger="tahoex1_hf"):
        found = embedded(folder, cells)
    np.testing.assert_array_equal(found, embedded(whole, cells))
    assert [record.levelname for record in caplog.records if f"took {told} off the names" in record.message] == [
        "INFO"
    ]


def test_a_wrapped_original_is_converted_and_loaded(
    original: Path, cells: anndata.AnnData, tmp_path: Path, caplog: Any
) -> None:
    folder = changed(original, tmp_path / "wrapped", lambda tensors: renamed(tensors, lambda name: f"module.{name}"))
    with caplog.at_level(logging.INFO, logger="tahoex1_hf"):
        np.testing.assert_array_equal(embedded(folder, cells), embedded(original, cells))
    assert any("took module. off" in record.message for record in caplog.records)
    name = "model.transformer_encoder.layers.0.up_proj.weight"
    for number, wrapper in enumerate(("", "module.")):  # loaded from where it is, and converted
        broken = changed(original, tmp_path / f"broken{number}", lambda tensors: with_value(tensors, name, np.nan))
        folder = changed(broken, tmp_path / str(number), lambda w, front=wrapper: renamed(w, lambda n: front + n))
        with pytest.raises(ValueError, match=r"1 values that are NaN or infinite in .*layers\.0\..*up_proj\.weight"):
            embedded(folder, cells)


@pytest.fixture
def original(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the model in the original's layout."""
    from tahoex1_hf.original.restore import restore_original_folder

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    restore_original_folder(whole, tmp_path / "original")
    (tmp_path / "original" / "best-model.pt").unlink()
    return tmp_path / "original"


# What is refused --------------------------------------------------------------------------------------

WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda w: without(w, LAYER), r"lacks 1 of the \d+ tensors .*layers\.0\.self"),
    "renamed": (
        lambda w: renamed(w, lambda n: n + "_x" if n == LAYER else n),
        r"layers\.0\.self_attn\.q_proj\.weight; it has .*q_proj\.weight_x, perhaps the same under another name",
    ),
    "wrong shape": (lambda w: {**w, LAYER: w[LAYER][:-1]}, r"q_proj\.weight as \[31, 32\] instead of \[32, 32\]"),
    "NaN": (
        lambda w: with_value(w, LAYER, float("nan")),
        r"1 values that are NaN or infinite in layers\.0\.self_attn",
    ),
    "infinite": (lambda w: with_value(w, LAYER, float("-inf")), r"NaN or infinite in layers\.0\.self_attn\.q_proj"),
    "infinite in bfloat16": (
        lambda w: {n: t.bfloat16() for n, t in with_value(w, LAYER, float("inf")).items()},
        r"NaN or infinite in layers\.0\.self_attn\.q_proj",
    ),
    "overflow in float16": (
        lambda w: {n: t.half() for n, t in with_value(w, LAYER, 1e6).items()},
        r"NaN or infinite in layers\.0\.self_attn\.q_proj",
    ),
    "unknown prefix": (
        lambda w: renamed(w, lambda n: f"net.{n}"),
        r"lacks 44 of the 44 tensors .*begin with net\. They would be random",
    ),
    "adapter not merged": (
        lambda w: {
            **without(w, LAYER),
            LAYER.replace(".weight", ".base_layer.weight"): w[LAYER],
        },
        r"PEFT adapter that was not merged: save it after merge_and_unload",
    ),
    "one more layer": (
        lambda w: {**w, **{n.replace("layers.0", "layers.2"): t.clone() for n, t in w.items() if "layers.0" in n}},
        r"that the model of config\.json does not have, .*layers\.2\..*num_hidden_layers",
    ),
    "a tensor twice": (lambda w: {**w, f"module.{LAYER}": w[LAYER].clone()}, "two tensors for one place, tahoe"),
    "the decoders alone": (
        lambda w: {n: t for n, t in w.items() if not n.startswith("tahoe.")},
        "lacks 44 of the 44 tensors .*begin with cell_decoder, expression_decoder",
    ),
    "another model": (lambda w: {"bert.embeddings.weight": torch.ones(3, 3)}, "lacks 44 of the 44 .*begin with bert"),
}

WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 90}, r"gene_encoder\.embedding\.weight as .* instead of \[90, 32\]: config\.json"),
    "width": ({"hidden_size": 64}, r"instead of \[64.*different checkpoints"),
    "fewer layers": ({"num_hidden_layers": 1}, r"holds \d+ tensors that the model of config\.json does not have"),
    "more layers": ({"num_hidden_layers": 3}, r"lacks \d+ of the \d+ tensors that TahoeX1Model needs, layers\.2\."),
    "feed-forward": ({"use_glu": True}, r"lacks 4 of the .*gate_proj"),
    "drugs": ({"num_drugs": 4, "drug_token_id": 2, "drug_fingerprint_size": 8}, "lacks .*drug_encoder"),
    "norm": ({"norm_position": "post"}, r"does not have, tahoe\.norm\.bias"),
}


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


WRONG_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "LFS pointer": (lambda f: (f / "model.safetensors").write_text(LFS), r"model\.safetensors is a Git LFS pointer"),
    "LFS vocabulary": (lambda f: (f / "vocab.json").write_text(LFS), r"vocab\.json is a Git LFS pointer"),
    "LFS configuration": (lambda f: (f / "config.json").write_text(LFS), r"config\.json is a Git LFS pointer"),
    "LFS tokenizer": (
        lambda f: (f / "tokenizer_config.json").write_text(LFS),
        r"tokenizer_config\.json is a Git LFS pointer",
    ),
    "truncated": (lambda f: cut(f / "model.safetensors", 60_000), r"is truncated, 60,000 bytes of \d\d\d,\d\d\d"),
    "truncated header": (lambda f: cut(f / "model.safetensors", 500), "is truncated or damaged"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty"),
    "zeros": (lambda f: (f / "model.safetensors").write_bytes(bytes(9999)), "begins with zeros"),
    "too long": (lambda f: (f / "model.safetensors").open("ab").write(b"xy"), "has 2 bytes more than its header says"),
    "web page": (
        lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html><html>429 Too Many Requests</html>"),
        "is a web page",
    ),
    "text": (lambda f: (f / "model.safetensors").write_text("Entry not found" * 9), "truncated or damaged, or not a"),
    "a pickle's content": (
        lambda f: torch.save(read(f / "model.safetensors"), f / "model.safetensors"),
        r"is a file of torch\.save \(a pickle\), not safetensors",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no weights: neither model\.safetensors nor"),
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), r"has no vocab\.json"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"neither config\.json nor model_config\.yml"),
}


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


def as_pickle(folder: Path, content: Any) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))


WRONG_SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (without_shard, r"lacks model-00002-of-00003\.safetensors, 1 of the 3 files"),
    "index names a file elsewhere": (
        lambda f: change_index(f, lambda places: dict.fromkeys(places, "../other.safetensors")),
        "files outside its folder",
    ),
    "index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index\.json is damaged, or not the index of weights",
    ),
    "index that is a pointer": (
        lambda f: (f / "model.safetensors.index.json").write_text(LFS),
        r"index\.json is a Git LFS pointer",
    ),
    "pointer": (lambda f: (f / "model-00003-of-00003.safetensors").write_text(LFS), "00003.safetensors is a Git LFS"),
    "truncated": (lambda f: cut(f / "model-00001-of-00003.safetensors", 9000), "00001.*is truncated, 9,000 bytes of"),
    "index names a shard less": (
        lambda f: change_index(f, lambda places: {n: p for n, p in places.items() if "00002" not in p}),
        r"\(2 files of weights\) lacks \d+ of the \d+ tensors",
    ),
    "of another checkpoint": (
        lambda f: save({"tahoe.norm.weight": torch.ones(32)}, f / "model-00001-of-00003.safetensors"),
        r"00001-of-00003\.safetensors and .*both hold tahoe\.norm\.weight: they are of different checkpoints",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors(
    change: Callable[[Tensors], Any], message: str, whole: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    folder = changed(whole, tmp_path / "model", change)
    with pytest.raises(ValueError, match=message) as error:
        embedded(folder, cells)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_a_configuration_of_another_checkpoint(
    settings: dict[str, Any], message: str, whole: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        embedded(configured(whole, tmp_path / "model", **settings), cells)


@pytest.mark.parametrize(("damage", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_files_that_are_not_what_they_are_called(
    damage: Callable[[Path], Any], message: str, whole: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        embedded(tmp_path / "model", cells)


@pytest.mark.parametrize(("damage", "message"), WRONG_SHARDS.values(), ids=WRONG_SHARDS)
def test_wrong_shards(
    damage: Callable[[Path], Any], message: str, whole: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    folder = sharded(whole, tmp_path / "model")
    np.testing.assert_array_equal(embedded(folder, cells), embedded(whole, cells))
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        embedded(folder, cells)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda w: {"state_dict": w}, r"pytorch_model\.bin lacks 44 of the 44 .*begin with state_dict"),
        (lambda w: {**w, "harm": Harmful()}, r"holds more than tensors; nothing of it was run"),
        (lambda w: without(w, LAYER), r"pytorch_model\.bin lacks 1 of the 44 tensors"),
    ],
    ids=["nested", "harmful", "missing"],
)
def test_wrong_pickles(
    content: Callable[[Tensors], Any], message: str, whole: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "model")
    tensors = read(tmp_path / "model" / "model.safetensors")
    as_pickle(tmp_path / "model", content(tensors))
    with pytest.raises(ValueError, match=message):
        embedded(tmp_path / "model", cells)


def test_what_embedding_does_not_need_may_be_wrong(whole: Path, cells: anndata.AnnData, tmp_path: Path) -> None:
    name = "expression_decoder.output.weight"
    for number, change in enumerate([lambda w: without(w, name), lambda w: with_value(w, name, float("nan"))]):
        folder = changed(whole, tmp_path / str(number), change)
        np.testing.assert_array_equal(embedded(folder, cells), embedded(whole, cells))
        options: dict[str, Any] = {"genes": GENES[:1], "null_genes": 0, "progress": False}
        perturb_genes(cells, folder, **options)
        with pytest.raises(ValueError, match=r"expression_decoder\.output\.weight"):
            perturb_genes(cells, folder, expression=True, **options)
    folder = changed(whole, tmp_path / "no cell decoder", lambda w: without(w, "cell_decoder.cell_proj.weight"))
    perturb_genes(cells, folder, expression=True, **options)


def test_the_command_ends_with_the_sentence(whole: Path, cells: anndata.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    folder = changed(whole, tmp_path / "model", WRONG_TENSORS["missing"][0])
    for words in (["embed"], ["perturb", "--genes", GENES[0]]):
        output = tmp_path / ("out.npy" if words == ["embed"] else "out.csv")
        run = CliRunner().invoke(
            app, [words[0], str(tmp_path / "cells.h5ad"), str(output), "--model", str(folder), *words[1:]]
        )
        assert run.exit_code == 1
        assert "lacks 1 of the 44 tensors" in run.output
        assert not output.exists()


def test_from_pretrained_stays_as_in_transformers(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "model", WRONG_TENSORS["missing"][0])
    _, report = TahoeX1Model.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {LAYER.removeprefix("tahoe.")}
    head = TahoeX1ForSequenceClassification.from_pretrained(whole, num_labels=3)
    assert head.classifier.weight.shape == (3, 32)


def test_half_a_fused_matrix(original: Path, whole: Path, cells: anndata.AnnData, tmp_path: Path) -> None:
    """Weights may have the original's names beside our configuration, and are put together then."""
    shutil.copytree(whole, tmp_path / "mixed")
    tensors = read(original / "model.safetensors")
    save(tensors, tmp_path / "mixed" / "model.safetensors")
    np.testing.assert_array_equal(embedded(tmp_path / "mixed", cells), embedded(whole, cells))
    name = "model.transformer_encoder.layers.0.self_attn.Wqkv.weight"
    save({**tensors, name: tensors[name][:-7]}, tmp_path / "mixed" / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds parts of .*layers\.0\.self_attn\.\w_proj\.weight.* do not make up"):
        embedded(tmp_path / "mixed", cells)


def test_weights_of_one_byte() -> None:
    """The tensors that a quantised weight consists of are looked at, and those of whole numbers are let be."""
    torchao = pytest.importorskip("torchao.quantization")
    from tahoex1_hf.common.finite_tensors import check_finite, named_tensors

    layer = torch.nn.Linear(32, 32)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    names = {name: tensor.dtype for name, tensor in named_tensors(layer)}
    assert torch.int8 in names.values()
    check_finite(named_tensors(layer), "a layer")
    scale = next(
        tensor for name, tensor in named_tensors(layer) if name.startswith("weight") and tensor.is_floating_point()
    )
    scale.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"a layer holds 1 values that are NaN or infinite in weight\.\w+"):
        check_finite(named_tensors(layer), "a layer")


# Results that are not finite --------------------------------------------------------------------------


def test_embeddings_that_are_not_finite_name_the_cell(whole: Path, cells: anndata.AnnData, tmp_path: Path) -> None:
    """Weights may be finite, and too large for what is computed with them."""

    def huge(tensors: Tensors) -> None:
        tensors["tahoe.norm.weight"].fill_(3e38)
        tensors["tahoe.norm.bias"].fill_(3e38)

    folder = changed(whole, tmp_path / "model", huge)
    for run in (
        lambda: embedded(folder, cells),
        lambda: embedded(folder, cells, draws=2, max_length=4),
        lambda: perturb_genes(cells, folder, genes=GENES[:1], null_genes=0, progress=False),
    ):
        with pytest.raises(
            ValueError, match=r"NaN or infinite values for cell 'cell0-0' \(number 0, from 0\).*float32"
        ):
            run()


# Heads -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model that was fine-tuned as a whole."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    config = tiny_config(vocab_size=len(TahoeX1Tokenizer.from_pretrained(whole)), num_labels=3)
    tiny_model(config, TahoeX1ForSequenceClassification).save_pretrained(folder)
    TahoeX1Tokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if not n.startswith("classifier.")}, "has no head to predict with"),
        (lambda w: without(w, "classifier.bias"), r"lacks 1 of the 46 .*, classifier\.bias"),
        (lambda w: {**w, "classifier.weight": w["classifier.weight"][:2]}, r"classifier\.weight as \[2, 32\] instead"),
        (lambda w: with_value(w, "classifier.weight", float("nan")), r"infinite in classifier\.weight"),
        (lambda w: without(w, LAYER), r"lacks 1 of the 46 tensors .*q_proj"),
    ],
    ids=["no head", "half a head", "head of other classes", "NaN", "layer"],
)
def test_predicting_with_a_wrong_head(
    change: Callable[[Tensors], Any], message: str, classifier: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    predict_anndata(cells.copy(), classifier, progress=False, dtype="float32")
    with pytest.raises(ValueError, match=message):
        predict_anndata(cells.copy(), changed(classifier, tmp_path / "model", change), progress=False)


def test_what_is_not_read_is_told(whole: Path, cells: anndata.AnnData, tmp_path: Path, caplog: Any) -> None:
    folder = changed(
        whole, tmp_path / "model", lambda w: {**w, "ema.decay": torch.ones(1), "classifier.x": torch.ones(1)}
    )
    embedded(folder, cells)
    assert [r.levelname for r in caplog.records if "that are not read, ema.decay." in r.message] == ["WARNING"]


def test_a_new_head_is_told(whole: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="tahoex1_hf"):
        load_folder(whole, TahoeX1ForSequenceClassification, ["classifier."])
    assert any("lacks classifier, which begins with random weights" in record.message for record in caplog.records)
    with pytest.raises(ValueError, match=r"lacks 2 of the 46 tensors that TahoeX1ForSequenceClassification needs"):
        load_folder(whole, TahoeX1ForSequenceClassification)
    assert isinstance(load_folder(whole, TahoeX1ForPreTraining), TahoeX1ForPreTraining)
