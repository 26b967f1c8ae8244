# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The layout of a batch: padding, the cell of each token, what it sees, attention, and targets.

This file travels to the Hugging Face Hub beside the weights.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BatchEncoding
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import and_masks, create_bidirectional_mask, packed_sequence_mask_function
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested

from .configuration_tahoe_x1 import TahoeX1Config
from .observed_attention_tahoe_x1 import FlashCells, ObservedKeys, flash_serves

# What a forward may be given beyond its own arguments; anything else is a misspelt name.
_FORWARD_KWARGS = frozenset(TransformersKwargs.__annotations__) | {
    "inputs_embeds", "num_targets", "return_dict", "use_cache",
}  # fmt: skip
# Below, what is saved is less than what gathering the observed keys costs (benchmarks/attention.py).
SHORTEST_WITH_OBSERVED_KEYS = 256


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
        token_cells = torch.searchsorted(boundaries[1:].contiguous(), positions, right=True)
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
    input_ids: torch.Tensor,
    expression_values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    target_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Raise ValueError for arguments of `TahoeX1Model.forward` that do not exist, or are of a wrong shape or type."""
    unknown = sorted(set(kwargs) - _FORWARD_KWARGS)
    if unknown:
        raise ValueError(f"TahoeX1Model.forward has no argument {', '.join(unknown)}.")
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported: pass input_ids and expression_values.")
    check_shape(input_ids, expression_values=expression_values, attention_mask=attention_mask, target_mask=target_mask)
    if target_mask is not None and target_mask.dtype != torch.bool:
        raise ValueError(f"target_mask must be bool, got {target_mask.dtype}: use target_mask.bool().")


def lay_out_cells(
    config: TahoeX1Config,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    drug_ids: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[CellLayout, torch.Tensor | None]:
    """Find the cells and the tokens of a batch.

    Args:
        config: the model's configuration.
        input_ids: `(batch, length)` int64.
        attention_mask: `(batch, length)`, nonzero at tokens; None for all that is not the padding token.
        drug_ids: `(cells,)` int64, whose number is checked.
        kwargs: the further arguments of the model, among them, for a packed row, `cu_seq_lens_q`.

    Returns:
        The layout of the cells, and where tokens are: `(batch, length)` bool, or None for everywhere.

    Raises:
        ValueError: for arguments that do not go together, or do not fit the model.
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
        if attention_mask is not None:
            valid = attention_mask.bool()
        elif config.pad_token_id is not None:
            valid = input_ids != config.pad_token_id
    if drug_ids is not None and config.num_drugs == 0:
        raise ValueError("drug_ids was given, but this model has no drug encoder (config.num_drugs is 0).")
    if drug_ids is not None and drug_ids.shape != (layout.num_cells,):
        raise ValueError(f"drug_ids has shape {tuple(drug_ids.shape)}, expected ({layout.num_cells},).")
    return layout, valid


