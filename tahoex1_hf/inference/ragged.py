# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The model's forward pass on cells without padding, for inference: only what is needed, and no gradients.

Whatever works on single tokens (projections, feed-forward blocks, encoders) runs on the tokens of all cells, one after
the other; attention runs within each cell. Three steps are left out or replaced by mathematically equal ones:

- Where only `<cls>` is asked for, the last layer computes it alone.
- There, one query looks at a cell: its product with a key, q (W x), is (q W) x, so that no key or value is projected.
- A value's embedding depends on the value alone, and bins have 50 values: each is computed once per batch.

Numbers are those of the padded forward pass, up to the rounding of sums in another order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from tahoex1_hf.common.cuda_memory import sent
from tahoex1_hf.inference.in_place import Room
from tahoex1_hf.inference.kept_layers import ReadyLayer
from tahoex1_hf.inference.prepared_layers import PreparedLayer, blocks_on_cpu, is_plain
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Attention, TahoeX1Layer, TahoeX1Model
from tahoex1_hf.observed_attention_tahoe_x1 import PackedAttention, equal_runs, flash_attention, flash_serves
from tahoex1_hf.packing_tahoe_x1 import CellLayout, multiplied_as


def can_run_ragged(model: TahoeX1Model, device: torch.device) -> bool:
    """Return whether `ragged_forward` serves: on CPUs and CUDA, unless padding is counted or attention needs rows."""
    if model.config.cell_pooling == "mean_with_padding":
        return False
    if is_flash_attention_requested(model.config):
        return device.type == "cuda"
    return device.type in ("cpu", "cuda") and model.config._attn_implementation == "sdpa"


