"""A plain stand-in, on a CPU and in any precision, for torch's flash attention over cells of different lengths."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tahoex1_hf import observed_attention_tahoe_x1, packing_tahoe_x1
from tahoex1_hf.inference import ragged

Bounds = tuple[torch.Tensor, torch.Tensor]


class FlashStandIn:
    """Computes what the kernel computes, with its conventions; notes its calls as (queries, keys, longest)."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, tuple[int, int]]] = []
        self.backward_calls = 0

    @torch.autocast("cpu", enabled=False)
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_bounds: torch.Tensor,
        key_bounds: torch.Tensor,
        longest: tuple[int, int],
        scaling: float,
    ) -> tuple[torch.Tensor, ...]:
        self.calls.append((len(query), len(key), longest))
        queries, keys = _checked(query, key, query_bounds, key_bounds, longest)
        outputs, sums = [], []
        for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
            k, v = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (k, v))
            q, k, v = map(_precise, (q, k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(query.dtype))
            # The kernel gives plus infinity where there is no key.
            sums.append(scores.logsumexp(-1) if len(k) else q.new_full((query.shape[1], len(q)), float("inf")))
        return torch.cat(outputs), torch.cat(sums, dim=1), query.new_zeros(2), query.new_zeros(0)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        logsumexp: torch.Tensor,
        query_bounds: torch.Tensor,
        key_bounds: torch.Tensor,
        longest: tuple[int, int],
        states: Any,
        scaling: float,
    ) -> tuple[torch.Tensor, ...]:
        """As the kernel: the weights are exp(score - logsumexp), of whatever sums it is given."""
        self.backward_calls += 1
        queries, keys = _checked(query, key, query_bounds, key_bounds, longest)
        groups = query.shape[1] // key.shape[1]
        found: list[list[torch.Tensor]] = [[], [], []]
        of_queries = zip(*(t.split(queries) for t in (gradient, query, output, logsumexp.t())), strict=True)
        for (g, q, o, sums), k, v in zip(of_queries, key.split(keys), value.split(keys), strict=True):
            g, q, o, k, v = map(_precise, (g, q, o, k, v))
            k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
            weights = (torch.einsum("qhd,khd->hqk", q, k) * scaling - sums.t().unsqueeze(-1)).exp()
            of_weights = torch.einsum("qhd,khd->hqk", g, v) - (g * o).sum(-1).t().unsqueeze(-1)
            of_scores = weights * of_weights * scaling
            found[0].append(torch.einsum("hqk,khd->qhd", of_scores, k))
            for place, tensor in (
                (1, torch.einsum("hqk,qhd->khd", of_scores, q)),
                (2, torch.einsum("hqk,qhd->khd", weights, g)),
            ):
                found[place].append(tensor.unflatten(1, (-1, groups)).sum(2))
        return tuple(torch.cat(parts).to(query.dtype) for parts in found)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, in which the kernel computes, or in float64 where it has that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _checked(
    query: torch.Tensor, key: torch.Tensor, query_bounds: torch.Tensor, key_bounds: torch.Tensor, longest: Any
) -> tuple[list[int], list[int]]:
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    assert len(query_bounds) == len(key_bounds)
    assert (int(query_bounds[0]), int(key_bounds[0])) == (0, 0)
    assert (int(query_bounds[-1]), int(key_bounds[-1])) == (len(query), len(key))
    assert int(query_bounds.diff().max()) <= longest[0]
    assert int(key_bounds.diff().max()) <= longest[1]
    assert query.stride(-1) == key.stride(-1) == 1
    return query_bounds.diff().tolist(), key_bounds.diff().tolist()


# As operations of torch's, so that compiled models call them as they call the kernel: whole, without a look inside.
_current: list[FlashStandIn] = []


@torch.library.custom_op("tahoex1_tests::flash_forward", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest_query: int,
    longest_keys: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = longest_query, longest_keys
    output, sums, *states = _current[-1].forward(query, key, value, query_bounds, key_bounds, longest, scaling)
    return output.contiguous(), sums.contiguous(), states[0], states[1]


@_forward.register_fake
def _(query, key, value, query_bounds, key_bounds, longest_query, longest_keys, scaling):  # type: ignore[no-untyped-def]
    sums = _precise(query.new_empty(query.shape[1], query.shape[0]))
    return torch.empty_like(query), sums, query.new_empty(2), query.new_empty(0)


@torch.library.custom_op("tahoex1_tests::flash_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest_query: int,
    longest_keys: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = gradient, query, key, value, output, logsumexp, query_bounds, key_bounds
    q, k, v = _current[-1].backward(*arguments, (longest_query, longest_keys), None, scaling)
    return q.contiguous(), k.contiguous(), v.contiguous()


@_backward.register_fake
def _(gradient, query, key, value, output, logsumexp, query_bounds, key_bounds, longest_query, longest_keys, scaling):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _call_forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *tensors, longest, scaling = arguments
    return _forward(*tensors, *longest, scaling)


def _call_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *tensors, longest, _, scaling = arguments
    return _backward(*tensors, *longest, scaling)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashStandIn]:
    """Have packed rows attend as on a GPU in half precision, in the precision that they have."""
    kernel = FlashStandIn()
    monkeypatch.setattr(observed_attention_tahoe_x1, "flash_forward", _call_forward)
    monkeypatch.setattr(observed_attention_tahoe_x1, "flash_backward", _call_backward)
    for module in (observed_attention_tahoe_x1, packing_tahoe_x1, ragged):
        monkeypatch.setattr(module, "flash_serves", lambda device, dtype, width: True)
    _current.append(kernel)
    yield kernel
    _current.remove(kernel)
