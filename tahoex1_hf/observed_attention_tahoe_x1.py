# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention in which a token sees the observed tokens of its cell and itself, without the scores of all other pairs.

This file travels to the Hugging Face Hub beside the weights: it imports only torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class ObservedKeys:
    """Where the keys are that the tokens of a packed row see."""

    observed: torch.Tensor  # (observed tokens,) int64: indices in the row
    targets: torch.Tensor  # (other tokens,) int64
    lengths: list[int]  # tokens of each cell
    num_observed: list[int]  # observed tokens of each cell

    @classmethod
    def make(cls, lengths: list[int], observed: torch.Tensor) -> "ObservedKeys | None":
        """Find the keys. None where `attend` cannot serve: not on a CPU, or with a cell without an observed token.

        Args:
            lengths: tokens of each cell.
            observed: `(length,)` bool.
        """
        num_observed = [int(part.sum()) for part in observed.split(lengths)] if observed.device.type == "cpu" else [0]
        if not all(num_observed):
            return None
        return cls(observed.nonzero().squeeze(1), (~observed).nonzero().squeeze(1), lengths, num_observed)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attend: `(heads, length, width)` each, to the like. Not twice differentiable."""
        return _ObservedOrSelf.apply(query, key, value, self, scaling)

    def by_cell(self, of_tokens: list[torch.Tensor], of_observed: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Cut `(heads, length, ...)` tensors at the cells, as batches of one."""
        parts = [tensor.unsqueeze(0).split(self.lengths, dim=2) for tensor in of_tokens]
        parts += [tensor.unsqueeze(0).split(self.num_observed, dim=2) for tensor in of_observed]
        for cell in zip(*parts, strict=True):
            yield list(cell)


class _ObservedOrSelf(torch.autograd.Function):
    """torch's fused attention of all tokens to the observed ones, joined with each target's attention to itself.

    With `m = logsumexp` of a token's scores of observed keys and `s` its score of itself, the softmax over both gives
    the first part the weight `exp(m - t)` and the second `exp(s - t)`, where `t = log(exp(m) + exp(s))`. The backward
    pass of the fused attention takes the sums of the whole instead of its own: `exp(score - t)` are then the weights
    of the whole softmax, and `output . gradient` what its gradient subtracts from each (Dao et al. 2022,
    FlashAttention, algorithm 4).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: ObservedKeys, scaling: float
    ) -> torch.Tensor:
        seen = [tensor.index_select(1, keys.observed) for tensor in (key, value)]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts = [attend(q, k, v, scale=scaling) for q, k, v in keys.by_cell([query], seen)]
        output, logsumexp = (torch.cat(part, dim=2)[0] for part in zip(*parts, strict=True))
        q, k, v, of_others = (_at_least_float32(tensor[:, keys.targets]) for tensor in (query, key, value, output))
        itself, others = (q * k).sum(-1) * scaling, logsumexp[:, keys.targets]
        both = torch.logaddexp(others, itself)
        weights = (itself - both).exp().unsqueeze(-1)
        output[:, keys.targets] = (of_others * (others - both).exp().unsqueeze(-1) + v * weights).to(output.dtype)
        logsumexp[:, keys.targets] = both
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.keys, ctx.scaling = keys, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        keys, scaling = ctx.keys, ctx.scaling
        seen = [tensor.index_select(1, keys.observed) for tensor in (key, value)]
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        parts = [
            differentiate(g, q, k, v, o, sums, 0.0, False, scale=scaling)
            for g, q, o, sums, k, v in keys.by_cell([gradient, query, output, logsumexp], seen)
        ]
        of_query, of_seen_keys, of_seen_values = (torch.cat(part, dim=2)[0] for part in zip(*parts, strict=True))
        g, q, k, v, o = (
            _at_least_float32(tensor[:, keys.targets]) for tensor in (gradient, query, key, value, output)
        )
        weights = ((q * k).sum(-1) * scaling - logsumexp[:, keys.targets]).exp().unsqueeze(-1)
        of_scores = weights * (g * (v - o)).sum(-1, keepdim=True) * scaling
        of_query[:, keys.targets] += (of_scores * k).to(of_query.dtype)
        of_key, of_value = torch.empty_like(key), torch.empty_like(value)
        of_key[:, keys.observed], of_key[:, keys.targets] = of_seen_keys, (of_scores * q).to(key.dtype)
        of_value[:, keys.observed], of_value[:, keys.targets] = of_seen_values, (weights * g).to(value.dtype)
        return of_query, of_key, of_value, None, None


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, or in float64 where it has that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
