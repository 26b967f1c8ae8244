# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The layers of a model made ready for many batches, and made anew when its weights have changed."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from tahoex1_hf.inference.compiled_attention import CompiledAttention, serves_heads
from tahoex1_hf.inference.in_place import InPlaceLayer
from tahoex1_hf.inference.prepared_layers import PreparedLayer, can_all_be_prepared, is_plain, linears_of
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Layer, TahoeX1Model

ReadyLayer = PreparedLayer | InPlaceLayer


def can_attend_compiled(model: TahoeX1Model) -> bool:
    """Return whether compiled attention, where there is some, computes all layers but perhaps the last."""
    config = model.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    return serves_heads(heads, key_heads, config.hidden_size // heads) and can_all_be_prepared(model)


def prepare_layers(
    model: TahoeX1Model, dtype: torch.dtype, attention: CompiledAttention | None = None
) -> Sequence[ReadyLayer] | None:
    """Prepare all layers of a float32 model for products in `dtype`; None where one of them cannot be.

    In float32 on a CPU the layers keep the model's weights, elsewhere they hold copies.
    """
    if model.dtype != torch.float32:
        return None
    layers = [cast(TahoeX1Layer, layer) for layer in model.layers]
    prepared: list[ReadyLayer | None]
    if dtype == torch.float32 and model.device.type == "cpu":
        prepared = [InPlaceLayer.make(layer, attention) for layer in layers]
    else:
        prepared = [PreparedLayer.make(layer, dtype, attention) for layer in layers]
    made = [layer for layer in prepared if layer is not None]
    return made if len(made) == len(prepared) else None


class KeptLayers:
    """The prepared layers of a model, which are made again when its weights have changed.

    For the 70M model, making them takes as long as embedding some cells. A change of a weight's values, another tensor
    in its place and another module around it are noticed. What is written through `tensor.data` is not: PyTorch does
    not count it.

    Args:
        model: Model whose layers are prepared.
        dtype: Type of the products.
        attention: Compiled attention, for models that it serves; None for torch's.
    """

    def __init__(self, model: TahoeX1Model, dtype: torch.dtype, attention: CompiledAttention | None = None):
        self.model, self.dtype, self.attention = model, dtype, attention
        self._layers: Sequence[ReadyLayer] | None = None
        self._state: list[tuple[int, int, int]] = []
        self._held: list[tuple[nn.Linear, torch.Tensor]] = []

    def current(self) -> Sequence[ReadyLayer] | None:
        """Return the prepared layers; None where one of them cannot be prepared."""
        linears = [linear for layer in self.model.layers for linear in linears_of(cast(TahoeX1Layer, layer))]
        weights = [(one, tensor) for one in linears if is_plain(one) for tensor in one.parameters()]
        if any(tensor.is_inference() for _, tensor in weights):  # which have no count of their changes
            return prepare_layers(self.model, self.dtype, self.attention)
        state = [(id(one), tensor.data_ptr(), tensor._version) for one, tensor in weights]
        if self._layers is None or state != self._state:
            self._layers = None  # so that old copies and new ones are never in memory together
            self._layers = prepare_layers(self.model, self.dtype, self.attention)
            # What the state was taken of is held, so that its addresses are not given to others.
            self._state, self._held = state, [(one, tensor.detach()) for one, tensor in weights]
        return self._layers