def equal_runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Group neighbouring cells of equal length: (how many, length)."""
    return [(len(list(group)), length) for length, group in itertools.groupby(lengths)]


@dataclass(frozen=True, eq=False)
class PackedAttention:
    """Attention within each cell of a packed row, in torch alone: no work between cells, and none on padding.

    On CUDA in half precision all cells go through one call of torch's flash attention, in float32 through one on a
    jagged tensor, unless there is a mask. Otherwise there is one call for each run of neighbouring cells of equal
    length: on two CPU cores 1.3 to 1.7 times as fast as padded buckets of eight cells of similar length, at 20 to
    2,048 tokens a cell (benchmarks/attention.py). Where tokens see observed ones and themselves, long cells, and all
    that go through flash attention, attend to their observed tokens alone. (On an H100, 64 cells of 1,024 took as long
    under dense masks, 2.9 ms forward and backward, with more memory; short ones took less, 256 of 256 1.6 instead of
    2.3 ms.)
    """

    boundaries: torch.Tensor  # (cells + 1,) int64
    runs: list[tuple[int, int]] | None  # neighbouring cells of equal length; None where one call takes all
    longest: int | None = None
    # Per run, what each token sees: `(cells, 1, length, length)` bool, or where the keys are.
    seen: list[torch.Tensor | ObservedKeys] | None = None
    observed: torch.Tensor | None = None  # (1, length) bool
    flash: FlashCells | None = None

    @classmethod
    def make(
        cls,
        boundaries: torch.Tensor,
        longest: int | None,
        observed: torch.Tensor | None,
        device: torch.device,
        *,
        flash: bool = False,
        num_targets: int | None = None,
    ) -> "PackedAttention":
        """Prepare what all layers share.

        Args:
            boundaries: `(cells + 1,)` int64, from 0 to the length of the row.
            longest: length of the longest cell, where it is known: asking a GPU for it takes time.
            observed: `(1, length)` bool: a token sees the observed tokens of its cell and itself; None for all.
            device: the device that attends.
            flash: whether queries, keys and values are such that `flash_serves`.
            num_targets: number of tokens that are not observed, where it is known, as for `longest`.
        """
        boundaries = boundaries.to(device)
        observed = None if observed is None else observed.to(device)
        on_cuda = device.type == "cuda"
        if (flash or on_cuda) and longest is None:
            longest = int(boundaries.diff().max())
        if flash and longest is not None:
            cells = FlashCells.make(boundaries, longest, None if observed is None else observed[0], num_targets)
            return cls(boundaries, None, longest, observed=observed, flash=cells)
        if observed is None and on_cuda:
            return cls(boundaries, None, longest)
        runs = equal_runs(boundaries.diff().tolist())
        if observed is None:
            return cls(boundaries, runs)
        parts = observed[0].split([cells * length for cells, length in runs])
        seen = [_observed_or_self(part, *run) for part, run in zip(parts, runs, strict=True)]
        return cls(boundaries, runs, longest, seen, observed)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, None]:
        """Attend: `(1, heads, length, width)`, of keys and values perhaps fewer, to `(1, length, heads, width)`."""
        if self.flash is not None:
            return self._by_flash(query, key, value, scaling), None
        if self.runs is None:
            return self._jagged(query, key, value, scaling), None
        grouped = query.shape[1] != key.shape[1]
        sizes = [cells * length for cells, length in self.runs]
        # Not slices: the gradient of a slice is as large as the whole.
        parts = zip(*(tensor[0].split(sizes, dim=1) for tensor in (query, key, value)), strict=True)
        outputs = []
        for number, ((cells, _), (q, k, v)) in enumerate(zip(self.runs, parts, strict=True)):
            seen = None if self.seen is None else self.seen[number]
            if isinstance(seen, ObservedKeys):
                k, v = (
                    tensor.repeat_interleave(q.shape[0] // k.shape[0], dim=0) if grouped else tensor
                    for tensor in (k, v)
                )
                outputs.append(seen.attend(q, k, v, scaling).transpose(0, 1))
                continue
            q, k, v = (tensor.unflatten(1, (cells, -1)).transpose(0, 1) for tensor in (q, k, v))
            attended = scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=grouped)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).unsqueeze(0), None

    def _by_flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        if self.flash is None or not flash_serves(query.device, query.dtype, query.shape[-1]):
            # A layer gives another type than the rest do.
            others = PackedAttention.make(self.boundaries, self.longest, self.observed, query.device)
            return others(query, key, value, scaling)[0]
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        if self.observed is not None and q.shape[1] != k.shape[1]:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        return self.flash.attend(q, k, v, scaling).unsqueeze(0)

    def _jagged(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                tensor[0].transpose(0, 1).contiguous(), self.boundaries, min_seqlen=1, max_seqlen=self.longest
            ).transpose(1, 2)
            for tensor in (query, *(tensor.repeat_interleave(groups, dim=1) for tensor in (key, value)))
        )
        return scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).values().unsqueeze(0)


def _observed_or_self(observed: torch.Tensor, cells: int, length: int) -> torch.Tensor | ObservedKeys:
    """Describe what the tokens of a run see: the observed ones, `(cells * length,)` bool, and themselves."""
    if length >= SHORTEST_WITH_OBSERVED_KEYS:
        keys = ObservedKeys.make([length] * cells, observed)
        if keys is not None:
            return keys
    return observed.view(cells, 1, 1, length) | torch.eye(length, dtype=torch.bool, device=observed.device)


def observed_or_self(observed: torch.Tensor) -> Callable:
    """Make the mask rule of the 70M and 1.3B models' training: a token sees the observed tokens and itself.

    Args:
        observed (`torch.BoolTensor` of shape `(batch, length)`): where the expression is given, not to be predicted.
    """

    def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return observed[batch_idx, kv_idx] | (q_idx == kv_idx)

    return inner_mask


def multiplied_as(states: torch.Tensor) -> torch.dtype:
    """Return the type in which linear layers multiply `states`: autocast's, where it is on."""
    kind = states.device.type
    automatic = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if automatic else states.dtype


