# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The model's forward pass on cells without padding, for inference on CPUs.

All that works on single tokens (projections, feed-forward blocks, encoders) runs on the tokens of all cells behind
each other; attention runs on the cells of each length by themselves. Where only `<cls>` is asked for, the last layer
computes keys and values for all tokens, and everything else for `<cls>` alone. Numbers are those of the padded forward
pass, up to the rounding of sums in another order.
"""

import itertools
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tahoex1_hf.modeling_tahoe_x1 import CellLayout, TahoeX1Attention, TahoeX1Model


def can_run_ragged(model: TahoeX1Model, device: torch.device) -> bool:
    """Whether `ragged_forward` serves: on a CPU, with the default attention, and a pooling that knows no padding."""
    config = model.config
    return (
        device.type == "cpu" and config._attn_implementation == "sdpa" and config.cell_pooling != "mean_with_padding"
    )


def ragged_forward(
    model: TahoeX1Model,
    input_ids: torch.Tensor,
    expression_values: torch.Tensor,
    offsets: np.ndarray,
    drug_ids: torch.Tensor | None = None,
    all_tokens: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embed cells that lie behind each other.

    Args:
        model: in eval mode, with `can_run_ragged`.
        input_ids: `(tokens,)` int64.
        expression_values: `(tokens,)` float.
        offsets: `(cells + 1,)` boundaries of the cells, each with at least one token. Cells of equal length should
            lie side by side.
        drug_ids: `(cells,)` int64, as for the model.
        all_tokens: also return the contextual embeddings of all tokens.

    Returns:
        `(cells, hidden_size)` cell embeddings, not normalised, and, with `all_tokens`, `(tokens, hidden_size)`.
    """
    boundaries = torch.from_numpy(np.asarray(offsets, dtype=np.int64))
    row = input_ids.unsqueeze(0)
    layout = CellLayout.packed(boundaries, row.shape)
    hidden_states, _ = model.embeddings(row, expression_values.unsqueeze(0), None, drug_ids, layout)
    hidden_states = hidden_states[0]
    runs = equal_runs(np.diff(offsets))
    shorten = not all_tokens and model.config.cell_pooling == "cls"
    layers = list(model.layers)
    for layer in layers[:-1] if shorten else layers:
        hidden_states = _layer(layer, hidden_states, None, runs)
    if shorten:
        first_tokens = boundaries[:-1]
        return model.norm(_layer(layers[-1], hidden_states, first_tokens, runs)), None
    hidden_states = model.norm(hidden_states)
    pooled = model._pool(hidden_states.unsqueeze(0), None, layout)
    return pooled, hidden_states if all_tokens else None


def equal_runs(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Neighbouring cells of equal length: (how many, length)."""
    return [(len(list(group)), int(length)) for length, group in itertools.groupby(lengths.tolist())]


def _layer(
    layer: Any, hidden_states: torch.Tensor, only: torch.Tensor | None, runs: list[tuple[int, int]]
) -> torch.Tensor:
    """One `TahoeX1Layer`; with `only`, the first token of each cell, its output for these alone."""
    residual = hidden_states if only is None else hidden_states[only]
    if layer.pre_norm:
        states = residual + _attention(layer.self_attn, layer.attention_norm(hidden_states), only, runs)
        return states + layer.mlp(layer.mlp_norm(states))
    states = layer.attention_norm(residual + _attention(layer.self_attn, hidden_states, only, runs))
    return layer.mlp_norm(states + layer.mlp(states))


def _attention(
    attention: TahoeX1Attention, states: torch.Tensor, only: torch.Tensor | None, runs: list[tuple[int, int]]
) -> torch.Tensor:
    """Attention within every cell: `(tokens, hidden_size)`, or `(cells, hidden_size)` with `only`."""
    queries = attention.q_proj(states if only is None else states[only])
    query, key, value = (
        projected.view(len(projected), -1, attention.head_dim)
        for projected in (queries, attention.k_proj(states), attention.v_proj(states))
    )
    output = torch.empty_like(query)
    token = cell = 0
    for cells, length in runs:
        rows = slice(token, token + cells * length) if only is None else slice(cell, cell + cells)
        tokens = slice(token, token + cells * length)
        q, k, v = (
            part.unflatten(0, (cells, -1)).transpose(1, 2) for part in (query[rows], key[tokens], value[tokens])
        )
        grouped = attention.num_key_value_groups > 1
        attended = scaled_dot_product_attention(q, k, v, scale=attention.scaling, enable_gqa=grouped)
        output[rows] = attended.transpose(1, 2).flatten(0, 1)
        token += cells * length
        cell += cells
    return attention.o_proj(output.flatten(1))
