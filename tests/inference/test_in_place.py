"""Layers that compute in place give what the model's own give, with torch's attention and with a compiled one."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHAPES, largest_difference, make_batch, tiny_config, tiny_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tahoex1_hf import TahoeX1Model
from tahoex1_hf.inference.compiled_attention import CompiledAttention
from tahoex1_hf.inference.in_place import InPlaceLayer, Room
from tahoex1_hf.inference.kept_layers import prepare_layers
from tahoex1_hf.inference.ragged import ragged_forward

LENGTHS = (14, 14, 9, 3)


class Plain(CompiledAttention):
    """Stands for the compiled program on any CPU, and any width."""

    def __call__(
        self,
        states: torch.Tensor,
        boundaries: torch.Tensor,
        heads: int,
        key_heads: int,
        scaling: float,
        out: Any = None,
        bias: Any = None,
    ) -> Any:
        states = states if bias is None else states + bias
        width = states.shape[1] // (heads + 2 * key_heads)
        for cell, place in zip(states.split(LENGTHS), out.split(LENGTHS), strict=True):
            parts = cell.unflatten(1, (-1, width)).transpose(0, 1).split([heads, key_heads, key_heads])
            query, key, value = (part.unsqueeze(0) for part in parts)
            attended = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=heads != key_heads)
            place.copy_(attended[0].transpose(0, 1).flatten(1))
        return out


def embedded(model: TahoeX1Model, all_tokens: bool, layers: Any) -> list[torch.Tensor]:
    batch = make_batch(model.config, LENGTHS, targets=False)
    valid = batch["attention_mask"].bool()
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    outputs = ragged_forward(
        model, batch["input_ids"][valid], batch["expression_values"][valid], offsets, batch.get("drug_ids"),
        all_tokens, layers,
    )  # fmt: skip
    return [output for output in outputs if output is not None]


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_layers_of_the_model(shape: str, compiled: bool, all_tokens: bool) -> None:
    model = tiny_model(tiny_config(**SHAPES[shape]), TahoeX1Model)
    attention = Plain(ctypes.CDLL(None), torch.float32) if compiled else None
    layers = prepare_layers(model, torch.float32, attention)
    assert {type(layer) for layer in layers} == {InPlaceLayer}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mine, theirs in zip(embedded(model, all_tokens, layers), embedded(model, all_tokens, None), strict=True):
        assert largest_difference(mine, theirs) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("without", ["all", "k_proj"])
def test_products_without_a_bias(without: str, compiled: bool) -> None:
    model = tiny_model(tiny_config(), TahoeX1Model)
    for name, linear in model.layers.named_modules():
        if type(linear) is nn.Linear and (without == "all" or name.endswith(without)):
            linear.bias = None
    layers = prepare_layers(model, torch.float32, Plain(ctypes.CDLL(None), torch.float32) if compiled else None)
    for mine, theirs in zip(embedded(model, True, layers), embedded(model, True, None), strict=True):
        assert largest_difference(mine, theirs) < 1e-5


def test_changed_weights_are_seen() -> None:
    model = tiny_model(tiny_config(), TahoeX1Model)
    layers = prepare_layers(model, torch.float32)
    first = embedded(model, False, layers)[0]
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(2)
    second = embedded(model, False, layers)[0]
    assert not torch.equal(first, second)
    assert largest_difference(second, embedded(model, False, None)[0]) < 1e-5


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
