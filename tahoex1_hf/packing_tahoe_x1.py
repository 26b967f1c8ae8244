# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The layout of a batch: padding, the cell of each token, what it sees, attention, targets, and outputs.

This file travels to the Hugging Face Hub beside the weights.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.masking_utils import and_masks, create_bidirectional_mask, packed_sequence_mask_function
from transformers.modeling_outputs import ModelOutput
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import is_flash_attention_requested

from .configuration_tahoe_x1 import TahoeX1Config
from .observed_attention_tahoe_x1 import EagerAttention, PackedAttention, flash_serves

logger = logging.get_logger(__name__)

# Further arguments that a forward pass accepts; any other name is taken for a misspelling.
_FORWARD_KWARGS = frozenset(TransformersKwargs.__annotations__) | {
    "inputs_embeds", "num_targets", "past_key_values", "return_dict", "use_cache",
}  # fmt: skip
# Largest value of a float mask at a token that is not seen. It must fit into float16, whose lowest number is -65504.
_NEVER = -1e4
# Further arguments of a forward pass that neither the layers nor attention read.
UNREAD_BY_LAYERS = ("inputs_embeds", "num_targets", "past_key_values", "output_attentions")


@dataclass
class TahoeX1ModelOutput(ModelOutput):
    """Output of `TahoeX1Model`. `cells` equals `batch` unless several cells are packed into a row."""

    last_hidden_state: torch.Tensor | None = None  # (batch, length, hidden_size): contextual embeddings
    pooler_output: torch.Tensor | None = None  # (cells, hidden_size): cell embeddings, not normalised
    hidden_states: tuple[torch.Tensor, ...] | None = None  # the first layer's input, then every layer's output
    attentions: tuple[torch.Tensor, ...] | None = None  # (batch, heads, length, length) a layer; eager only
    gene_embeddings: torch.Tensor | None = None  # (batch, length, hidden_size): the genes without context


