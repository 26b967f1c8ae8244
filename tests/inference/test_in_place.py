"""Layers that compute in place give what the model's own give, with torch's attention and with a compiled one."""

import pytest
import torch
from encoder_parts import embedded, plain
from helpers import SHAPES, largest_difference, tiny_config, tiny_model
from torch import nn

from tahoex1_hf import TahoeX1Model
from tahoex1_hf.inference.in_place import InPlaceLayer, Room
from tahoex1_hf.inference.kept_layers import prepare_layers

LENGTHS = (14, 14, 9, 3)


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_layers_of_the_model(shape: str, compiled: bool, all_tokens: bool) -> None:
    model = tiny_model(tiny_config(**SHAPES[shape]), TahoeX1Model)
    attention = plain(torch.float32) if compiled else None
    layers = prepare_layers(model, torch.float32, attention)
    assert {type(layer) for layer in layers} == {InPlaceLayer}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mine, theirs in zip(
        embedded(model, LENGTHS, all_tokens, layers), embedded(model, LENGTHS, all_tokens, None), strict=True
    ):
        assert largest_difference(mine, theirs) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("without", ["all", "k_proj"])
def test_products_without_a_bias(without: str, compiled: bool) -> None:
    model = tiny_model(tiny_config(), TahoeX1Model)
    for name, linear in model.layers.named_modules():
        if type(linear) is nn.Linear and (without == "all" or name.endswith(without)):
            linear.bias = None
    layers = prepare_layers(model, torch.float32, plain(torch.float32) if compiled else None)
    for mine, theirs in zip(embedded(model, LENGTHS, True, layers), embedded(model, LENGTHS, True, None), strict=True):
        assert largest_difference(mine, theirs) < 1e-5


def test_changed_weights_are_seen() -> None:
    model = tiny_model(tiny_config(), TahoeX1Model)
    layers = prepare_layers(model, torch.float32)
    first = embedded(model, LENGTHS, False, layers)[0]
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(2)
    second = embedded(model, LENGTHS, False, layers)[0]
    assert not torch.equal(first, second)
    assert largest_difference(second, embedded(model, LENGTHS, False, None)[0]) < 1e-5


@pytest.mark.parametrize("change", ["adapter", "bfloat16"])
def test_other_products_are_left_to_the_model(change: str) -> None:
    class Adapted(nn.Linear):
        pass

    layer = tiny_model(tiny_config(), TahoeX1Model).layers[0]
    assert InPlaceLayer.make(layer) is not None
    if change == "adapter":
        layer.mlp.down_proj.__class__ = Adapted
    else:
        layer.self_attn.v_proj.bfloat16()
    assert InPlaceLayer.make(layer) is None


def test_memory_is_used_again_where_it_is_large_enough() -> None:
    room = Room()
    first = room.array("up", 10, 4)
    first.fill_(1)
    assert room.array("up", 5, 8).data_ptr() == first.data_ptr()
    assert room.array("up", 2, 3).shape == (2, 3)
    assert room.array("other", 10, 4).data_ptr() != first.data_ptr()
    assert room.array("up", 11, 4).shape == (11, 4)
    assert torch.equal(first, torch.ones(10, 4))
