"""An encoder's layers are made ready where that gains, and anew when a weight has changed."""

import numpy as np
import pytest
import torch
from encoder_parts import Tokens, dense, encoded
from helpers import SHAPES, tiny_config, tiny_model
from torch import nn

from tahoex1_hf import TahoeX1Model
from tahoex1_hf.inference import encoder
from tahoex1_hf.inference.in_place import InPlaceLayer
from tahoex1_hf.inference.kept_layers import KeptLayers, prepare_layers
from tahoex1_hf.inference.prepared_layers import PreparedLayer, packs_weights

LENGTHS = (14, 14, 9, 3)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "observed_or_self"])
def test_an_encoder_on_a_cpu_prepares_layers_in_float32_and_where_they_are_packed(shape: str) -> None:
    config = tiny_config(hidden_size=64, **SHAPES[shape])
    tokenizer, model = Tokens(config.vocab_size), tiny_model(config, TahoeX1Model)
    exact, ours = (
        encoder.CellEncoder(model, tokenizer, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert {type(layer) for layer in exact._prepared()} == {InPlaceLayer}
    assert exact.batch_tokens == 8192
    assert (ours._prepared() is not None) == packs_weights(torch.bfloat16)
    assert ours.batch_tokens == (4096 if packs_weights(torch.bfloat16) else 8192)
    assert (exact.embed(encoded(config, LENGTHS)) * ours.embed(encoded(config, LENGTHS))).sum(1).min() > 0.999


def scale_in_place(model: TahoeX1Model) -> None:
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.mul_(1.5)


def scale_a_bias(model: TahoeX1Model) -> None:
    with torch.inference_mode():
        model.layers[1].self_attn.q_proj.bias.add_(1)


def put_another_tensor(model: TahoeX1Model) -> None:
    projection = model.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.detach() * 2)


def set_data(model: TahoeX1Model) -> None:
    weight = model.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 2


def load_others(model: TahoeX1Model) -> None:
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


def put_another_layer(model: TahoeX1Model) -> None:
    first, second = model.layers
    model.layers = nn.ModuleList([second, first])


CHANGES = (scale_in_place, scale_a_bias, put_another_tensor, set_data, load_others, put_another_layer)


def test_prepared_layers_are_kept_until_a_weight_changes() -> None:
    model = tiny_model(tiny_config(), TahoeX1Model)
    kept = KeptLayers(model, torch.bfloat16)
    for change in CHANGES:
        before = kept.current()
        assert before is kept.current()
        change(model)
        after, expected = kept.current(), prepare_layers(model, torch.bfloat16)
        assert after is not before, change.__name__
        for ours, anew in zip(after, expected, strict=True):
            assert ours.layer is anew.layer
            for name in ("query_key_value", "output", "up", "down"):
                one, other = getattr(ours, name), getattr(anew, name)
                assert torch.equal(dense(one), dense(other)), change.__name__
                assert torch.equal(one.bias, other.bias), change.__name__


def test_layers_with_an_adapter_are_not_taken_for_kept_ones() -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny_model(tiny_config(), TahoeX1Model)
    kept = KeptLayers(model, torch.bfloat16)
    assert kept.current() is not None
    model.layers[0].mlp.up_proj.__class__ = Adapted
    assert kept.current() is None
    model.layers[0].mlp.up_proj.__class__ = nn.Linear
    assert kept.current() is not None


def test_weights_made_in_inference_mode_are_prepared_each_time() -> None:
    with torch.inference_mode():
        model = tiny_model(tiny_config(), TahoeX1Model)
    kept = KeptLayers(model, torch.bfloat16)
    before = kept.current()
    assert before is not None
    assert kept.current() is not before


@pytest.mark.parametrize("shape", list(SHAPES)[:2])
def test_an_encoder_gives_the_same_bits_with_kept_layers(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(hidden_size=64, **SHAPES[shape])
    model = tiny_model(config, TahoeX1Model)
    monkeypatch.setattr(encoder.CellEncoder, "_packs", True)
    ours = encoder.CellEncoder(model, Tokens(config.vocab_size), device="cpu", dtype="bfloat16")
    first, second = ours.embed(encoded(config, LENGTHS)), ours.embed(encoded(config, LENGTHS))
    assert np.array_equal(first, second)
    load_others(model)
    changed = ours.embed(encoded(config, LENGTHS))
    anew = encoder.CellEncoder(model, Tokens(config.vocab_size), device="cpu", dtype="bfloat16")
    assert np.array_equal(changed, anew.embed(encoded(config, LENGTHS)))
    assert not np.array_equal(changed, first)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "observed_or_self"])
def test_an_encoder_on_a_gpu_takes_them(shape: str) -> None:
    config = tiny_config(hidden_size=64, **SHAPES[shape])
    cells = encoded(config, LENGTHS)
    tokenizer = Tokens(config.vocab_size)
    found = {}
    for name, device, dtype in (("exact", "cpu", "float32"), ("gpu", "cuda", "bfloat16")):
        made = encoder.CellEncoder(
            tiny_model(config, TahoeX1Model), tokenizer, batch_tokens=25, device=device, dtype=dtype
        )
        kind = InPlaceLayer if device == "cpu" else PreparedLayer
        assert {type(layer) for layer in made._prepared()} == {kind}
        found[name] = made.embed(cells)
    assert (found["exact"] * found["gpu"]).sum(1).min() > 0.999
