# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The model's layers made ready for many batches in half precision: weights cast once, and fewer passes over memory.

Results are those of autocast: the residual stream and its norms stay in float32, and each product reads and returns
half precision. But the inputs of a layer's products are cast once instead of once per product, queries, keys and
values come from one product, the activation is part of the product before it where torch has such a product, and sums
are made in place. On CPUs the weights are in oneDNN's own layout.
"""

import platform
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear

from tahoex1_hf.inference.compiled_attention import CompiledAttention
from tahoex1_hf.inference.fused_norm import add_and_norm
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Layer, TahoeX1Model

# Numbers of a feed-forward block's inner layer that are in memory at once, on CPUs: 16 MB in float32. Larger arrays
# leave the cache, and the allocator gives them back to the system each time, which takes longer than the activation.
_BLOCK_NUMBERS = 2**22
# Number of rows for which oneDNN chooses the layout of weights; products with other numbers of rows work, too.
_USUAL_ROWS = 2048


@dataclass(frozen=True, eq=False)
class Product:
    """A product with a weight `(out, in)` and a bias `(out,)`, which takes and gives the weight's type.

    Attributes:
        packed: Whether the weight is laid out for oneDNN.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed: bool = False

    @classmethod
    def make(cls, modules: list[nn.Linear], dtype: torch.dtype) -> "Product":
        """Cast the weights of linear layers with the same input, one below the other."""
        weight = _together([module.weight.detach().to(dtype) for module in modules])
        biases = [module.bias.detach().to(dtype) for module in modules if module.bias is not None]
        bias = _together(biases) if biases else None
        if weight.device.type != "cpu" or not packs_weights(dtype):
            return cls(weight, bias)
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS), bias, packed=True)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply `(tokens, in)` to `(tokens, out)`."""
        return self._packed(inputs, "none") if self.packed else linear(inputs, self.weight, self.bias)

    def relu(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply, and replace negative numbers by 0; oneDNN and CUDA do so within the product."""
        if self.packed:
            return self._packed(inputs, "relu")
        if self.bias is None:
            return self(inputs).relu_()
        return torch._addmm_activation(self.bias, inputs, self.weight.t())

    def part(self, start: int, stop: int | None) -> "Product":
        """Return the product with some of the outputs alone. The weight must not be packed."""
        return Product(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def _packed(self, inputs: torch.Tensor, then: str) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, then, [], "")


