"""Conversions that are cut short, damaged, malicious, or undone: nothing half done, nothing run, nothing lost."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from composer import as_composer_file, as_sharded, composer_state, copy_settings
from helpers import GOLDEN, GOLDEN_VARIANTS, Variant, tiny_config
from mapped import names_in_memory
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.original import convert as original_checkpoints
from tahoex1_hf.original.config import translate_collator_config, translate_model_config
from tahoex1_hf.original.convert import OriginalCheckpoint, convert_original_folder, open_original
from tahoex1_hf.original.restore import restore_original_folder, restore_settings
from tahoex1_hf.original.tensor_names import our_shapes
from tahoex1_hf.original.verify import count_parameters, verify_conversion
from tahoex1_hf.original.weights import open_weights
from tahoex1_hf.original.writing import workspace

PLAIN, WITH_DRUGS = GOLDEN / "a_70m_like" / "model", GOLDEN / "b_3b_like_chem" / "model"
every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PLAIN, tmp_path / "source"))


# Streaming and shards ------------------------------------------------------------------------------


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
    """A conversion holds no weights in memory but the matrix that is transposed."""
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


# The manifest and the verification --------------------------------------------------------------------


def test_manifest(tmp_path: Path) -> None:
    convert_original_folder(WITH_DRUGS, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["source"] == str(WITH_DRUGS)
    assert set(manifest["files_read"]) == {path.name for path in WITH_DRUGS.iterdir()}
    assert set(manifest["files_written"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"conversion.json"}
    for folder, part in ((WITH_DRUGS, "files_read"), (tmp_path / "out", "files_written")):
        for name, entry in manifest[part].items():
            content = (folder / name).read_bytes()
            assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["versions"]["torch"] == str(torch.__version__)
    assert manifest["dtype"] == "float32"
    assert manifest["verification"]["num_tensors"] == 62


SPOIL: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "one bit": ("tahoe.layers.1.mlp.up_proj.weight", lambda t: t.view(torch.int32).bitwise_xor(1).view(torch.float32)),
    "transposed": ("tahoe.layers.0.self_attn.q_proj.weight", lambda t: t.T),
    "zeroed": ("cell_decoder.cell_proj.weight", lambda t: t * 0),
}


@pytest.mark.parametrize("kind", SPOIL)
def test_a_wrong_tensor_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, spoil = SPOIL[kind]
    real = OriginalCheckpoint.load_model

    def load_spoilt(self: OriginalCheckpoint, dtype: torch.dtype | None = None) -> TahoeX1ForPreTraining:
        model = real(self, dtype)
        parameter = model.get_parameter(name)
        parameter.data = spoil(parameter.data).contiguous()
        return model

    monkeypatch.setattr(OriginalCheckpoint, "load_model", load_spoilt)
    with pytest.raises(ValueError, match="was not written as it was read"):
        convert_original_folder(PLAIN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("a_70m_like", {"hidden_act": "gelu"}),
        ("a_70m_like", {"cell_decoder_scaled": False}),
        ("a_70m_like", {"layer_norm_eps": 1e-3}),
        ("b_3b_like_chem", {"drug_encoder_act": "relu"}),
        ("c_glu_post_gqa_avgpool", {"cell_pooling": "cls"}),
        ("c_glu_post_gqa_avgpool", {"expression_max_value": 10}),
        ("d_attn_mask", {"attention_mask_style": "full"}),
    ],
    ids=str,
)
def test_a_wrongly_translated_setting_is_found(variant: str, change: dict[str, Any], tmp_path: Path) -> None:
    """The reference reads the original's own settings, so that it notices what the translation got wrong."""
    checkpoint = GOLDEN / variant / "model"
    convert_original_folder(checkpoint, tmp_path / "out")
    opened = open_original(checkpoint)
    config = TahoeX1Config(**{**opened.config.to_diff_dict(), **change})
    with pytest.raises(ValueError, match="does not compute what the original does"):
        verify_conversion(opened.model_settings, opened.collator_settings, opened.weights, config, tmp_path / "out")


class Shapes:
    """Weights of a released size without their numbers."""

    def __init__(self, config: TahoeX1Config) -> None:
        self.shapes = our_shapes(config)