@torch.inference_mode()
def ragged_forward(
    model: TahoeX1Model,
    input_ids: torch.Tensor,
    expression_values: torch.Tensor,
    offsets: np.ndarray,
    drug_ids: torch.Tensor | None = None,
    all_tokens: bool = False,
    prepared: Sequence[ReadyLayer] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embed cells whose tokens follow one another.

    Args:
        model: A model in eval mode for which `can_run_ragged` is true.
        input_ids: `(tokens,)` int64.
        expression_values: `(tokens,)` float, on the CPU: the values are read here, which must not wait for a GPU.
        offsets: `(cells + 1,)` boundaries of the cells, each with at least one token. Cells of equal length should
            lie side by side.
        drug_ids: `(cells,)` int64, as for the model.
        all_tokens: Also return the contextual embeddings of all tokens.
        prepared: Result of `prepare_layers`; None for the model's own layers, as with transformers' flash attention.

    Returns:
        `(cells, hidden_size)` cell embeddings, not normalised, and, with `all_tokens`, `(tokens, hidden_size)`.
    """
    device = input_ids.device
    boundaries = torch.from_numpy(np.asarray(offsets, dtype=np.int64))
    lengths = np.diff(offsets)
    boundaries = sent(boundaries, device)
    layout = CellLayout.packed(boundaries, torch.Size((1, len(input_ids))))
    hidden_states = _embeddings(model, input_ids, expression_values, drug_ids, layout)
    dtype = prepared[0].dtype if prepared else multiplied_as(hidden_states)
    cells = _Layout(model, boundaries, lengths, dtype)
    layers: Sequence[Any] = prepared or list(model.layers)
    shorten = bool(layers) and not all_tokens and model.config.cell_pooling == "cls"
    for layer in layers[:-1] if shorten else layers:
        hidden_states = _whole_layer(layer, hidden_states, cells)
    if shorten:
        return model.norm(_cls_layer(layers[-1], hidden_states, cells)), None
    hidden_states = model.norm(hidden_states)
    pooled = layout.pool(hidden_states.unsqueeze(0), None, model.config.cell_pooling)
    return pooled, hidden_states if all_tokens else None


@torch.inference_mode()
def targets_forward(
    model: TahoeX1Model, input_ids: torch.Tensor, on_layer: Callable[[], object] = lambda: None
) -> torch.Tensor:
    """Return the embeddings of genes that are put together like one cell, all of them targets.

    Each attends to all of them, as in a model without the mask of `attention_mask_style="observed_or_self"`.

    Args:
        model: A model in eval mode.
        input_ids: `(tokens,)` int64.
        on_layer: Function called after each layer.

    Returns:
        `(tokens, hidden_size)`.
    """
    flag = model.embeddings.flag_embedding(input_ids.new_ones(()))
    hidden_states = model.embeddings.gene_encoder(input_ids) + flag
    boundaries = torch.tensor([0, len(input_ids)], device=input_ids.device)
    cells = _Layout(model, boundaries, np.array([len(input_ids)]), multiplied_as(hidden_states))
    layers: list[Any] = list(model.layers)
    for layer in layers:
        hidden_states = _whole_layer(layer, hidden_states, cells)
        on_layer()
    return model.norm(hidden_states)


class _Layout:
    """Where the cells of a batch lie, and attention within them, on whatever the model attends with."""

    def __init__(self, model: TahoeX1Model, boundaries: torch.Tensor, lengths: np.ndarray, dtype: torch.dtype):
        self.boundaries, self.lengths = boundaries, lengths.tolist()
        self.longest, self.runs = max(self.lengths), equal_runs(self.lengths)
        # Flash attention reads the boundaries itself. It has no float32.
        self.flash = is_flash_attention_requested(model.config) and (self.on_cpu or dtype != torch.float32)
        self.mask, self.dtype, self.room = None, dtype, Room()
        if not self.flash:
            width = model.config.hidden_size // model.config.num_attention_heads
            serves = flash_serves(boundaries.device, dtype, width)
            self.mask = PackedAttention.make(boundaries, self.longest, None, boundaries.device, flash=serves)
        self.flash_arguments = self._flash_arguments(boundaries, self.longest) if self.flash else {}

    @property
    def bounds(self) -> torch.Tensor | None:
        """The cells' boundaries in the form of torch's flash attention, where that attends."""
        return None if self.mask is None or self.mask.flash is None else self.mask.flash.bounds

    @property
    def on_cpu(self) -> bool:
        return self.boundaries.device.type == "cpu"

    def attend_from_cls(self, attention: TahoeX1Attention, states: torch.Tensor) -> torch.Tensor:
        """Let every `<cls>` attend to its cell: `(cells, hidden_size)`, before the output projection."""
        queries = attention.q_proj(states[self.boundaries[:-1]])
        keys_are_left_out = self.on_cpu and not self.flash and self.bounds is None
        if keys_are_left_out and is_plain(attention.k_proj) and is_plain(attention.v_proj):
            return self._without_keys(attention, queries, states)
        return self.attend_from_queries(attention, queries, attention.k_proj(states), attention.v_proj(states))

    def attend_from_queries(
        self, attention: TahoeX1Attention, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Let one query of each cell attend to the cell's keys, all projected: `(cells, hidden_size)`."""
        query, key, value = (self._heads(attention, projected) for projected in (queries, keys, values))
        if self.flash:
            ones = torch.arange(len(queries) + 1, device=query.device)
            output, _ = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation](
                attention, query, key, value, None, dropout=0.0, scaling=attention.scaling,
                **self._flash_arguments(ones, 1),
            )  # fmt: skip
            return output.flatten(2)[0]
        if self.bounds is not None:
            ones = torch.arange(len(queries) + 1, dtype=torch.int32, device=query.device)
            # Layers with 8-bit weights give float32, which other attention casts under autocast.
            q, k, v = (tensor[0].transpose(0, 1).to(self.dtype) for tensor in (query, key, value))
            return flash_attention(q, k, v, ones, self.bounds, (1, self.longest), attention.scaling).flatten(1)
        outputs = []
        for q, k, v in zip(
            query.split(1, dim=2),
            key.split(self.lengths, dim=2),
            value.split(self.lengths, dim=2),
            strict=True,
        ):
            grouped = attention.num_key_value_groups > 1
            outputs.append(scaled_dot_product_attention(q, k, v, scale=attention.scaling, enable_gqa=grouped))
        return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)[0]

    @staticmethod
    def _heads(attention: TahoeX1Attention, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(1, len(projected), -1, attention.head_dim).transpose(1, 2)

    def _flash_arguments(self, queries: torch.Tensor, longest_query: int) -> dict[str, Any]:
        return {
            "cu_seq_lens_q": queries.int(),
            "cu_seq_lens_k": self.boundaries.int(),
            "max_length_q": longest_query,
            "max_length_k": self.longest,
        }

    def _without_keys(self, attention: TahoeX1Attention, queries: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Attend from `<cls>` without projecting keys and values.

        The bias of the keys is left out: it adds the same to all scores of a query, and the softmax takes it away.
        """
        head_dim, width = attention.head_dim, states.shape[1]
        heads_of_keys = queries.view(len(queries), -1, attention.num_key_value_groups, head_dim)
        key_weight = attention.k_proj.weight.view(-1, head_dim, width)
        value_weight = attention.v_proj.weight.view(-1, head_dim, width)
        looks = torch.einsum("ckgh,khw->ckgw", heads_of_keys * attention.scaling, key_weight).flatten(1, 2)
        pieces = zip(
            looks.split([cells for cells, _ in self.runs]),
            states.split([cells * length for cells, length in self.runs]),
            self.runs,
            strict=True,
        )
        seen = []
        for look, flat, (cells, length) in pieces:
            tokens = flat.view(cells, length, width)
            weights = torch.softmax((tokens @ look.transpose(1, 2)).float(), dim=1)
            seen.append(weights.transpose(1, 2).to(tokens.dtype) @ tokens)
        means = torch.cat(seen).view(len(queries), -1, attention.num_key_value_groups, width)
        values = torch.einsum("ckgw,khw->ckgh", means, value_weight)
        if attention.v_proj.bias is not None:
            values = values + attention.v_proj.bias.view(1, -1, 1, head_dim)
        return values.flatten(1)


def _distinct(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `torch.unique` returns, sorted values and the place of each; whole ones need no sorting for it."""
    low, high = (int(limit) for limit in values.aminmax()) if values.isfinite().all() else (0, 2**31)
    whole = values.long()
    if high - low > len(values) or not torch.equal(whole.to(values.dtype), values):
        return torch.unique(values, return_inverse=True)
    there = torch.bincount(whole - low, minlength=high - low + 1) > 0
    distinct = there.nonzero().squeeze(1)
    return (distinct + low).to(values.dtype), (there.cumsum(0) - 1)[whole - low]


def _embeddings(
    model: TahoeX1Model,
    input_ids: torch.Tensor,
    expression_values: torch.Tensor,
    drug_ids: torch.Tensor | None,
    layout: CellLayout,
) -> torch.Tensor:
    distinct, places = _distinct(expression_values)
    if 2 * len(distinct) > len(places):
        distinct, places = expression_values, torch.arange(len(expression_values), device=places.device)
    distinct, places = sent(distinct, input_ids.device), sent(places, input_ids.device)
    values = model.embeddings.expression_encoder(distinct.unsqueeze(0))[0]
    return model.embeddings.combine(input_ids.unsqueeze(0), values[places].unsqueeze(0), drug_ids, layout)[0][0]


def _whole_layer(layer: TahoeX1Layer | ReadyLayer, states: torch.Tensor, cells: _Layout) -> torch.Tensor:
    """Run one layer on all tokens. `states` is overwritten."""
    if isinstance(layer, ReadyLayer):
        return layer.all_tokens(states, cells)
    attended, _ = layer.self_attn(layer.before_attention(states).unsqueeze(0), cells.mask, **cells.flash_arguments)
    parts = blocks_on_cpu(states, layer.mlp.up_proj.out_features)
    for part, attended_part in zip(parts, attended[0].split([len(part) for part in parts]), strict=True):
        part.copy_(layer.after_attention(part, attended_part, overwrite=True))
    return states


def _cls_layer(layer: TahoeX1Layer | ReadyLayer, states: torch.Tensor, cells: _Layout) -> torch.Tensor:
    """Run one layer for each cell's first token alone: `(cells, hidden_size)`."""
    if isinstance(layer, PreparedLayer) and not layer.packed:
        return layer.first_tokens(states, cells)
    if isinstance(layer, ReadyLayer):  # no key or value is projected, which saves more than the layer would
        layer = layer.layer
    attended = cells.attend_from_cls(layer.self_attn, layer.before_attention(states))
    return layer.after_attention(states[cells.boundaries[:-1]], layer.self_attn.o_proj(attended))
