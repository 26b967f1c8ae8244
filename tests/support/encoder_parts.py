"""As much of a tokenizer, cells and compiled attention as an encoder needs; what prepared layers give and hold."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from helpers import make_batch
from torch.nn.functional import scaled_dot_product_attention

from tahoex1_hf import TahoeX1Config, TahoeX1Model
from tahoex1_hf.inference.compiled_attention import CompiledAttention
from tahoex1_hf.inference.prepared_layers import Product
from tahoex1_hf.inference.ragged import ragged_forward
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


class Tokens(list):
    """As much of a tokenizer as an encoder asks for."""

    pad_token_id, pad_value = 0, -2.0

    def __init__(self, size: int) -> None:
        super().__init__(range(size))


def encoded(config: TahoeX1Config, lengths: Sequence[int]) -> EncodedCells:
    """Return cells of these numbers of tokens."""
    batch = make_batch(config, lengths, targets=False)
    valid = batch["attention_mask"].bool().numpy()
    drugs = batch["drug_ids"].numpy() if "drug_ids" in batch else None
    return EncodedCells(
        batch["input_ids"].numpy()[valid], batch["expression_values"].numpy()[valid],
        np.concatenate([[0], np.cumsum(lengths)]), drugs, np.arange(len(lengths)), np.zeros(0, int),
    )  # fmt: skip


def dense(product: Product) -> torch.Tensor:
    """Return the weight of a product as a usual tensor."""
    return product.weight.to_dense() if product.packed else product.weight


def embedded(model: TahoeX1Model, lengths: Sequence[int], all_tokens: bool, layers: Any) -> list[torch.Tensor]:
    """Return what cells of these numbers of tokens give, by prepared layers, or by the model's own for None."""
    batch = make_batch(model.config, lengths, targets=False)
    valid = batch["attention_mask"].bool()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    outputs = ragged_forward(
        model, batch["input_ids"][valid], batch["expression_values"][valid], offsets, batch.get("drug_ids"),
        all_tokens, layers,
    )  # fmt: skip
    return [output for output in outputs if output is not None]


def by_torch(states: torch.Tensor, lengths: Sequence[int], heads: int, key_heads: int, scaling: float) -> torch.Tensor:
    """Attend in float64, cell by cell: `(tokens, (heads + 2 * key_heads) * width)` to `(tokens, heads * width)`."""
    cells = []
    for cell in states.double().split(list(lengths)):
        parts = cell.unflatten(1, (heads + 2 * key_heads, -1)).transpose(0, 1).unsqueeze(0)
        query, key, value = parts.split([heads, key_heads, key_heads], dim=1)
        attended = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=heads != key_heads)
        cells.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(cells)


class Plain(CompiledAttention):
    """Stands for compiled attention on any CPU, and for any width; it counts its calls."""

    calls = 0

    def __call__(
        self,
        projected: torch.Tensor,
        boundaries: torch.Tensor,
        heads: int,
        key_heads: int,
        scaling: float,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        Plain.calls += 1
        states = projected if bias is None else projected + bias
        attended = by_torch(states, boundaries.diff().tolist(), heads, key_heads, scaling).to(projected.dtype)
        return attended if out is None else out.copy_(attended)


def plain(dtype: torch.dtype) -> Plain:
    """Return the stand-in, as `compiled_attention` returns the program."""
    return Plain(ctypes.CDLL(None), dtype)