def make_attention_mask(
    config: TahoeX1Config,
    hidden_states: torch.Tensor,
    valid: torch.Tensor | None,
    target_mask: torch.Tensor | None,
    layout: CellLayout,
    longest: int | None,
) -> Any:
    """Return the mask in the form that the configured attention backend reads.

    Args:
        config: the model's configuration.
        hidden_states: `(batch, length, hidden_size)`, of which the type and the device are read.
        valid: `(batch, length)` bool, where tokens are; None for everywhere.
        target_mask: `(batch, length)` bool, where the expression is hidden.
        layout: the layout of the cells.
        longest: the length of the longest cell of a packed row, where it is known.

    Raises:
        ValueError: for a mask that the backend cannot apply.
    """
    is_flash = is_flash_attention_requested(config)
    observed = None
    if config.attention_mask_style == "observed_or_self" and target_mask is not None:
        observed = ~target_mask
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
    if layout.boundaries is not None and by_cell:
        return PackedAttention.make(
            layout.boundaries, longest, observed, device, flash=flash, num_targets=layout.num_targets
        )
    rules = [] if observed is None else [observed_or_self(observed)]
    if layout.token_cells is not None and not is_flash:  # flash attention reads cu_seq_lens itself
        rules.append(packed_sequence_mask_function(layout.token_cells))
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=valid,
        and_mask_function=and_masks(*rules) if rules else None,
    )


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in plain torch, the only backend that returns its weights: `(B, H, S, D)` to `(B, S, H, D)`."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    at_least_float32 = torch.promote_types(query.dtype, torch.float32)
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=at_least_float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    return torch.matmul(attn_weights, value).transpose(1, 2).contiguous(), attn_weights


def masked_mse(
    predictions: torch.Tensor, labels: torch.Tensor, target_mask: torch.Tensor, num_targets: torch.Tensor | float
) -> torch.Tensor:
    """Sum squared errors over the targets in float32, divided by `num_targets`. All inputs: `(batch, length)`."""
    predictions = predictions.float()
    # Both sides are zeroed before the difference: a label that is no target may be anything, NaN included.
    zero = predictions.new_zeros(())
    difference = torch.where(target_mask, predictions, zero) - torch.where(target_mask, labels.float(), zero)
    return difference.square().sum() / num_targets