def test_parameter_count_of_released_sizes() -> None:
    config = TahoeX1Config()
    weights: Any = Shapes(config)
    assert count_parameters(weights, config) == (70_996_993, "70M")
    weights.shapes.popitem()
    with pytest.raises(ValueError, match="the released 70M has 70,996,993"):
        count_parameters(weights, config)
    drugs = {"num_drugs": 379, "drug_token_id": 3}
    for shape, expected in (
        ({"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}, (1_353_854_977, "1.3B")),
        ({"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 20, **drugs}, (2_717_043_713, "3B")),
    ):
        config = TahoeX1Config(**shape)
        assert count_parameters(Shapes(config), config) == expected  # type: ignore[arg-type]


# Killed half way ---------------------------------------------------------------------------------


def _killed_while_writing(destination: Path) -> None:
    from transformers import modeling_utils

    real, written = modeling_utils.safe_save_file, []

    def save(tensors: dict[str, torch.Tensor], path: str, **options: Any) -> None:
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        real(tensors, path, **options)

    modeling_utils.safe_save_file = save
    convert_original_folder(PLAIN, destination, max_shard_size=200_000)


def _killed_before_the_end(destination: Path) -> None:
    def verify(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    original_checkpoints.verify_conversion = verify  # type: ignore[assignment]
    convert_original_folder(PLAIN, destination)


@pytest.mark.parametrize("kill", [_killed_while_writing, _killed_before_the_end])
def test_killed_half_way(kill: Callable[[Path], None], tmp_path: Path) -> None:
    destination = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=kill, args=(destination,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not destination.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out-")
    assert any(path.stat().st_size for path in left.glob("result/model*.safetensors"))
    convert_original_folder(PLAIN, destination)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert AutoModel.from_pretrained(destination).config.num_hidden_layers == 3


def _overtaken(destination: Path, first: Path) -> None:
    with workspace(destination) as second:
        assert first.exists()
        assert second != first
        destination.mkdir()
        (destination / "came first").touch()


def test_a_living_conversion_is_left_alone(tmp_path: Path) -> None:
    with workspace(tmp_path / "out") as first:
        (first / "result" / "x").touch()
        with pytest.raises(FileExistsError, match="exists already"):
            _overtaken(tmp_path / "out", first)
        assert first.exists()
        shutil.rmtree(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "x"]


# Damaged or malicious files -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 1000, 500_000])
def test_truncated_safetensors(keep: int, source: Path) -> None:
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(keep)
    with pytest.raises(ValueError, match="is truncated, or not a safetensors file"):
        convert_original_folder(source, source.parent / "out")


@pytest.mark.parametrize("keep", [0, 1000, 500_000])
def test_truncated_pickle(keep: int, tmp_path: Path) -> None:
    path = Path(as_composer_file(PLAIN, tmp_path))
    with path.open("r+b") as file:
        file.truncate(keep)
    with pytest.raises(ValueError, match="as a checkpoint of tensors alone"):
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
    np.load(with_fingerprints / "drug_fps_pad.npy", allow_pickle=True)  # it would have run
    assert marker.exists()


def test_weights_that_are_ambiguous(tmp_path: Path) -> None:
    path = Path(as_composer_file(PLAIN, tmp_path))
    convert_original_folder(path.parent, tmp_path / "the only one")
    shutil.copy(path, path.parent / "ep5.pt")
    with pytest.raises(FileNotFoundError, match=r"several checkpoints.*ep4-ba104156-rank0\.pt, ep5\.pt"):
        convert_original_folder(path.parent, tmp_path / "out")


# Drugs -------------------------------------------------------------------------------------------


def test_fingerprints_of_another_shape(tmp_path: Path) -> None:
    source = Path(shutil.copytree(WITH_DRUGS, tmp_path / "source"))
    np.save(source / "drug_fps_pad.npy", np.zeros((19, 128)))
    with pytest.raises(ValueError, match=r"has shape \[19, 128\]; the drug table of the weights has \[20, 128\]"):
        convert_original_folder(source, tmp_path / "out")


def test_3b_without_drugs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights without drug encoder, as the original loads them with use_chem_inf off."""
    source = Path(shutil.copytree(WITH_DRUGS, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "chem_encoder" not in k}, source / "model.safetensors")
    config = convert_original_folder(source, tmp_path / "out")
    assert config.num_drugs == 0
    assert "converted without drugs" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "out").drug_to_id is None


# Back to the original -------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("max_shard_size", [100_000, 10**9])
def test_there_and_back(variant: Variant, max_shard_size: int, tmp_path: Path) -> None:
    convert_original_folder(variant.checkpoint, tmp_path / "ours", max_shard_size=max_shard_size)
    restore_original_folder(tmp_path / "ours", tmp_path / "back")
    theirs = load_file(variant.checkpoint / "model.safetensors")
    pickled = torch.load(tmp_path / "back" / "best-model.pt", weights_only=True)["state"]["model"]
    for restored in (load_file(tmp_path / "back" / "model.safetensors"), pickled):
        assert restored.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert restored[name].dtype == tensor.dtype
            assert torch.equal(restored[name], tensor), name
    assert json.loads((tmp_path / "back" / "vocab.json").read_text()) == json.loads(
        (variant.checkpoint / "vocab.json").read_text()
    )
    again, before = open_original(tmp_path / "back"), open_original(variant.checkpoint)
    assert again.config.to_dict() == before.config.to_dict()
    assert again.tokenizer_arguments == before.tokenizer_arguments
    # What the original's code reads without a default.
    model = yaml.safe_load((tmp_path / "back" / "model_config.yml").read_text())
    assert {"attn_impl", "attn_type"} <= set(model["attn_config"])
    assert {"vocab_size", "n_layers", "n_heads", "d_model", "expansion_ratio", "mvc"} <= set(model)
    assert "norm_type" in model["norm_config"]
    collator = yaml.safe_load((tmp_path / "back" / "collator_config.yml").read_text())
    assert {"pad_token_id", "pad_value", "num_bins", "mlm_probability", "mask_value", "sampling"} <= set(collator)
    has_drugs = before.config.num_drugs > 0
    assert ("chemical_encoder" in model) == has_drugs == collator["use_chem_token"] == ("drug_to_id_path" in collator)
    convert_original_folder(tmp_path / "back", tmp_path / "ours again")  # and it verifies


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[..., TahoeX1Tokenizer]:
    def make(**options: Any) -> TahoeX1Tokenizer:
        vocab = {"<pad>": 0, "<cls>": 1, "<drug>": 2} | {f"ENSG{i:011d}": i for i in range(3, 80)}
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        return TahoeX1Tokenizer(str(tmp_path / "vocab.json"), **options)

    return make


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"intermediate_size": 100, "hidden_size": 36}, {"value_encoding": "log1p", "target_sum": 5000.0}),
        ({"use_glu": True, "norm_position": "post", "cell_pooling": "mean_with_padding"}, {"overflow": "first"}),
        ({"attention_mask_style": "observed_or_self", "num_bins": 31}, {"num_bins": 31, "right_binning": True}),
        ({"expression_decoder_layers": 0, "gene_encoder_norm": False}, {"value_encoding": "raw", "pad_value": -3.0}),
        ({"num_drugs": 5, "drug_token_id": 2}, {"drug_to_id": {"<pad>": 0, "x": 4}, "context_length": 7}),
    ],
)
def test_settings_back_and_forth(
    shape: dict[str, Any], options: dict[str, Any], tokenizer: Callable[..., TahoeX1Tokenizer]
) -> None:
    config, ours = tiny_config(**shape), tokenizer(**options)
    model, collator = yaml.safe_load(yaml.safe_dump(list(restore_settings(config, ours))))
    table = (config.num_drugs, config.drug_fingerprint_size) if config.num_drugs else None
    again = translate_model_config(model, collator, ours.get_vocab(), table)
    meaningless = set() if config.num_drugs else {"drug_encoder_act", "drug_fingerprint_size"}
    translated = again.to_dict()
    assert {k for k, v in config.to_dict().items() if translated[k] != v} <= meaningless
    for name, value in translate_collator_config(collator, ours.get_vocab(), ours.drug_to_id).items():
        assert getattr(ours, name) == value, name


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ({"cell_pooling": "mean"}, {}, 'no cell_pooling="mean"'),
        ({}, {"overflow": "top"}, 'no overflow="top"'),
        ({}, {"num_bins": 31}, "one setting for both"),
    ],
)
def test_what_the_original_lacks(
    shape: dict[str, Any], options: dict[str, Any], match: str, tokenizer: Callable[..., TahoeX1Tokenizer]
) -> None:
    with pytest.raises(ValueError, match=match):
        restore_settings(tiny_config(**shape), tokenizer(**options))


def test_only_a_pretraining_checkpoint_goes_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        restore_original_folder(PLAIN, tmp_path / "back")
    convert_original_folder(PLAIN, tmp_path / "ours")
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="missing: cell_decoder"):
        restore_original_folder(tmp_path / "base", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_script_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    import typer
    from helpers import REPO_ROOT

    main = runpy.run_path(str(REPO_ROOT / "conversion" / "convert_checkpoint.py"))["main"]
    main(str(PLAIN), tmp_path / "ours")
    main(str(tmp_path / "ours"), tmp_path / "back", to_original=True)
    assert capsys.readouterr().out.count("all 55 tensors equal bit for bit") == 2
    with pytest.raises(typer.Exit):
        main(str(tmp_path / "ours"), tmp_path / "x", to_original=True, size="3b")
    assert "do not go with --to-original" in capsys.readouterr().err


def test_reader_of_converted_shards(tmp_path: Path) -> None:
    convert_original_folder(PLAIN, tmp_path / "many", max_shard_size=200_000)
    reader = open_weights(tmp_path / "many" / "model.safetensors.index.json")
    assert reader.shapes == our_shapes(open_original(PLAIN).config)
