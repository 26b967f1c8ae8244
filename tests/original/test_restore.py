"""Restoring the original's format gives the same tensors, and settings with the same meaning."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import GOLDEN, GOLDEN_VARIANTS, Variant, tiny_config
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cli.app import app
from tahoex1_hf.original.config import translate_collator_config, translate_model_config
from tahoex1_hf.original.convert import convert_original_folder, open_original
from tahoex1_hf.original.restore import restore_original_folder, restore_settings

PLAIN, WITH_DRUGS = GOLDEN / "a_70m_like" / "model", GOLDEN / "b_3b_like_chem" / "model"
every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PLAIN, tmp_path / "source"))


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
    # The original's code reads these keys without a default.
    model = yaml.safe_load((tmp_path / "back" / "model_config.yml").read_text())
    assert {"attn_impl", "attn_type"} <= set(model["attn_config"])
    assert {"vocab_size", "n_layers", "n_heads", "d_model", "expansion_ratio", "mvc"} <= set(model)
    assert "norm_type" in model["norm_config"]
    collator = yaml.safe_load((tmp_path / "back" / "collator_config.yml").read_text())
    assert {"pad_token_id", "pad_value", "num_bins", "mlm_probability", "mask_value", "sampling"} <= set(collator)
    has_drugs = before.config.num_drugs > 0
    assert ("chemical_encoder" in model) == has_drugs == collator["use_chem_token"] == ("drug_to_id_path" in collator)
    convert_original_folder(tmp_path / "back", tmp_path / "ours again")  # this verifies it, too


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
        ({}, {"overflow": "highest"}, 'no overflow="highest"'),
        ({}, {"num_bins": 31}, "one setting for both"),
    ],
)
def test_settings_that_the_original_lacks_are_refused(
    shape: dict[str, Any], options: dict[str, Any], match: str, tokenizer: Callable[..., TahoeX1Tokenizer]
) -> None:
    with pytest.raises(ValueError, match=match):
        restore_settings(tiny_config(**shape), tokenizer(**options))


def test_only_a_pretraining_checkpoint_can_be_restored(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        restore_original_folder(PLAIN, tmp_path / "back")
    convert_original_folder(PLAIN, tmp_path / "ours")
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="missing: cell_decoder"):
        restore_original_folder(tmp_path / "base", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_command_both_ways(tmp_path: Path) -> None:
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    for arguments in ([str(PLAIN), ours], [ours, back, "--to-original"]):
        run = CliRunner().invoke(app, ["convert", *arguments])
        assert run.exit_code == 0, run.output
        assert "all 55 tensors equal bit for bit" in run.output
    refused = CliRunner().invoke(app, ["convert", ours, str(tmp_path / "x"), "--to-original", "--size", "3b"])
    assert refused.exit_code == 1
    assert "do not go with --to-original" in refused.output
