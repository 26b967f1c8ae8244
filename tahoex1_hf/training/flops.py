# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Floating-point operations of the model: two per multiplication, padding never counted."""

import numpy as np

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config


def embedding_flops(config: TahoeX1Config, lengths: np.ndarray) -> float:
    """Operations of the whole transformer on cells of these lengths.

    Per token and layer 4 d^2 for the attention's projections (query, key, value, output; heads not grouped) and
    2 d f for the feed-forward block, per pair of tokens 2 d for scores and sum; d^2 in the expression encoder.

    The last layer counts in full. For the `<cls>` embedding alone less is enough, and ours computes less, so that a
    share of the hardware's rate by this count is a little above what the arithmetic units did: see `performed_flops`.
    """
    lengths = lengths.astype(np.float64)
    d = config.hidden_size
    return 2 * (_layers(config, config.num_hidden_layers, lengths) + float(lengths.sum()) * d * d)


def performed_flops(config: TahoeX1Config, lengths: np.ndarray) -> float:
    """Operations that ours performs on a CPU where only `<cls>` is asked for.

    All layers but the last are computed for every token. The last projects nothing but `<cls>` (its query, the query
    taken through the key's matrix, the value of the mean, the output, the feed-forward block), and looks at each
    token twice per head. The expression encoder runs on a batch's distinct values, too few to count.
    """
    lengths = lengths.astype(np.float64)
    d, f = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    heads = config.num_attention_heads
    last = len(lengths) * (4 * d * d + 2 * d * f) + float(lengths.sum()) * 2 * heads * d
    return 2 * (_layers(config, config.num_hidden_layers - 1, lengths) + last)


def training_flops(config: TahoeX1Config, lengths: np.ndarray) -> float:
    """Operations of a training step: forward and, at twice that, backward; the optimizer's are not counted.

    The decoders add (layers + 1) d^2 per token. Pairs of tokens that the mask hides are counted like the others.
    """
    d = config.hidden_size
    decoders = 2 * float(lengths.sum()) * (config.expression_decoder_layers + 1) * d * d
    return 3 * (embedding_flops(config, lengths) + decoders)


def _layers(config: TahoeX1Config, number: int, lengths: np.ndarray) -> float:
    """Multiplications of so many layers on all tokens."""
    d, f = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    return number * (float(lengths.sum()) * (4 * d * d + 2 * d * f) + float((lengths**2).sum()) * 2 * d)
