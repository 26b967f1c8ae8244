# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Layers in float32 on a CPU, whose products are written into memory that is used again.

An array of 8,000 tokens is given back to the system when it is freed, and every page of the next one is made anew. So
products are written where those of the layer before were, and those that end a block are added to the residual stream
while they are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tahoex1_hf.inference.compiled_attention import CompiledAttention
from tahoex1_hf.inference.prepared_layers import blocks_on_cpu, is_plain, linears_of
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Layer


class Room:
    """Memory that the layers of a batch use one after the other: an array for each purpose."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def array(self, purpose: str, rows: int, width: int) -> torch.Tensor:
        """Return `(rows, width)` float32 with anything in it; the last array of this purpose is overwritten."""
        held = self._held.get(purpose)
        if held is None or len(held) < rows * width:
            held = self._held[purpose] = torch.empty(rows * width)
        return held[: rows * width].view(rows, width)


@dataclass(frozen=True, eq=False)
class InPlaceLayer:
    """One transformer layer, with the weights of the model.

    Args:
        layer: The model's layer.
        attention: Compiled attention in float32; None for torch's.
    """

    layer: TahoeX1Layer
    attention: CompiledAttention | None = None

    dtype = torch.float32

    @classmethod
    def make(cls, layer: TahoeX1Layer, attention: CompiledAttention | None = None) -> "InPlaceLayer | None":
        """Return the layer; None if a product is not a plain one in float32 on a CPU, such as an adapter's."""
        linears = linears_of(layer)
        if not all(map(is_plain, linears)):
            return None
        weights = [linear.weight for linear in linears]
        serves = all(weight.dtype == cls.dtype and weight.device.type == "cpu" for weight in weights)
        return cls(layer, attention) if serves else None

    def all_tokens(self, states: torch.Tensor, cells: Any) -> torch.Tensor:
        """Run the layer on all tokens, `(tokens, hidden_size)`. `states` is overwritten.

        Args:
            states: The residual stream.
            cells: The cells of the batch, as `ragged_forward` knows them.
        """
        layer, room = self.layer, cells.room
        attended = self._attended(states, cells)
        parts = blocks_on_cpu(states, layer.mlp.up_proj.out_features)
        for part, seen in zip(parts, attended.split([len(part) for part in parts]), strict=True):
            _add(layer.self_attn.o_proj, seen, part)
            if layer.pre_norm:
                self._add_feed_forward(layer.mlp_norm(part), part, room)
                continue
            part.copy_(layer.attention_norm(part))
            self._add_feed_forward(part, part, room)
            part.copy_(layer.mlp_norm(part))
        return states

    def _attended(self, states: torch.Tensor, cells: Any) -> torch.Tensor:
        """Let tokens attend within their cells, to `(tokens, hidden_size)`, before the output projection."""
        attention, room, tokens = self.layer.self_attn, cells.room, len(states)
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        widths = [linear.out_features for linear in linears]
        heads, key_heads, _ = (width // attention.head_dim for width in widths)
        if self.attention is not None:
            together = room.array("projected", tokens, sum(widths))
            self._project(states, linears, together.split(widths, dim=1), with_bias=False)
            out = room.array("attended", tokens, widths[0])
            given = (linear.bias if linear.bias is not None else linear.weight.new_zeros(()) for linear in linears)
            bias = torch.cat([each.expand(width) for each, width in zip(given, widths, strict=True)])
            return self.attention(together, cells.boundaries, heads, key_heads, attention.scaling, out, bias)
        apart = [room.array(name, tokens, width) for name, width in zip(("q", "k", "v"), widths, strict=True)]
        self._project(states, linears, apart, with_bias=True)
        query, key, value = (
            each.unflatten(1, (-1, attention.head_dim)).transpose(0, 1).unsqueeze(0) for each in apart
        )
        attended: torch.Tensor = cells.mask(query, key, value, attention.scaling)[0][0]
        return attended.flatten(1)

    def _project(
        self, states: torch.Tensor, linears: Sequence[nn.Linear], outs: Sequence[torch.Tensor], with_bias: bool
    ) -> None:
        """Write queries, keys and values."""
        parts = blocks_on_cpu(states, sum(out.shape[1] for out in outs))
        sizes = [len(part) for part in parts]
        for part, *written in zip(parts, *(out.split(sizes) for out in outs), strict=True):
            inputs = self.layer.before_attention(part)
            for linear, out in zip(linears, written, strict=True):
                _multiply(linear, inputs, out, with_bias)

    def _add_feed_forward(self, inputs: torch.Tensor, states: torch.Tensor, room: Room) -> None:
        """Add the feed-forward block's output to `states`, which may be its inputs: both `(tokens, hidden_size)`."""
        mlp = self.layer.mlp
        inner = _multiply(mlp.up_proj, inputs, room.array("up", len(inputs), mlp.up_proj.out_features))
        if mlp.gate_proj is not None:
            gate = room.array("gate", len(inputs), mlp.gate_proj.out_features)
            inner.mul_(mlp.act_fn(_multiply(mlp.gate_proj, inputs, gate)))
        elif type(mlp.act_fn) is nn.ReLU:
            inner.clamp_min_(0)
        else:
            inner = mlp.act_fn(inner)
        _add(mlp.down_proj, inner, states)


def _multiply(linear: nn.Linear, inputs: torch.Tensor, out: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
    if linear.bias is None or not with_bias:
        return torch.mm(inputs, linear.weight.t(), out=out)
    return torch.addmm(linear.bias, inputs, linear.weight.t(), out=out)


def _add(linear: nn.Linear, inputs: torch.Tensor, states: torch.Tensor) -> None:
    """Add what a linear layer makes of `inputs` to `states`."""
    states.addmm_(inputs, linear.weight.t())
    if linear.bias is not None:
        states.add_(linear.bias)
