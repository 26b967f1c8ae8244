"""Attention to observed tokens and to the token itself equals masked attention, in its gradients too."""

from typing import Any

import pytest
import torch
from helpers import (
    SHAPES,
    gradients,
    largest_difference,
    largest_relative_difference,
    make_batch,
    packed,
    tiny_config,
    tiny_model,
)
from torch.nn.functional import scaled_dot_product_attention

from tahoex1_hf import packing_tahoe_x1
from tahoex1_hf.observed_attention_tahoe_x1 import ObservedKeys
from tahoex1_hf.packing_tahoe_x1 import PackedAttention

HEADS, WIDTH = 4, 8
Tensors = list[torch.Tensor]


def some_tokens(length: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, heads: int = HEADS) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(HEADS, length, WIDTH, generator=generator, dtype=torch.float64) * scale
    rest = [torch.randn(heads, length, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [tensor.to(dtype).requires_grad_() for tensor in (query, *rest)]


def some_observed(lengths: list[int], share: float = 0.5) -> torch.Tensor:
    observed = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(1)) < share
    observed[[0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()]] = True  # <cls>
    return observed


def masked(tokens: Tensors, lengths: list[int], observed: torch.Tensor) -> torch.Tensor:
    """Compute the same by masks, cell by cell."""
    outputs = []
    for (q, k, v), seen in zip(
        zip(*(tensor.split(lengths, dim=1) for tensor in tokens), strict=True), observed.split(lengths), strict=True
    ):
        mask = seen | torch.eye(len(seen), dtype=torch.bool)
        outputs.append(scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=0.3, enable_gqa=True)[0])
    return torch.cat(outputs, dim=1)


def with_gradients(output: torch.Tensor, tokens: Tensors) -> Tensors:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [output, *torch.autograd.grad((output.double() * weights).sum(), tokens)]


@pytest.mark.parametrize(
    ("lengths", "share"),
    [([40], 0.5), ([7, 7, 7], 0.4), ([30, 1, 12, 80], 0.3), ([20, 25], 1.0), ([20, 25], 0.0)],
    ids=["one", "equal", "ragged", "all observed", "only <cls> observed"],
)
def test_equal_to_masks(lengths: list[int], share: float) -> None:
    tokens, observed = some_tokens(sum(lengths)), some_observed(lengths, share)
    keys = ObservedKeys.make(lengths, observed)
    assert keys is not None
    ours = with_gradients(keys.attend(*tokens, 0.3), tokens)
    expected = with_gradients(masked(tokens, lengths, observed), tokens)
    for mine, theirs in zip(ours, expected, strict=True):
        assert largest_difference(mine, theirs) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["usual scores", "large scores"])
def test_as_precise_as_masks(dtype: torch.dtype, scale: float) -> None:
    lengths = [50, 300]
    tokens, observed = some_tokens(350, dtype, scale), some_observed(lengths)
    keys = ObservedKeys.make(lengths, observed)
    assert keys is not None
    ours = with_gradients(keys.attend(*tokens, 0.3), tokens)
    theirs = with_gradients(masked(tokens, lengths, observed), tokens)
    exact = [tensor.detach().double().requires_grad_() for tensor in tokens]
    for mine, other, value in zip(ours, theirs, with_gradients(masked(exact, lengths, observed), exact), strict=True):
        assert mine.dtype == dtype
        rounding = torch.finfo(dtype).eps * float(value.detach().abs().max())
        errors = [largest_difference(tensor.double(), value) for tensor in (mine, other)]
        assert errors[0] < 2 * errors[1] + 2 * rounding


@pytest.mark.parametrize("heads", [HEADS, 2])
def test_long_rows_choose_this_attention(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_tahoe_x1, "SHORTEST_WITH_OBSERVED_KEYS", 16)
    lengths = [40, 16, 16, 15, 3]
    tokens, observed = some_tokens(90, heads=heads), some_observed(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    attention = PackedAttention.make(bounds, None, observed[None], torch.device("cpu"))
    assert attention.seen is not None
    assert [isinstance(seen, ObservedKeys) for seen in attention.seen] == [True, True, False, False]
    output, _ = attention(*(tensor[None] for tensor in tokens), 0.3)
    ours = with_gradients(output[0].transpose(0, 1), tokens)
    for mine, theirs in zip(ours, with_gradients(masked(tokens, lengths, observed), tokens), strict=True):
        assert largest_difference(mine, theirs) < 1e-12


def test_a_cell_without_observed_tokens_is_masked() -> None:
    lengths = [300, 260]
    observed = some_observed(lengths)
    observed[300:] = False
    attention = PackedAttention.make(torch.tensor([0, 300, 560]), None, observed[None], torch.device("cpu"))
    assert attention.seen is not None
    assert [type(seen) for seen in attention.seen] == [ObservedKeys, torch.Tensor]
    tokens = some_tokens(560)
    output, _ = attention(*(tensor[None] for tensor in tokens), 0.3)
    assert largest_difference(output[0].transpose(0, 1), masked(tokens, lengths, observed)) < 1e-12


@pytest.mark.parametrize("shape", ["plain", "drugs_observed_or_self_mean"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_learn_the_same(shape: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(**SHAPES[shape] | {"attention_mask_style": "observed_or_self"})
    row = packed(make_batch(config))
    calls: list[Any] = []
    attend = ObservedKeys.attend
    monkeypatch.setattr(ObservedKeys, "attend", lambda *arguments: (calls.append(1), attend(*arguments))[1])
    found = {}
    for shortest in (1, 10_000):
        monkeypatch.setattr(packing_tahoe_x1, "SHORTEST_WITH_OBSERVED_KEYS", shortest)
        model = tiny_model(config).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        found[shortest] = gradients(model, [row])
        assert bool(calls) == (shortest == 1)
        calls.clear()
    assert largest_relative_difference(found[1], found[10_000]) < 1e-9