@dataclass
class TahoeX1ForPreTrainingOutput(ModelOutput):
    """Output of `TahoeX1ForPreTraining`; the losses, of shape (), are there when labels are given."""

    loss: torch.Tensor | None = None  # mean of the two parts below
    expression_loss: torch.Tensor | None = None  # mean squared error of expression_predictions at the targets
    cell_expression_loss: torch.Tensor | None = None  # and of cell_expression_predictions
    expression_predictions: torch.Tensor | None = None  # (batch, length): from each token's embedding
    cell_expression_predictions: torch.Tensor | None = None  # (batch, length): from cell embedding and gene
    pooler_output: torch.Tensor | None = None  # (cells, hidden_size): cell embeddings, not normalised
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class CellLayout:
    """Which cell each token belongs to. Padded rows hold one cell each (`token_cells` is None), a packed row all."""

    num_cells: int
    token_cells: torch.Tensor | None = None  # (1, length) int64: cell of each token
    boundaries: torch.Tensor | None = None  # (num_cells + 1,) int64: index of each <cls> in the row, and its length
    num_targets: int | None = None  # in a packed row, where it is known without asking the device

    @classmethod
    def packed(cls, cu_seq_lens: torch.Tensor, shape: torch.Size, num_targets: int | None = None) -> "CellLayout":
        """Lay out one row of cells back to back, given their boundaries `(cells + 1,)`, from 0 to the length."""
        if shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q packs all cells into one row, but input_ids has {shape[0]} rows.")
        boundaries = cu_seq_lens.long()
        positions = torch.arange(shape[1], device=boundaries.device)
        # Not in `boundaries[1:]`: on CUDA, torch 2.11's compiler searches a slice from the beginning of the whole.
        token_cells = torch.searchsorted(boundaries, positions, right=True) - 1
        return cls(boundaries.shape[0] - 1, token_cells.unsqueeze(0), boundaries, num_targets)

    def per_token(self, cell_vectors: torch.Tensor) -> torch.Tensor:
        """Give each token its cell's vector: `(cells, width)` to `(batch, length or 1, width)`."""
        if self.token_cells is None:
            return cell_vectors.unsqueeze(1)
        # Not cell_vectors[token_cells]: where two threads meet in a cell, its gradient is added up in a random order.
        return cell_vectors.index_select(0, self.token_cells[0].to(cell_vectors.device)).unsqueeze(0)

    def pool(self, hidden_states: torch.Tensor, valid: torch.Tensor | None, pooling: str) -> torch.Tensor:
        """Return cell embeddings, `(cells, width)`, given `config.cell_pooling` and where tokens are."""
        if pooling == "cls":
            return self.first(hidden_states)
        return self.mean(hidden_states, valid if pooling == "mean" else None)

    def first(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Take each cell's first token: `(batch, length, width)` to `(cells, width)`."""
        if self.boundaries is None:
            return hidden_states[:, 0].clone()  # a view would keep all tokens
        return hidden_states.flatten(0, 1).index_select(0, self.boundaries[:-1].to(hidden_states.device))

    def mean(self, hidden_states: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Average each cell's valid tokens, in float32: `(batch, length, width)` to `(cells, width)`."""
        values = hidden_states.flatten(0, 1).float()
        cells = self.token_cells
        if cells is None:
            cells = torch.arange(self.num_cells, device=values.device).unsqueeze(1).expand(hidden_states.shape[:2])
        cells = cells.flatten().to(values.device)
        weights = values.new_ones(len(values), 1) if valid is None else valid.flatten().unsqueeze(1).to(values)
        sums = values.new_zeros(self.num_cells, values.shape[1]).index_add(0, cells, values * weights)
        counts = values.new_zeros(self.num_cells, 1).index_add(0, cells, weights)
        return (sums / counts.clamp(min=1)).to(hidden_states.dtype)


def check_shape(input_ids: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError for the first of `tensors` that is not shaped like `input_ids`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, input_ids has {tuple(input_ids.shape)}.")


def check_arguments(
    config: TahoeX1Config,
    input_ids: torch.Tensor | None,
    expression_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    target_mask: torch.Tensor | None,
    drug_ids: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Raise ValueError for arguments of `TahoeX1Model.forward` that do not exist, or are wrong in shape or content."""
    unknown = sorted(set(kwargs) - _FORWARD_KWARGS)
    if unknown:
        raise ValueError(f"TahoeX1Model.forward has no argument {', '.join(unknown)}.")
    for name in ("inputs_embeds", "past_key_values"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is not supported: pass input_ids and expression_values. Prompt, prefix and p-tuning, which "
                "put vectors in front of the tokens, do not work with Tahoe-x1, since each token is a gene with its "
                "expression: use LoRA or another method that adapts layers."
            )
    if input_ids is None or expression_values is None:
        raise ValueError("input_ids and expression_values are both needed: pass what the tokenizer returned.")
    check_shape(input_ids, expression_values=expression_values, target_mask=target_mask)
    if attention_mask is not None and attention_mask.dim() == 4:
        _check_full_mask(attention_mask, (input_ids.shape[0], 1, input_ids.shape[1], input_ids.shape[1]))
    else:
        check_shape(input_ids, attention_mask=attention_mask)
    if target_mask is not None and target_mask.dtype != torch.bool:
        raise ValueError(f"target_mask must be bool, got {target_mask.dtype}: use target_mask.bool().")
    if torch.compiler.is_compiling():  # a graph cannot raise
        return
    _check_ids("input_ids", input_ids, config.vocab_size, "config.vocab_size")
    if drug_ids is not None and config.num_drugs:
        _check_ids("drug_ids", drug_ids, config.num_drugs, "config.num_drugs")
    stated = kwargs.get("num_targets")
    if stated is not None and target_mask is not None:
        _check(target_mask.sum() == stated, lambda: f"num_targets={stated} is not the number of targets.")
    if attention_mask is not None and attention_mask.dim() == 2:
        _refuse_left_padding("attention_mask", attention_mask.bool())
    elif kwargs.get("cu_seq_lens_q") is None and config.pad_token_id is not None:
        _refuse_left_padding("input_ids", input_ids != config.pad_token_id)


def _check(good: torch.Tensor, problem: Callable[[], str]) -> None:
    """Raise ValueError if a tensor of shape () is false; on CUDA the device stops instead, and nothing waits for it.

    Tensors without content (fake ones, or those on the device "meta") are not checked.
    """
    if good.device.type == "cuda" and type(good) is torch.Tensor:
        torch._assert_async(good, problem())
    elif good.device.type == "cpu" and type(good) is torch.Tensor and not good:
        raise ValueError(problem())


def _check_ids(name: str, ids: torch.Tensor, number: int, option: str) -> None:
    if ids.numel():
        _check(
            ((ids >= 0) & (ids < number)).all(),
            lambda: (
                f"{name} holds numbers outside 0 to {number - 1} ({option} is {number}): are they those of another "
                "model's tokenizer?"
            ),
        )


def _refuse_left_padding(name: str, tokens: torch.Tensor) -> None:
    if tokens.numel():
        _check(
            (tokens[:, 0] | ~tokens.any(dim=1)).all(),
            lambda: (
                f"{name} pads on the left: a cell's <cls> stands first in its row, and padding last "
                '(padding_side="right").'
            ),
        )


def _check_full_mask(mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a mask of queries and keys that has another shape, or weights of its own."""
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {shape} (cells, 1, queries, keys), or one entry "
            "for each token."
        )
    if mask.is_floating_point() and not torch.compiler.is_compiling():
        _check(
            ((mask == 0) | (mask <= _NEVER)).all(),
            lambda: (
                "attention_mask of floats is added to attention scores, and may hold 0, where a token is seen, and "
                f"numbers of at most {_NEVER:g}, where it is not. For ones and zeros use attention_mask.bool()."
            ),
        )


def seen_by_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return where a mask `(cells, 1, queries, keys)` lets a query see a key: where it is nonzero, or a float 0."""
    return (mask == 0 if mask.is_floating_point() else mask.bool())[:, 0]


def lay_out_cells(
    config: TahoeX1Config,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    drug_ids: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[CellLayout, torch.Tensor | None]:
    """Find the cells and the tokens of a batch.

    Args:
        config: The model's configuration.
        input_ids: `(batch, length)` int64.
        attention_mask: `(batch, length)`, nonzero at tokens; None, or a mask of queries and keys, for all that is
            not the padding token.
        drug_ids: `(cells,)` int64, whose number is checked.
        kwargs: The further arguments of the model, among them, for a packed row, `cu_seq_lens_q`.

    Returns:
        The layout of the cells, and where tokens are: `(batch, length)` bool, or None for everywhere.

    Raises:
        ValueError: For arguments that do not go together, or do not fit the model.
    """
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    if cu_seq_lens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask does not go with cu_seq_lens_q: a packed row has no padding.")
        if config.cell_pooling == "mean_with_padding":
            raise ValueError(
                'cell_pooling="mean_with_padding" counts padding, which packed rows lack: set '
                'config.cell_pooling = "mean", or pass padded rows.'
            )
        if is_flash_attention_requested(config):
            missing = {"cu_seq_lens_k", "max_length_q", "max_length_k"} - {
                k for k, v in kwargs.items() if v is not None
            }
            if missing:  # transformers would then attend across the whole row
                raise ValueError(f"Flash attention on packed rows needs {', '.join(sorted(missing))} too.")
        layout, valid = CellLayout.packed(cu_seq_lens, input_ids.shape, kwargs.get("num_targets")), None
    else:
        layout, valid = CellLayout(input_ids.shape[0]), None
        if attention_mask is not None and attention_mask.dim() == 2:
            valid = attention_mask.bool()
        elif config.pad_token_id is not None:
            valid = input_ids != config.pad_token_id
    if drug_ids is not None and config.num_drugs == 0:
        raise ValueError("drug_ids was given, but this model has no drug encoder (config.num_drugs is 0).")
    if drug_ids is not None and drug_ids.shape != (layout.num_cells,):
        raise ValueError(f"drug_ids has shape {tuple(drug_ids.shape)}, expected ({layout.num_cells},).")
    return layout, valid


def observed_or_self(observed: torch.Tensor) -> Callable:
    """Make the mask rule of the 70M and 1.3B models' training: a token sees the observed tokens and itself.

    Args:
        observed (`torch.BoolTensor` of shape `(batch, length)`): where the expression is given, not to be predicted.
    """

    def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return observed[batch_idx, kv_idx] | (q_idx == kv_idx)

    return inner_mask


def seen_rule(seen: torch.Tensor) -> Callable:
    """Make the mask rule of a mask that was given for queries and keys: `(batch, queries, keys)` bool."""

    def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return seen[batch_idx, q_idx, kv_idx]

    return inner_mask


def multiplied_as(states: torch.Tensor, otherwise: torch.dtype | None = None) -> torch.dtype:
    """Return the type in which linear layers multiply `states`: autocast's, where it is on, else theirs or another."""
    kind = states.device.type
    automatic = kind != "meta" and torch.is_autocast_enabled(kind)  # which knows no autocast for "meta"
    return torch.get_autocast_dtype(kind) if automatic else otherwise or states.dtype


def linear_and_relu(linear: nn.Module, hidden_states: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return the positive part of what a linear layer gives, `(..., out_features)`.

    On CUDA, in half precision, it is part of the product. `torch.compile` makes it a pass of its own, and keeps where
    the numbers were positive: on an H100, the 70M trained 1.05 times as fast without that, with 12 % less memory.

    Args:
        linear: The layer, or what an adapter or a quantiser has put in its place.
        hidden_states: `(..., in_features)`.
        overwrite: Whether nothing else needs what the layer gives, which is then overwritten.
    """
    if _relu_serves(linear, hidden_states):
        dtype, shape = multiplied_as(hidden_states), hidden_states.shape[:-1]
        with torch.autocast(hidden_states.device.type, enabled=False):
            inputs = hidden_states.to(dtype).flatten(0, -2)
            output: torch.Tensor = _LinearRelu.apply(inputs, linear.weight.to(dtype), linear.bias.to(dtype))
            return output.unflatten(0, shape)
    up: torch.Tensor = linear(hidden_states)
    return torch.relu_(up) if overwrite else torch.relu(up)


def _relu_serves(linear: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Return whether a layer is its weight and bias, no more, and `_LinearRelu` multiplies in its precision."""
    if not hidden_states.is_cuda or type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        return False
    dtype = multiplied_as(hidden_states)
    automatic = torch.is_autocast_enabled(hidden_states.device.type)
    return (
        linear.bias is not None
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and linear.weight.device == hidden_states.device  # not where it waits on the CPU until it is needed
        and dtype in (torch.bfloat16, torch.float16)
        and (automatic or linear.weight.dtype == dtype)
    )


@torch.library.custom_op("tahoex1_hf::linear_relu", mutates_args=())
def _product_and_relu(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Call an operation of torch's that its compiler would take apart: `(tokens, in)` to `(tokens, out)`."""
    return torch._addmm_activation(bias, inputs, weight.t())


@_product_and_relu.register_fake
def _(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])


class _LinearRelu(torch.autograd.Function):
    """`relu(inputs @ weight.T + bias)`, which keeps its result and no mask; the derivative at 0 is 0, as torch's."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _product_and_relu(inputs, weight, bias)
        ctx.save_for_backward(inputs, weight, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, output = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        return (
            gradient @ weight if of_inputs else None,
            gradient.t() @ inputs if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


class TahoeX1HeadLinear(nn.Linear):
    """Linear layer that predicts. It stays in float32 in float16 models, and as it is in quantised ones."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Multiply in the precision of the layer, or of autocast: `(..., in_features)` to `(..., out_features)`."""
        return super().forward(hidden_states.to(multiplied_as(hidden_states, self.bias.dtype)))


def make_attention_mask(
    config: TahoeX1Config,
    hidden_states: torch.Tensor,
    valid: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    target_mask: torch.Tensor | None,
    layout: CellLayout,
    kwargs: dict[str, Any],
) -> Any:
    """Return the mask in the form that the configured attention backend reads.

    Args:
        config: The model's configuration.
        hidden_states: `(batch, length, hidden_size)`, of which the type and the device are read.
        valid: `(batch, length)` bool, where tokens are; None for everywhere.
        attention_mask: The mask that the model was given; read where it is one of queries and keys.
        target_mask: `(batch, length)` bool, where the expression is hidden.
        layout: The layout of the cells.
        kwargs: The further arguments of the model, among them `output_attentions` and `max_length_q`, the length of
            the longest cell of a packed row, where it is known.

    Raises:
        ValueError: For a mask that the backend cannot apply.
    """
    eager = _falls_back_to_eager(config, kwargs)
    seen = None if attention_mask is None or attention_mask.dim() == 2 else seen_by_mask(attention_mask)
    is_flash = is_flash_attention_requested(config) and not eager
    observed = None
    if config.attention_mask_style == "observed_or_self" and target_mask is not None:
        observed = ~target_mask
    if is_flash and seen is not None:
        raise ValueError(
            "attention_mask of four dimensions cannot run on flash attention, which would attend to all tokens. Load "
            'the model with attn_implementation="sdpa", "flex_attention" or "eager".'
        )
    if is_flash and observed is not None:
        raise ValueError(
            'attention_mask_style="observed_or_self" with target_mask cannot run on flash attention, which would '
            'attend to the targets. Load the model with attn_implementation="sdpa" (or "flex_attention" or '
            '"eager"), or leave target_mask out when nothing is to be predicted.'
        )
    device, dtype = hidden_states.device, multiplied_as(hidden_states)
    flash = flash_serves(device, dtype, config.hidden_size // config.num_attention_heads)
    # A compiled graph has no loop over lengths: without a kernel that needs none, cells are told apart there by a mask
    # as large as the row squared.
    by_cell = config._attn_implementation == "sdpa" and (flash or not torch.compiler.is_compiling())
    # Flash attention has no float32: evaluations in it attend without.
    by_cell = by_cell or (is_flash and device.type == "cuda" and dtype == torch.float32)
    if layout.boundaries is not None and by_cell and not eager:
        return PackedAttention.make(
            layout.boundaries,
            kwargs.get("max_length_q"),
            observed,
            device,
            flash=flash,
            num_targets=layout.num_targets,
        )
    rules = [] if observed is None else [observed_or_self(observed)]
    if seen is not None:
        rules.append(seen_rule(seen.to(device)))
    if layout.token_cells is not None and not is_flash:  # flash attention reads cu_seq_lens itself
        rules.append(packed_sequence_mask_function(layout.token_cells))
    if eager and config._attn_implementation != "eager":
        config = copy.copy(config)
        config._attn_implementation = "eager"
    mask: Any = create_bidirectional_mask(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=valid,
        and_mask_function=and_masks(*rules) if rules else None,
    )
    return EagerAttention(mask) if eager else mask


def _falls_back_to_eager(config: TahoeX1Config, kwargs: dict[str, Any]) -> bool:
    """Return whether attention weights were requested that the configured backend does not keep; warn if so."""
    wanted = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    if not wanted or config._attn_implementation == "eager":
        return False
    if not torch.compiler.is_compiling():
        logger.warning_once(
            f'output_attentions=True: attention "{config._attn_implementation}" keeps no weights, so such calls '
            'attend with "eager", which takes more memory and time. To choose this yourself, load the model with '
            'attn_implementation="eager".'
        )
    return True


def dummy_batch(vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return two cells of four tokens each."""
    input_ids = torch.tensor([[1, 7, 6, 3], [1, 4, 2, 5]], device=device) % vocab_size
    values = input_ids.to(torch.float32)
    return {"input_ids": input_ids, "expression_values": values, "attention_mask": torch.ones_like(input_ids)}


def refuse_to_generate(model: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise NotImplementedError for `model.generate`, since cells have no order of tokens."""
    raise NotImplementedError(
        "Tahoe-x1 embeds cells and predicts expression: there is no order of tokens to generate in. Call the model, "
        "or, for the expression of hidden genes, AutoModelForPreTraining's with target_mask."
    )


def masked_mse(
    predictions: torch.Tensor, labels: torch.Tensor, target_mask: torch.Tensor, num_targets: torch.Tensor | float
) -> torch.Tensor:
    """Sum squared errors over the targets in float32, divided by `num_targets`. All inputs: `(batch, length)`."""
    predictions, device = predictions.float(), predictions.device  # perhaps another one than the inputs'
    target_mask, labels = target_mask.to(device), labels.to(device)
    # Both sides are zeroed before the difference: a label that is no target may be anything, NaN included.
    zero = predictions.new_zeros(())
    difference = torch.where(target_mask, predictions, zero) - torch.where(target_mask, labels.float(), zero)
    return _shared_by(difference.square().sum(), num_targets)


def scaled_labels(config: TahoeX1Config, labels: torch.Tensor) -> torch.Tensor:
    """Return labels in the unit of the loss: with `scale_targets` bins `1..num_bins-1` become [-1, 1]."""
    return 2 * (labels.float() - 1) / (config.num_bins - 2) - 1 if config.scale_targets else labels


def every_gene_mse(
    model: Any, cell_embeddings: torch.Tensor, labels: torch.Tensor, number: torch.Tensor | int | None
) -> torch.Tensor:
    """Return the mean squared error with which a model's cell decoder predicts every gene from the cell embeddings.

    Args:
        model: A `TahoeX1ForPreTraining`.
        cell_embeddings: `(cells, hidden_size)`.
        labels: `(cells, tokens)` by token id, -100 at ids that are no gene's.
        number: Divisor of the sum of squares; by default the number of labels.
    """
    cells, tokens = len(cell_embeddings), model.config.vocab_size
    if labels.shape[0] != cells or not 0 < labels.shape[-1] <= tokens or labels.dim() != 2:
        raise ValueError(f"cell_labels has shape {tuple(labels.shape)}, for {cells} cells and {tokens} tokens.")
    genes = model.tahoe.embeddings.gene_encoder(torch.arange(labels.shape[1], device=cell_embeddings.device))
    predictions, known = model.cell_decoder(cell_embeddings, genes, None), labels != -100
    number = known.sum().clamp(min=1) if number is None else number
    return masked_mse(predictions, scaled_labels(model.config, labels), known, number)


def token_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor | None, num_items: torch.Tensor | int | None
) -> torch.Tensor:
    """Sum the cross-entropy of tokens that have a label and are not padding, divided by their number or `num_items`.

    Args:
        logits: `(batch, length, classes)`.
        labels: `(batch, length)` int64, -100 at tokens without one.
        valid: `(batch, length)` bool, where tokens are; None for everywhere.
        num_items: Divisor of the sum; by default the number of these tokens, or 1 if there are none.
    """
    labels = labels.to(logits.device)
    labels = labels if valid is None else labels.masked_fill(~valid.to(labels.device), -100)
    total = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return _shared_by(total, labels.ne(-100).sum().clamp(min=1) if num_items is None else num_items)


def _shared_by(total: torch.Tensor, number: torch.Tensor | float) -> torch.Tensor:
    """Divide a sum by a number, which may lie on another device."""
    return total / (number.to(total.device) if isinstance(number, torch.Tensor) else number)
