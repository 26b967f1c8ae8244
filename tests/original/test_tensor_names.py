"""The rules between the original's names of the weights and ours keep every tensor, both ways, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN, GOLDEN_VARIANTS, Variant
from safetensors.torch import load_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import rename_source_key

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining
from tahoex1_hf.original.convert import open_original
from tahoex1_hf.original.tensor_names import conversion_rules, in_original_names, original_shapes, our_shapes

every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)


def equal_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32))
        for name in theirs
    )


@every_variant
def test_every_tensor_both_ways(variant: Variant) -> None:
    original = load_file(variant.checkpoint / "model.safetensors")
    checkpoint = open_original(variant.checkpoint)
    model = checkpoint.load_model()
    ours = model.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == our_shapes(checkpoint.config)
    assert {name: tensor.shape for name, tensor in original.items()} == original_shapes(checkpoint.config)
    restored = dict(in_original_names(checkpoint.config, ours.__getitem__))
    assert equal_bits(restored, original)
    assert equal_bits(load_by_rules(model.config, restored), ours)


def load_by_rules(config: TahoeX1Config, original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model, report = TahoeX1ForPreTraining.from_pretrained(
        None, config=config, state_dict=original, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.state_dict()


@every_variant
def test_transformers_itself_saves_back_in_the_original_names(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules are registered as transformers wants them; saving skips them only because our model says so."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    model = TahoeX1ForPreTraining.from_pretrained(variant.checkpoint)
    model.save_pretrained(tmp_path / "saved", save_original_format=True)
    original = load_file(variant.checkpoint / "model.safetensors")
    assert equal_bits(load_file(tmp_path / "saved" / "model.safetensors"), original)


@every_variant
def test_no_rule_touches_a_name_of_ours(variant: Variant) -> None:
    rules = conversion_rules()
    for name in our_shapes(open_original(variant.checkpoint).config):
        assert rename_source_key(name, rules[:-3], rules[-3:]) == (name, None)


def test_the_rules_are_registered() -> None:
    registered = get_checkpoint_conversion_mapping("tahoe_x1")
    assert [rule.source_patterns for rule in registered] == [rule.source_patterns for rule in conversion_rules()]


def test_fused_rows_are_query_key_value() -> None:
    ours = open_original(GOLDEN / "c_glu_post_gqa_avgpool" / "model").load_model().state_dict()
    fused = load_file(GOLDEN / "c_glu_post_gqa_avgpool" / "model" / "model.safetensors")[
        "model.transformer_encoder.layers.1.self_attn.Wqkv.weight"
    ]
    query, key, value = (ours[f"tahoe.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    assert (len(query), len(key), len(value)) == (64, 32, 32)  # two key-value heads of four
    assert torch.equal(fused[:64], query)
    assert torch.equal(fused[64:96], key)
    assert torch.equal(fused[96:], value)


PRE_NORM = {"hidden_act": "relu", "attention_mask_style": "observed_or_self"}
RELEASED: dict[str, dict[str, Any]] = {
    "70M": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, **PRE_NORM},
    "1.3B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, **PRE_NORM},
    "3B": {
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "num_drugs": 378,
        "drug_fingerprint_size": 2048,
        "drug_token_id": 2,
    },
}


def expected_parameters(config: TahoeX1Config) -> int:
    """Add up the parameters from the table of the architecture, not from our modules."""
    d, vocab, norm = config.hidden_size, config.vocab_size, 2 * config.hidden_size
    square = d * d + d
    encoders = vocab * d + norm + 2 * d + (2 * d + square + norm)
    if config.num_drugs:
        encoders += config.num_drugs * 2048 + (2048 * d + d) + square + norm
    layer = 3 * square + square + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * norm
    decoders = square + (d + 1) + square + d * d
    return encoders + config.num_hidden_layers * layer + norm + decoders


@pytest.mark.parametrize("size", RELEASED)
def test_released_shapes(size: str) -> None:
    config = TahoeX1Config(vocab_size=62720, **RELEASED[size])
    with torch.device("meta"):
        assert TahoeX1ForPreTraining(config).num_parameters() == expected_parameters(config)
    assert sum(shape.numel() for shape in our_shapes(config).values()) == expected_parameters(config)
    original = original_shapes(config)
    assert sum(shape.numel() for shape in original.values()) == expected_parameters(config)
    d, layers = config.hidden_size, config.num_hidden_layers
    fused = [shape for name, shape in original.items() if name.endswith("self_attn.Wqkv.weight")]
    assert fused == [(3 * d, d)] * layers
    if size == "70M":
        assert expected_parameters(config) == 70_996_993
        assert TahoeX1Config(attention_mask_style="observed_or_self").to_dict() == config.to_dict()
