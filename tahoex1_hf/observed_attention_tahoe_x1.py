# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention in plain torch, and attention within the cells of a packed row, for which transformers has no backend.

- Eager attention, the only one that returns its weights.
- On CUDA, in half precision, torch's own flash attention takes all cells in one call, whatever their lengths, without
  padding. `torch.nn.attention.varlen` calls the same kernel, but its arguments changed between torch 2.10 and 2.13,
  and its backward pass cannot be given the sums that the next point needs.
- Where a token sees the observed tokens of its cell and itself, the scores of all other pairs are not computed.

This file travels to the Hugging Face Hub beside the weights: it imports only torch.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

# Below this, gathering the observed keys takes longer than a mask: 1.4 to 1.7 times at 256 tokens (docs/speed.md).
SHORTEST_WITH_OBSERVED_KEYS = 512
# Wider heads have no backward pass on some cards (sdp_utils.cpp in torch); the released models' have 64 or 128.
_WIDEST_HEAD = 192
_WIDEST_OF_CUDNN = 128
_cudnn_failed: list[str] = []


@torch.compiler.assume_constant_result
def flash_serves(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether torch's flash attention computes on this device, in this type, with heads of this width.

    `torch.backends.cuda.enable_flash_sdp(False)` switches it off here, too.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > _WIDEST_HEAD:
        return False
    return torch.backends.cuda.flash_sdp_enabled() and _flash_is_built(device)


@cache
def _flash_is_built(device: torch.device) -> bool:
    """Return whether torch was built with the kernel, for NVIDIA's cards, and the card is new enough for it."""
    built = torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def cudnn_serves(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether cuDNN's attention computes cells of equal length, and faster than torch's flash attention.

    On an H100, 32 cells of 2,048 tokens took 0.64 instead of 1.05 ms (8 heads of 64), 2.3 instead of 4.0 (20 of 128).
    On cells of any length, cuDNN takes 50 ms of the host's time a call. `enable_cudnn_sdp(False)` switches it off.
    """
    if device.type != "cuda" or not flash_serves(device, dtype, width) or width > _WIDEST_OF_CUDNN or _cudnn_failed:
        return False
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(device) >= (9, 0)


def cudnn_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cells: int, scaling: float
) -> torch.Tensor:
    """Let tokens attend within cells of equal length: `(tokens, heads, width)` each, to the like."""
    q, k, v = (tensor.unflatten(0, (cells, -1)).transpose(1, 2) for tensor in (query, key, value))
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    output: torch.Tensor = attend(q, k, v, None, differentiable, scale=scaling)[0]
    return output.transpose(1, 2).flatten(0, 1)


def flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: tuple[int, int],
    scaling: float,
) -> tuple[torch.Tensor, ...]:
    """Return output `(queries, heads, width)`, log-sum-exp `(heads, queries)`, and two states for `flash_backward`.

    Where a cell has no keys, the output is 0 and the log-sum-exp plus infinity.
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, query_bounds, key_bounds, *longest, 0.0, False, False, scale=scaling
    )[:4]


def flash_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: tuple[int, int],
    states: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, given those of the output and what `flash_forward` returned."""
    return torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, logsumexp, query_bounds, key_bounds, *longest, 0.0, False, *states,
        scale=scaling,
    )  # fmt: skip


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor | None,
    longest: tuple[int, int],
    scaling: float,
) -> torch.Tensor:
    """Let the queries of each cell see its keys: `(queries, heads, width)` to the same shape; differentiable once.

    Args:
        query: `(queries, heads, width)`, cell after cell.
        key: `(keys, heads, width)`, perhaps of fewer heads, each for as many of the queries'.
        value: `(keys, heads, width)`, as `key`.
        query_bounds: `(cells + 1,)` int32, from 0 to the number of queries.
        key_bounds: `(cells + 1,)` int32, from 0 to the number of keys; None where they are those of the queries.
        longest: Largest numbers of queries and of keys of a cell, or larger numbers.
        scaling: Factor of the scores.
    """
    output: torch.Tensor = _Flash.apply(query, key, value, query_bounds, key_bounds, *longest, scaling)
    return output


class _Flash(torch.autograd.Function):
    """torch's flash attention over cells of any length."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_bounds: torch.Tensor,
        key_bounds: torch.Tensor | None,  # compiled graphs refuse the same tensor twice
        longest_query: int,
        longest_keys: int,
        scaling: float,
    ) -> torch.Tensor:
        ctx.longest, ctx.scaling = (longest_query, longest_keys), scaling
        key_bounds = query_bounds if key_bounds is None else key_bounds
        output, logsumexp, *states = flash_forward(query, key, value, query_bounds, key_bounds, ctx.longest, scaling)
        ctx.save_for_backward(query, key, value, output, logsumexp, query_bounds, key_bounds, *states)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, logsumexp, query_bounds, key_bounds, *states = ctx.saved_tensors
        gradients = flash_backward(
            gradient.contiguous(), query, key, value, output, logsumexp, query_bounds, key_bounds, ctx.longest,
            (states[0], states[1]), ctx.scaling,
        )  # fmt: skip
        return *gradients, None, None, None, None, None


