# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Floating-point operations of the model: two per multiplication, without padding."""

import numpy as np

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config


def embedding_flops(config: TahoeX1Config, lengths: np.ndarray) -> float:
    """Return the operations of the whole transformer on cells of these lengths.

    A layer multiplies 4 d^2 times per token in the attention's projections (query, key, value, output; heads not
    grouped), 2 d f times in the feed-forward block, and 2 d times per pair of tokens for scores and sums. The
    expression encoder adds d^2 per token.

    The last layer counts in full, although the `<cls>` embedding alone needs less of it, and less is computed.
    """
    lengths = lengths.astype(np.float64)
    d = config.hidden_size
    return 2 * (_layers(config, config.num_hidden_layers, lengths) + float(lengths.sum()) * d * d)


def training_flops(config: TahoeX1Config, lengths: np.ndarray) -> float:
    """Return the operations of a training step: the forward pass, and twice as many for the backward pass.

    The decoders add (layers + 1) d^2 multiplications per token. Pairs of tokens that the mask hides are counted like
    the others, and the optimizer is not counted.
    """
    d = config.hidden_size
    decoders = 2 * float(lengths.sum()) * (config.expression_decoder_layers + 1) * d * d
    return 3 * (embedding_flops(config, lengths) + decoders)


def _layers(config: TahoeX1Config, number: int, lengths: np.ndarray) -> float:
    """Return the multiplications of a number of layers on all tokens."""
    d, f = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    return number * (float(lengths.sum()) * (4 * d * d + 2 * d * f) + float((lengths**2).sum()) * 2 * d)