@dataclass
class EncodedCells:
    """Tokenized cells without padding; cell `i` is `[offsets[i]:offsets[i + 1]]` of the flat arrays.

    Attributes:
        input_ids: `(total,)` int64 token ids, special tokens included.
        expression_values: `(total,)` float32 bins, log1p values or counts; `pad_value` at special tokens.
        offsets: `(num_cells + 1,)` int64.
        drug_ids: `(num_cells,)` int64, 0 for no drug; None where no drugs were given.
        cell_numbers: `(num_cells,)` int64 number of every cell in its data set.
        empty_cells: rows (0 to num_cells - 1) of the cells in which no known gene is expressed.
    """

    input_ids: np.ndarray
    expression_values: np.ndarray
    offsets: np.ndarray
    drug_ids: np.ndarray | None
    cell_numbers: np.ndarray
    empty_cells: np.ndarray

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """`(num_cells,)` int64 tokens per cell, special tokens included."""
        return np.diff(self.offsets)

    def as_lists(self) -> dict[str, list[Any]]:
        """Return a list per cell of `input_ids`, `expression_values` and `attention_mask`; and `drug_ids`, if any."""
        cuts = self.offsets[1:-1]
        parts = {"input_ids": self.input_ids, "expression_values": self.expression_values}
        lists = {name: [part.tolist() for part in np.split(flat, cuts)] for name, flat in parts.items()}
        lists["attention_mask"] = [[1] * int(length) for length in self.lengths]
        if not self.num_cells:
            lists = {name: [] for name in lists}
        return lists if self.drug_ids is None else {**lists, "drug_ids": self.drug_ids.tolist()}

    def padded(
        self,
        rows: Sequence[int] | np.ndarray | None = None,
        *,
        pad_token_id: int,
        pad_value: float,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Pad cells on the right to the longest of them.

        Args:
            rows: which cells, in which order; None takes all.
            pad_token_id: id put into the padding.
            pad_value: expression value put into the padding.
            pad_to_multiple_of: round the padded length up to a multiple of this.

        Returns:
            `input_ids`, `attention_mask` (int64) and `expression_values` (float32), each `(cells, length)`; `drug_ids`
            `(cells,)` where the cells have them.
        """
        chosen = np.arange(self.num_cells) if rows is None else np.asarray(rows, dtype=np.int64)
        fills = {
            "input_ids": (self.input_ids, pad_token_id),
            "expression_values": (self.expression_values, np.float32(pad_value)),
            "attention_mask": (np.ones(len(self.input_ids), dtype=np.int64), 0),
        }
        length = padded_length(self.lengths[chosen], pad_to_multiple_of)
        batch = pad_ragged(fills, self.offsets, chosen, length)
        if self.drug_ids is not None:
            batch["drug_ids"] = torch.from_numpy(self.drug_ids[chosen])
        return batch


def concatenate_cells(parts: Sequence[EncodedCells]) -> EncodedCells:
    """Put tokenized cells behind each other."""
    cells = np.cumsum([0, *(part.num_cells for part in parts)])
    drug_ids = [part.drug_ids for part in parts if part.drug_ids is not None]
    return EncodedCells(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        expression_values=np.concatenate([part.expression_values for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
        drug_ids=np.concatenate(drug_ids) if drug_ids else None,
        cell_numbers=np.concatenate([part.cell_numbers for part in parts]),
        empty_cells=np.concatenate([part.empty_cells + n for part, n in zip(parts, cells[:-1], strict=True)]),
    )


def padded_length(lengths: np.ndarray, multiple: int | None) -> int:
    """Return the longest length, rounded up to a multiple."""
    longest = int(lengths.max(initial=0))
    if multiple is None:
        return longest
    if multiple < 1:
        raise ValueError(f"pad_to_multiple_of={multiple}: pass a positive number or None.")
    return -(-longest // multiple) * multiple


def pad_ragged(
    fills: Mapping[str, tuple[np.ndarray, Any]], offsets: np.ndarray, rows: np.ndarray, length: int
) -> dict[str, torch.Tensor]:
    """Gather `{name: (flat array, fill)}` into `(rows, length)` tensors with one index for all."""
    steps = np.arange(length)
    inside = steps[None, :] < np.diff(offsets)[rows][:, None]
    index = (offsets[:-1][rows][:, None] + steps[None, :])[inside]
    batch = {}
    for name, (flat, fill) in fills.items():
        padded = np.full(inside.shape, fill, dtype=flat.dtype)
        padded[inside] = flat[index]
        batch[name] = torch.from_numpy(padded)
    return batch


def pad_features(
    features: Any, fills: Mapping[str, Any], max_length: int | None = None, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """Pad tokenized cells that came back one by one, as a data loader gives them.

    Args:
        features: a list of mappings, one per cell, or one mapping with a list per cell.
        fills: what to pad each entry of varying length with, `attention_mask` excepted, which is padded with 0.
        max_length: padded length; by default that of the longest cell.
        multiple: round the padded length up to a multiple of this.

    Returns:
        The padded entries `(cells, length)`, and the others, with one number per cell, `(cells,)`.

    Raises:
        ValueError: for features without an entry of `fills`, and for a cell longer than `max_length`.
    """
    is_mapping = isinstance(features, Mapping)
    columns = dict(features) if is_mapping else {name: [cell[name] for cell in features] for name in features[0]}
    missing = [name for name in fills if name not in columns]
    if missing:
        raise ValueError(f"encoded_inputs lacks {missing}: pass what the tokenizer returned for each cell.")
    lengths = np.array([len(ids) for ids in columns["input_ids"]], dtype=np.int64)
    length = padded_length(lengths if max_length is None else np.array([max_length]), multiple)
    if lengths.max(initial=0) > length:
        raise ValueError(f"max_length={max_length} is shorter than a cell of {lengths.max()} tokens.")
    columns.setdefault("attention_mask", [np.ones(n) for n in lengths])
    dtypes = {"input_ids": np.int64, "expression_values": np.float32, "attention_mask": np.int64}
    ragged = {
        name: (np.concatenate([np.asarray(row, dtype=dtypes[name]) for row in columns.pop(name)]), fill)
        for name, fill in {**fills, "attention_mask": 0}.items()
    }
    batch = pad_ragged(ragged, np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths)), length)
    batch.update({name: torch.as_tensor(np.asarray(column)) for name, column in columns.items()})
    return batch


def as_batch(batch: Mapping[str, torch.Tensor], return_tensors: str | None) -> BatchEncoding:
    """Return a padded batch in the form that `return_tensors` names: "pt", "np" or None for lists."""
    if return_tensors not in (None, "pt", "np"):
        raise ValueError(f'return_tensors={return_tensors!r}: pass "pt", "np" or None.')
    if return_tensors == "pt":
        return BatchEncoding(dict(batch))
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    return BatchEncoding(arrays if return_tensors else {name: array.tolist() for name, array in arrays.items()})