def _together(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return tensors one below the other; one alone as it is, which `torch.cat` would copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def packs_weights(dtype: torch.dtype) -> bool:
    """Return whether products on this CPU are faster with weights in oneDNN's own layout.

    They are in bfloat16 on x86 processors with instructions for it. The operations are those that `torch.compile`
    makes of linear layers in frozen models. Other types and processors were not tried.
    """
    operations = torch.ops.mkldnn
    return (
        dtype == torch.bfloat16
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(operations, "_linear_pointwise")
        and hasattr(operations, "_reorder_linear_weight")
        and bool(operations._is_mkldnn_bf16_supported())
    )


def blocks_on_cpu(states: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """Split tokens on a CPU into blocks of equal size, so that `width` numbers per token stay in its cache."""
    number = max(1, round(len(states) * width / _BLOCK_NUMBERS)) if states.device.type == "cpu" else 1
    return states.split(max(1, -(-len(states) // number)))


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """One transformer layer. Its norms and its activation are those of the model, its weights are copies.

    On an H100, the 70M model embedded 2,686 cells of 1,024 tokens a second with these, 2,348 with its own layers; and
    3,518 with `add_and_norm` and copies that the host does not wait for.
    """

    layer: TahoeX1Layer
    query_key_value: Product
    output: Product
    up: Product
    gate: Product | None
    down: Product
    attention: CompiledAttention | None = None

    @classmethod
    def make(
        cls, layer: TahoeX1Layer, dtype: torch.dtype, attention: CompiledAttention | None = None
    ) -> "PreparedLayer | None":
        """Cast the weights to `dtype`; return None if a part is not the model's own, such as an adapter."""
        if not _can_be_prepared(layer):
            return None
        linears = linears_of(layer)
        output, up, down, *gate = (Product.make([module], dtype) for module in linears[3:])
        joined = Product.make(linears[:3], dtype)
        return cls(layer, joined, output, up, gate[0] if gate else None, down, attention)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the products."""
        return self.down.weight.dtype

    @property
    def packed(self) -> bool:
        """Whether the weights are laid out for oneDNN."""
        return self.down.packed

    def all_tokens(self, states: torch.Tensor, cells: Any) -> torch.Tensor:
        """Run the layer on all tokens, `(tokens, hidden_size)` float32. `states` is overwritten.

        Args:
            states: The residual stream.
            cells: The cells of the batch, as `ragged_forward` knows them.
        """
        parts = blocks_on_cpu(states, self.query_key_value.weight.shape[0])
        projected = _together([self.query_key_value(self._into_attention(part)) for part in parts])
        attended = self._attended(projected, cells)
        parts = blocks_on_cpu(states, self.layer.mlp.up_proj.out_features)
        for part, seen in zip(parts, attended.split([len(part) for part in parts]), strict=True):
            part.copy_(self._after_attention(part, seen))
        return states

    def first_tokens(self, states: torch.Tensor, cells: Any) -> torch.Tensor:
        """Run the layer for each cell's first token alone: `(cells, hidden_size)`. Its weights must not be packed."""
        attention, first = self.layer.self_attn, cells.boundaries[:-1]
        inputs = self._into_attention(states)
        width = self._widths()[0]
        of_query, of_rest = self.query_key_value.part(0, width), self.query_key_value.part(width, None)
        key, value = of_rest(inputs).chunk(2, dim=1)
        attended = cells.attend_from_queries(attention, of_query(inputs[first]), key, value)
        return self._after_attention(states[first], attended)

    def _attended(self, projected: torch.Tensor, cells: Any) -> torch.Tensor:
        """Let tokens attend within their cells: queries, keys and values beside each other, to `(tokens, width)`."""
        attention = self.layer.self_attn
        widths = self._widths()
        if self.attention is not None:
            heads, key_heads = (width // attention.head_dim for width in widths[:2])
            return self.attention(projected, cells.boundaries, heads, key_heads, attention.scaling)
        query, key, value = (
            part.unflatten(1, (-1, attention.head_dim)).transpose(0, 1).unsqueeze(0)
            for part in projected.split(widths, dim=1)
        )
        output: torch.Tensor = cells.mask(query, key, value, attention.scaling)[0][0]
        return output.flatten(1)

    def _widths(self) -> list[int]:
        attention = self.layer.self_attn
        rest = attention.k_proj.out_features
        return [attention.q_proj.out_features, rest, rest]

    def _into_attention(self, states: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return (
            add_and_norm(states, None, layer.attention_norm, self.dtype) if layer.pre_norm else states.to(self.dtype)
        )

    def _after_attention(self, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """As `TahoeX1Layer.after_attention`, from before the output projection on. `states` is overwritten."""
        layer = self.layer
        projected = self.output(attended)
        if layer.pre_norm:
            return states.add_(self._feed_forward(add_and_norm(states, projected, layer.mlp_norm, self.dtype)))
        states = layer.attention_norm(states.add_(projected))
        return layer.mlp_norm(states.add_(self._feed_forward(states.to(self.dtype))))

    def _feed_forward(self, inputs: torch.Tensor) -> torch.Tensor:
        act = self.layer.mlp.act_fn
        if self.gate is not None:
            return self.down(act(self.gate(inputs)).mul_(self.up(inputs)))
        return self.down(self.up.relu(inputs) if type(act) is nn.ReLU else act(self.up(inputs)))


def linears_of(layer: TahoeX1Layer) -> list[nn.Linear]:
    """Return the linear layers of a transformer layer: queries, keys, values, output, up, down, and a gate."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.up_proj, mlp.down_proj]
    return linears + ([] if mlp.gate_proj is None else [mlp.gate_proj])


def round_layers(model: TahoeX1Model, dtype: torch.dtype) -> None:
    """Round the weights of a float32 model's layers, but for their norms, to the type in which they are multiplied.

    Under autocast, results stay the same. Layers that `PreparedLayer` cannot take are left as they are.
    """
    if can_all_be_prepared(model):
        for module in (module for layer in model.layers for module in linears_of(cast(TahoeX1Layer, layer))):
            module.to(dtype)


def can_all_be_prepared(model: TahoeX1Model) -> bool:
    """Return whether `PreparedLayer` takes all layers of a model, which is in float32."""
    return model.dtype == torch.float32 and all(_can_be_prepared(cast(TahoeX1Layer, layer)) for layer in model.layers)


def _can_be_prepared(layer: TahoeX1Layer) -> bool:
    norms = (layer.attention_norm, layer.mlp_norm)
    return all(map(is_plain, linears_of(layer))) and all(type(norm) is nn.LayerNorm for norm in norms)


def is_plain(module: nn.Module) -> bool:
    """Return whether a linear layer is its weight and no more: no adapter around it, and not quantised."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter
