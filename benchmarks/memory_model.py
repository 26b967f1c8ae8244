# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Calculate the bytes that a training step needs on each device from the configuration alone.

Nothing is allocated: parameters are counted on the meta device, and the bytes that autograd keeps for the backward
pass are written down operation by operation. `tests/benchmarks/test_scaling_model.py` compares the formulas with
autograd.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from tahoex1_hf.configuration_tahoe_x1 import Activation, TahoeX1Config
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.observed_attention_tahoe_x1 import SHORTEST_WITH_OBSERVED_KEYS

Strategy = Literal["one", "ddp", "fsdp2", "hsdp"]

# Whether the derivative of an activation needs its argument or its result (derivatives.yaml of torch).
_KEEPS_RESULT = {"relu", "sigmoid", "tanh"}
_NORM_STATISTICS = 8  # bytes of a token's mean and reciprocal deviation, float32
_ADAMW_MOMENTS = 8  # bytes of the two moments, float32


@dataclass(frozen=True)
class Precision:
    """The types in which a step computes, and the operations that keep more than they must.

    Args:
        weights: Bytes of a weight while the layer computes.
        product: Bytes of a number that enters a matrix product.
        stream: Bytes of a number of the residual stream, and so of its norms' inputs.
        autocast: Whether every product makes its own copy of its argument, and of the weights.
        cuda: Whether norms compute in float32 under autocast, and dropout keeps a mask of bytes.
        output_copied: Whether the output of attention is kept twice, as attention and as the projection lay it out.
        dense_mask: Whether `observed_or_self` makes an array of cells x length x length in a layer, for short cells.
        compiled: Whether `torch.compile` has chosen, layer by layer, what is kept and what is computed again. That is
            known for layers like the released models': without gates, normalised before their blocks.
    """

    weights: int
    product: int
    stream: int
    autocast: bool = False
    cuda: bool = False
    output_copied: bool = False
    dense_mask: bool = False
    compiled: bool = False


CPU_FLOAT32 = Precision(4, 4, 4, output_copied=True, dense_mask=True)
CPU_BF16 = Precision(4, 2, 4, autocast=True, output_copied=True, dense_mask=True)
# Accelerate's DDP, and one device: float32 weights and residual stream, products under autocast.
GPU_AUTOCAST = Precision(4, 2, 4, autocast=True, cuda=True)
# The same with compiled layers, as the recipes have them on GPUs.
GPU_COMPILED = replace(GPU_AUTOCAST, compiled=True)
# FSDP2 (`only_computing` of the trainer, `fsdp2_prepare_model` of Accelerate): no autocast; weights are gathered as
# bfloat16, and everything is computed from them in bfloat16. Gradients are reduced as float32 and kept so, in shards.
GPU_FSDP2 = Precision(2, 2, 2, cuda=True)


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights in the parts of a model.

    Args:
        total: Weights of the model.
        layer: Weights of one transformer layer, an FSDP unit.
        table: Weights of the gene embedding, an FSDP unit.
        rest: Weights of everything else, the root of FSDP, which stay gathered from the forward to the backward pass.
        matrices: Weights in matrix products, which autocast copies; they are counted above too.
    """

    total: int
    layer: int
    table: int
    rest: int
    matrices: int


def count_parameters(config: TahoeX1Config) -> Parameters:
    """Count the weights of `TahoeX1ForPreTraining` by making one on the meta device."""
    return _counted(config.to_json_string(use_diff=False))


@lru_cache(maxsize=32)
def _counted(settings: str) -> Parameters:
    with torch.device("meta"):
        model = TahoeX1ForPreTraining(TahoeX1Config.from_dict(json.loads(settings)))
    total = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.tahoe.layers[0].parameters())
    table = model.tahoe.embeddings.gene_encoder.embedding.weight.numel()
    outside = model.tahoe.embeddings.expression_encoder.linear1  # runs in float32
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not outside)
    return Parameters(total, layer, table, total - layer * len(model.tahoe.layers) - table, matrices)


def kept_per_token(config: TahoeX1Config, precision: Precision, length: int, *, checkpointing: bool = False) -> float:
    """Return the bytes that autograd keeps for the backward pass, per token of a packed batch.

    Attention keeps no scores, only query, key, value, output and one float32 per head, with every fused kernel.

    Args:
        config: Configuration of the model.
        precision: Types of the computation.
        length: Number of tokens of a cell; it matters only for dense masks.
        checkpointing: Whether only each layer's input is kept.
    """
    layer = layer_per_token(config, precision, length)
    if checkpointing:
        layer = config.hidden_size * precision.stream
    return config.num_hidden_layers * layer + _outside_per_token(config, precision)


def layer_per_token(config: TahoeX1Config, precision: Precision, length: int) -> float:
    """Return the bytes per token that one layer keeps; the position of its norms makes no difference."""
    d, f = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    groups = config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)
    w = precision.product
    if precision.compiled:
        if config.use_glu or config.norm_position != "pre":
            raise ValueError("What compiled layers keep is not known for gates and for norms after the blocks.")
        # Query, key, value and output of attention, both norms' results, the projected output, the activation's
        # result (and its argument); of the stream the layer's input alone, from which the rest is computed again.
        inner = f * (1 + _argument(config.hidden_act))
        kept = w * (2 * d + 2 * d // groups + 2 * d + d + inner) + 4 * config.num_attention_heads
        return kept + precision.stream * d + 2 * _NORM_STATISTICS
    # Autocast converts the norm's output anew for each of the projections.
    copies = 3 if precision.autocast else 1
    attention = copies * d + d + 2 * d // groups + d + (d if precision.output_copied else 0)
    kept = w * attention + 4 * config.num_attention_heads
    masked = config.attention_mask_style == "observed_or_self" and length < SHORTEST_WITH_OBSERVED_KEYS
    if precision.dense_mask and masked:
        kept += w * length
    gated = config.use_glu
    feed_forward = d * (2 if gated and precision.autocast else 1)
    if gated:
        # The gate's result, the other factor, their product, and for some activations the gate's argument.
        feed_forward += f * (3 + _argument(config.hidden_act))
    else:
        feed_forward += f * (1 + _argument(config.hidden_act))
    norms = 2 * (precision.stream * d + _NORM_STATISTICS)
    return kept + w * feed_forward + norms


def _outside_per_token(config: TahoeX1Config, precision: Precision) -> float:
    """Return the bytes per token that embeddings, final norm, decoders and losses keep."""
    return _embeddings_per_token(config, precision) + _decoders_per_token(config, precision)


def _embeddings_per_token(config: TahoeX1Config, precision: Precision) -> float:
    """Return the bytes per token that embeddings keep, until the end of the backward pass."""
    d, w, p = config.hidden_size, precision.product, precision.weights
    # A second copy of a product's input, where the input is already kept in another type.
    copy = w * d if precision.autocast else 0
    inputs = 8 + 1 + p + 8  # gene, whether it is a target, expression, and number of the cell
    # The first product takes the values themselves, in the type of its weights.
    expression = p * d + (copy or _argument(config.expression_encoder_act) * p * d)
    if config.expression_encoder_norm:
        expression += _NORM_STATISTICS + d * (4 if precision.autocast and precision.cuda else w)
    if config.expression_encoder_dropout:
        expression += d * (1 if precision.cuda else w)
    genes = p * d + _NORM_STATISTICS if config.gene_encoder_norm else 0
    drugs = 1 if config.num_drugs else 0  # the positions of the drugs
    return inputs + expression + genes + drugs


def _decoders_per_token(config: TahoeX1Config, precision: Precision) -> float:
    """Return the bytes per token that final norm, decoders and losses keep; the backward pass frees them first."""
    d, w, p = config.hidden_size, precision.product, precision.weights
    copy = w * d if precision.autocast else 0
    norm = precision.stream * d + _NORM_STATISTICS if config.norm_position == "pre" else 0
    mean = 0 if config.cell_pooling == "cls" else 4 * d
    decoder = (copy or p * d) + config.expression_decoder_layers * (
        1 + _argument(config.expression_decoder_act)
    ) * w * d
    # Queries, and the cells' vectors gathered for every token.
    cell_decoder = (copy or p * d) + (2 + _argument(config.cell_decoder_act)) * w * d
    losses = 2 * 4
    return norm + mean + decoder + cell_decoder + losses


def _argument(act: Activation) -> int:
    """Return 1 if the derivative needs an activation's argument, and 0 if its result is enough."""
    return 0 if act in _KEEPS_RESULT else 1


def working_per_token(
    config: TahoeX1Config, precision: Precision, length: int, *, checkpointing: bool = False
) -> float:
    """Return the bytes per token that the backward pass takes and gives back, at its peak.

    These are gradients of the feed-forward block (two of its width, two of the residual stream), and with
    checkpointing the layer that is computed again. Arguments are those of `kept_per_token`.
    """
    d, f = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    gradients = 2 * f * precision.product + 2 * d * precision.stream
    return gradients + (layer_per_token(config, precision, length) if checkpointing else 0)


@dataclass(frozen=True)
class States:
    """Bytes on each device that do not depend on the cells of a microbatch.

    Args:
        weights: Weights in float32, whole or this device's shard.
        gradients: Gradients in float32, whole or this device's shard.
        moments: The two moments of AdamW in float32.
        copies: Bytes held twice. On one device: bfloat16 copies of matrices under autocast, and with several
            microbatches the table's new gradient beside the old one. With DDP also buckets as large as the
            gradients. With FSDP2: gathered weights in bfloat16; a unit's gradients in bfloat16, in float32 for the
            exchange, and with several microbatches their earlier sum; the root's gradients in bfloat16.
    """

    weights: float
    gradients: float
    moments: float
    copies: float

    @property
    def total(self) -> float:
        """Sum of all bytes."""
        return self.weights + self.gradients + self.moments + self.copies


def states(
    config: TahoeX1Config, precision: Precision, strategy: Strategy, shards: int = 1, *, accumulate: bool = False
) -> States:
    """Return the bytes on each device for weights, gradients and optimizer.

    Args:
        config: Configuration of the model.
        precision: Types of the computation.
        strategy: `"one"` device, `"ddp"`, `"fsdp2"` over all devices, or `"hsdp"`: FSDP2 within each machine, whole
            copies between machines.
        shards: Number of devices that share one copy of the weights: all (fsdp2), those of a machine (hsdp), else 1.
        accumulate: Whether a step has several microbatches.

    Raises:
        ValueError: If the strategy keeps whole weights on each device and `shards` is not 1.
    """
    if shards < 1 or (strategy in ("one", "ddp") and shards != 1):
        raise ValueError(f"shards={shards}: {strategy} keeps whole weights on each device, pass 1.")
    p = count_parameters(config)
    copies = 2.0 * p.matrices if precision.autocast else 0.0
    if strategy == "ddp":
        copies += 4.0 * p.total  # Accelerate leaves gradient_as_bucket_view off
    elif strategy in ("fsdp2", "hsdp"):
        unit = max(p.layer, p.table)
        # The unit that computes and the next one; the root, whose gradients are reduced last.
        copies = precision.weights * (2.0 * unit + p.rest) + precision.weights * (unit + p.rest) + 4 * unit
        copies += 4 * unit / shards if accumulate else 0
    if accumulate and strategy in ("one", "ddp"):
        copies += precision.weights * p.table
    return States(4 * p.total / shards, 4 * p.total / shards, _ADAMW_MOMENTS * p.total / shards, copies)


def microbatch_bytes(
    config: TahoeX1Config, precision: Precision, length: int, cells: int, *, checkpointing: bool = False
) -> float:
    """Return the bytes that a pass over `cells` cells of `length` tokens needs beside `states`."""
    kept = kept_per_token(config, precision, length, checkpointing=checkpointing)
    return cells * length * (kept + working_per_token(config, precision, length, checkpointing=checkpointing))


def peak_bytes(
    config: TahoeX1Config, precision: Precision, tokens: int, length: int, *, checkpointing: bool = False
) -> float:
    """Return the most bytes that a step of one pass on one device takes.

    In the backward pass gradients of weights appear while what was kept disappears, that of decoders and losses first.

    Args:
        config: Configuration of the model.
        precision: Types of the computation.
        tokens: Tokens of all cells.
        length: Number of tokens of a cell.
        checkpointing: As in `kept_per_token`.
    """
    fixed = states(config, precision, "one")
    kept = kept_per_token(config, precision, length, checkpointing=checkpointing)
    freed = _decoders_per_token(config, precision)
    working = working_per_token(config, precision, length, checkpointing=checkpointing)
    passing = tokens * (kept + max(0.0, working - freed))
    return fixed.total - fixed.gradients + max(fixed.gradients, passing)