@dataclass(frozen=True, eq=False)
class FlashLayout:
    """Where torch's flash attention finds the cells of a packed row and their observed tokens; all on the GPU."""

    bounds: torch.Tensor  # (cells + 1,) int32
    longest: int  # tokens of the longest cell
    observed: torch.Tensor | None = None  # (observed tokens,) int64, indices in the row; None where all are seen
    targets: torch.Tensor | None = None  # (other tokens,) int64
    observed_bounds: torch.Tensor | None = None  # (cells + 1,) int32, in `observed`

    @classmethod
    def make(
        cls, boundaries: torch.Tensor, longest: int, observed: torch.Tensor | None, num_targets: int | None
    ) -> "FlashLayout":
        """Find the keys.

        Args:
            boundaries: `(cells + 1,)`, from 0 to the length of the row.
            longest: Length of the longest cell.
            observed: `(length,)` bool; None for all.
            num_targets: Number of tokens that are not observed, where it is known: asking the GPU for it takes time.
        """
        bounds = boundaries.int()
        if observed is None:
            return cls(bounds, longest)
        num_observed = len(observed) - (int((~observed).sum()) if num_targets is None else num_targets)
        order = torch.argsort((~observed).to(torch.uint8), stable=True)  # nonzero would wait for the GPU
        before = torch.nn.functional.pad(observed.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(bounds, longest, order[:num_observed], order[num_observed:], before[boundaries.long()])

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attend: `(length, heads, width)` each, to the like; with `observed`, keys have as many heads as queries."""
        if self.observed is None:
            if self._equal(query, key):
                try:
                    return cudnn_attention(query, key, value, len(self.bounds) - 1, scaling)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # cuDNN has no kernel for this, or is too old
                    logger.warning("cuDNN's attention fails here, flash attention is used: %s", str(error)[:500])
                    _cudnn_failed.append(str(error))
            return flash_attention(query, key, value, self.bounds, None, (self.longest, self.longest), scaling)
        output: torch.Tensor = _ObservedOrSelfByFlash.apply(
            query, key, value, self.bounds, self.observed_bounds, self.observed, self.targets, self.longest, scaling
        )
        return output

    def _equal(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Return whether all cells are equally long, and cuDNN serves. Compiled code does not ask."""
        if torch.compiler.is_compiling() or not cudnn_serves(query.device, query.dtype, query.shape[-1]):
            return False
        return query.shape == key.shape and len(query) == self.longest * (len(self.bounds) - 1)


class _ObservedOrSelfByFlash(torch.autograd.Function):
    """As `_ObservedOrSelf`, for all cells in one call: tensors are `(length, heads, width)`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        observed_bounds: torch.Tensor,
        observed: torch.Tensor,
        targets: torch.Tensor,
        longest: int,
        scaling: float,
    ) -> torch.Tensor:
        ctx.longest, ctx.scaling = (longest, longest), scaling
        seen_keys, seen_values = key.index_select(0, observed), value.index_select(0, observed)
        output, logsumexp, *states = flash_forward(
            query, seen_keys, seen_values, bounds, observed_bounds, ctx.longest, scaling
        )
        logsumexp = logsumexp.masked_fill(logsumexp == float("inf"), float("-inf"))  # of no keys, the sum is 0
        joined, both = _with_itself(query, key, value, output, logsumexp.t(), targets, 0, scaling)
        # Not in place: compiled by torch 2.11, a result that was changed in place silently has no gradient.
        output = output.index_copy(0, targets, joined)
        logsumexp = logsumexp.index_copy(1, targets, both.t())
        ctx.save_for_backward(
            query, key, value, output, logsumexp, bounds, observed_bounds, observed, targets, *states
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, logsumexp, bounds, observed_bounds, observed, targets, *states = ctx.saved_tensors
        gradient = gradient.contiguous()
        seen_keys, seen_values = key.index_select(0, observed), value.index_select(0, observed)
        of_query, *of_seen = flash_backward(
            gradient, query, seen_keys, seen_values, output, logsumexp, bounds, observed_bounds, ctx.longest,
            (states[0], states[1]), ctx.scaling,
        )  # fmt: skip
        of_targets = _of_itself(gradient, query, key, value, output, logsumexp.t(), of_query, targets, 0, ctx.scaling)
        of_query.index_copy_(0, targets, of_targets[0])
        of_key, of_value = (
            torch.empty_like(tensor).index_copy_(0, observed, part).index_copy_(0, targets, rest)
            for tensor, part, rest in zip((key, value), of_seen, of_targets[1:], strict=True)
        )
        return of_query, of_key, of_value, None, None, None, None, None, None


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
            lengths: Tokens of each cell.
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
        joined, both = _with_itself(query, key, value, output, logsumexp, keys.targets, 1, scaling)
        output, logsumexp = output.index_copy(1, keys.targets, joined), logsumexp.index_copy(1, keys.targets, both)
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
        of_targets = _of_itself(gradient, query, key, value, output, logsumexp, of_query, keys.targets, 1, scaling)
        of_key, of_value = torch.empty_like(key), torch.empty_like(value)
        of_query[:, keys.targets], of_key[:, keys.targets], of_value[:, keys.targets] = of_targets
        of_key[:, keys.observed], of_value[:, keys.observed] = of_seen_keys, of_seen_values
        return of_query, of_key, of_value, None, None


class _FusedOnCuda:
    """Element-wise work that torch compiles into one kernel on CUDA; it runs as it is on a CPU, or if torch cannot.

    Args:
        work: Function of tensors, of which the first tells the device.
    """

    def __init__(self, work: Callable):
        self.work, self.can_compile = work, True
        self.compiled: Callable | None = None  # made when it is needed: importing the compiler takes seconds

    def __call__(self, first: torch.Tensor, *rest: Any) -> Any:
        if not first.is_cuda or torch.compiler.is_compiling() or not self.can_compile:
            return self.work(first, *rest)
        if self.compiled is None:
            self.compiled = torch.compile(self.work, dynamic=True)
        try:
            return self.compiled(first, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a machine without a C compiler or without Triton
            logger.warning("A part of attention cannot be compiled here, and takes longer: %s", str(error)[:500])
            self.can_compile = False
            return self.work(first, *rest)


@_FusedOnCuda
def _with_itself(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    targets: torch.Tensor,
    dim: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp of the targets, with each target's attention to itself.

    `dim` is that of the tokens; after it comes, in all but `logsumexp`, the width of a head.
    """
    q, k, v, of_others = (
        _at_least_float32(tensor.index_select(dim, targets)) for tensor in (query, key, value, output)
    )
    itself, others = (q * k).sum(-1) * scaling, logsumexp.index_select(dim, targets)
    both = torch.logaddexp(others, itself)
    weights = (itself - both).exp().unsqueeze(-1)
    return (of_others * (others - both).exp().unsqueeze(-1) + v * weights).to(output.dtype), both


@_FusedOnCuda
def _of_itself(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    of_query: torch.Tensor,
    targets: torch.Tensor,
    dim: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the targets' queries, with what `of_query` has of them, keys and values."""
    g, q, k, v, o = (
        _at_least_float32(tensor.index_select(dim, targets)) for tensor in (gradient, query, key, value, output)
    )
    weights = ((q * k).sum(-1) * scaling - logsumexp.index_select(dim, targets)).exp().unsqueeze(-1)
    of_scores = weights * (g * (v - o)).sum(-1, keepdim=True) * scaling
    whole = of_query.index_select(dim, targets) + (of_scores * k).to(of_query.dtype)
    return whole, (of_scores * q).to(key.dtype), (weights * g).to(value.dtype)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, or in float64 where it has that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
    flash: FlashLayout | None = None

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
            longest: Length of the longest cell, where it is known: asking a GPU for it takes time.
            observed: `(1, length)` bool: a token sees the observed tokens of its cell and itself; None for all.
            device: The device that attends.
            flash: Whether queries, keys and values are such that `flash_serves`.
            num_targets: Number of tokens that are not observed, where it is known, as for `longest`.
        """
        boundaries = boundaries.to(device)
        observed = None if observed is None else observed.to(device)
        on_cuda = device.type == "cuda"
        if (flash or on_cuda) and longest is None:
            longest = int(boundaries.diff().max())
        if flash and longest is not None:
            cells = FlashLayout.make(boundaries, longest, None if observed is None else observed[0], num_targets)
            return cls(boundaries, None, longest, observed=observed, flash=cells)
        if observed is None and on_cuda:
            return cls(boundaries, None, longest)
        return cls(boundaries, equal_runs(boundaries.diff().tolist()), longest, observed=observed)._with_seen()

    def _with_seen(self) -> "PackedAttention":
        if self.observed is None or self.runs is None:
            return self
        parts = self.observed[0].split([cells * length for cells, length in self.runs])
        return replace(self, seen=[_observed_or_self(part, *run) for part, run in zip(parts, self.runs, strict=True)])

    def on(self, device: torch.device) -> "PackedAttention":
        """Return the same on another device, as for a model whose layers lie on several."""
        if self.boundaries.device == device:
            return self
        if self.runs is None:
            return PackedAttention.make(
                self.boundaries, self.longest, self.observed, device, flash=self.flash is not None
            )
        observed = None if self.observed is None else self.observed.to(device)
        return replace(self, boundaries=self.boundaries.to(device), observed=observed)._with_seen()

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, None]:
        """Attend: `(1, heads, length, width)`, of keys and values perhaps fewer, to `(1, length, heads, width)`."""
        if self.boundaries.device != query.device:
            return self.on(query.device)(query, key, value, scaling)
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
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # layers with 8-bit weights give float32
            query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
        if self.flash is None or not flash_serves(query.device, query.dtype, query.shape[-1]):
            # A layer gives another type than the rest do.
            others = PackedAttention.make(self.boundaries, self.longest, self.observed, query.device)
            return others(query, key, value, scaling)[0]
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [0] would copy gradients
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


@dataclass(frozen=True, eq=False)
class EagerAttention:
    """Attention in plain torch, for one forward that returns its weights."""

    mask: torch.Tensor | None  # (batch, 1, length, length), added to the scores

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend: `(B, H, S, D)` to `(B, S, H, D)` and the weights `(B, H, S, S)`."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
        if self.mask is not None:
            scores = scores + self.mask.to(scores.device)
        at_least_float32 = torch.promote_types(query.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=at_least_float32).to(query.dtype)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


# What layers are given: a mask for the configured backend, or what attends by itself.
AttentionMask = torch.Tensor | PackedAttention | EagerAttention | None


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in plain torch, the only backend that returns its weights: `(B, H, S, D)` to `(B, S, H, D)`."""
    return EagerAttention(attention_mask)(query, key, value, scaling)


def _observed_or_self(observed: torch.Tensor, cells: int, length: int) -> torch.Tensor | ObservedKeys:
    """Describe what the tokens of a run see: the observed ones, `(cells * length,)` bool, and themselves."""
    if length >= SHORTEST_WITH_OBSERVED_KEYS:
        keys = ObservedKeys.make([length] * cells, observed)
        if keys is not None:
            return keys
    return observed.view(cells, 1, 1, length) | torch.eye(length, dtype=torch.bool, device=observed.device)
