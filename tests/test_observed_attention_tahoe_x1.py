"""Attention to observed tokens and to the token itself equals masked attention, in its gradients too."""

from typing import Any

import pytest
import torch
from flash_stand_in import FlashStandIn, flash_on_cpu  # noqa: F401 - a fixture
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

from tahoex1_hf import observed_attention_tahoe_x1
from tahoex1_hf.observed_attention_tahoe_x1 import (
    FlashLayout,
    ObservedKeys,
    PackedAttention,
    _FusedOnCuda,
    cudnn_serves,
    flash_serves,
)

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
    monkeypatch.setattr(observed_attention_tahoe_x1, "SHORTEST_WITH_OBSERVED_KEYS", 16)
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


def test_a_cell_without_observed_tokens_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed_attention_tahoe_x1, "SHORTEST_WITH_OBSERVED_KEYS", 256)
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
        monkeypatch.setattr(observed_attention_tahoe_x1, "SHORTEST_WITH_OBSERVED_KEYS", shortest)
        model = tiny_model(config).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        found[shortest] = gradients(model, [row])
        assert bool(calls) == (shortest == 1)
        calls.clear()
    assert largest_relative_difference(found[1], found[10_000]) < 1e-9


# Flash attention over all cells in one call ---------------------------------------------------------


def flash_row(
    tokens: Tensors, lengths: list[int], observed: torch.Tensor | None, num_targets: int | None = None
) -> torch.Tensor:
    """By the kernel, in the layout of `masked`."""
    bounds = torch.tensor([0, *lengths], device=tokens[0].device).cumsum(0)
    cells = FlashLayout.make(bounds, max(lengths), observed, num_targets)
    return cells.attend(*(tensor.transpose(0, 1) for tensor in tokens), 0.3).transpose(0, 1)


@pytest.mark.parametrize("known", [True, False], ids=["targets counted", "targets not counted"])
@pytest.mark.parametrize(
    ("lengths", "share"),
    [([40], 0.5), ([7, 7, 7], 0.4), ([30, 1, 12, 80], 0.3), ([20, 25], 1.0), ([20, 25], 0.0)],
    ids=["one", "equal", "ragged", "all observed", "only <cls> observed"],
)
def test_flash_equals_masks(flash_on_cpu: FlashStandIn, lengths: list[int], share: float, known: bool) -> None:  # noqa: F811
    tokens, observed = some_tokens(sum(lengths)), some_observed(lengths, share)
    num_targets = int((~observed).sum()) if known else None
    ours = with_gradients(flash_row(tokens, lengths, observed, num_targets), tokens)
    assert flash_on_cpu.calls == [(sum(lengths), int(observed.sum()), (max(lengths), max(lengths)))]
    assert flash_on_cpu.backward_calls == 1
    expected = with_gradients(masked(tokens, lengths, observed), tokens)
    for mine, theirs in zip(ours, expected, strict=True):
        assert largest_difference(mine, theirs) < 1e-12


def test_flash_sees_no_key_in_a_cell_without_observed_tokens(flash_on_cpu: FlashStandIn) -> None:  # noqa: F811
    lengths = [30, 12, 25]
    tokens, observed = some_tokens(67), some_observed(lengths)
    observed[30:42] = False
    ours = with_gradients(flash_row(tokens, lengths, observed), tokens)
    for mine, theirs in zip(ours, with_gradients(masked(tokens, lengths, observed), tokens), strict=True):
        assert largest_difference(mine, theirs) < 1e-12


@pytest.mark.parametrize("heads", [HEADS, 2])
@pytest.mark.parametrize("hidden", [True, False])
def test_rows_of_any_lengths_take_one_call(flash_on_cpu: FlashStandIn, heads: int, hidden: bool) -> None:  # noqa: F811
    lengths = [40, 16, 16, 15, 3]
    tokens, observed = some_tokens(90, heads=heads), some_observed(lengths)
    seen = observed if hidden else torch.ones_like(observed)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    attention = PackedAttention.make(bounds, None, observed[None] if hidden else None, torch.device("cpu"), flash=True)
    output, _ = attention(*(tensor[None] for tensor in tokens), 0.3)
    ours = with_gradients(output[0].transpose(0, 1), tokens)
    assert len(flash_on_cpu.calls) == 1
    for mine, theirs in zip(ours, with_gradients(masked(tokens, lengths, seen), tokens), strict=True):
        assert largest_difference(mine, theirs) < 1e-12


@pytest.mark.parametrize("hidden", [True, False])
def test_a_layer_in_float32_attends_without_flash(hidden: bool) -> None:
    # The row was prepared for half precision; one layer (an adapter's, say) gives float32.
    lengths = [30, 12]
    tokens, observed = some_tokens(42), some_observed(lengths)
    seen = observed if hidden else torch.ones_like(observed)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    attention = PackedAttention.make(bounds, 30, observed[None] if hidden else None, torch.device("cpu"), flash=True)
    output, _ = attention(*(tensor[None] for tensor in tokens), 0.3)
    assert largest_difference(output[0].transpose(0, 1), masked(tokens, lengths, seen)) < 1e-12


def test_flash_serves_on_cuda_in_half_precision_alone() -> None:
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32), ("cuda", torch.float64)):
        assert not flash_serves(torch.device(device), dtype, 64)
    for width in (30, 256):  # no multiple of 8, and too wide
        assert not flash_serves(torch.device("cuda"), torch.bfloat16, width)


@pytest.fixture
def cudnn_on_cpu(flash_on_cpu: FlashStandIn, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:  # noqa: F811
    """Shapes of the calls of a stand-in for cuDNN's attention, beside that for flash attention."""
    calls: list[tuple[int, ...]] = []

    def attend(query: torch.Tensor, *rest: Any, scale: float) -> tuple[torch.Tensor]:
        calls.append(tuple(query.shape))
        return (torch.nn.functional.scaled_dot_product_attention(query, *rest[:2], scale=scale),)

    module = observed_attention_tahoe_x1
    monkeypatch.setattr(module, "_cudnn_failed", [])
    monkeypatch.setattr(module, "cudnn_serves", lambda *_: not module._cudnn_failed)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", attend)
    return calls


def row_of(lengths: list[int], heads: int = 4, hidden: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return queries, keys and values, and what attention of a packed row gives for them."""
    tokens, observed = some_tokens(sum(lengths), heads=heads), some_observed(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    attention = PackedAttention.make(bounds, None, observed[None] if hidden else None, torch.device("cpu"), flash=True)
    return tokens, attention(*(tensor[None] for tensor in tokens), 0.3)[0][0].transpose(0, 1)


def test_cudnn_takes_cells_of_equal_length(
    cudnn_on_cpu: list[tuple[int, ...]],
    flash_on_cpu: FlashStandIn,  # noqa: F811
) -> None:
    tokens, output = row_of([30, 30, 30])
    assert cudnn_on_cpu == [(3, 4, 30, 8)]
    assert not flash_on_cpu.calls
    expected = with_gradients(masked(tokens, [30, 30, 30], torch.ones(90, dtype=torch.bool)), tokens)
    for mine, theirs in zip(with_gradients(output, tokens), expected, strict=True):
        assert largest_difference(mine, theirs) < 1e-12


@pytest.mark.parametrize(
    ("lengths", "heads", "hidden"), [([30, 29, 30], 4, False), ([30, 30], 2, False), ([30, 30], 4, True)]
)
def test_flash_takes_all_others(
    cudnn_on_cpu: list[tuple[int, ...]],
    flash_on_cpu: FlashStandIn,  # noqa: F811
    lengths: list[int],
    heads: int,
    hidden: bool,
) -> None:
    row_of(lengths, heads, hidden)
    assert not cudnn_on_cpu
    assert len(flash_on_cpu.calls) == 1


def test_flash_serves_where_cudnn_fails(
    cudnn_on_cpu: list[tuple[int, ...]],
    flash_on_cpu: FlashStandIn,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", fail)
    for _ in range(2):
        row_of([20, 20])
    assert caplog.text.count("no plan") == 1
    assert len(flash_on_cpu.calls) == 2


def test_cudnn_serves_new_cards_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    card, kind = torch.device("cuda"), torch.bfloat16
    assert not cudnn_serves(torch.device("cpu"), kind, 64)
    assert not cudnn_serves(card, torch.float32, 64)
    monkeypatch.setattr(observed_attention_tahoe_x1, "flash_serves", lambda *_: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, now=capability: now)
        assert cudnn_serves(card, kind, 64) == (capability >= (9, 0))
    assert not cudnn_serves(card, kind, 192)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert not cudnn_serves(card, kind, 64)


@pytest.mark.parametrize("style", ["full", "observed_or_self"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_models_learn_the_same_by_flash(
    flash_on_cpu: FlashStandIn,  # noqa: F811
    shape: str,
    style: str,
    checkpointing: bool,
) -> None:
    config = tiny_config(**SHAPES[shape] | {"attention_mask_style": style, "expression_encoder_dropout": 0.0})
    batch = make_batch(config)
    expected = gradients(tiny_model(config, attention="eager").double(), [batch])
    model = tiny_model(config).double()
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    row = packed(batch) | {"num_targets": int(batch["target_mask"].sum())}
    ours = gradients(model, [row])
    assert len(flash_on_cpu.calls) == config.num_hidden_layers * (2 if checkpointing else 1)
    assert largest_relative_difference(ours, expected) < 1e-9


def test_what_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    def work(values: torch.Tensor) -> torch.Tensor:
        return values + 1

    def fail(*_: Any) -> None:
        raise RuntimeError("no C compiler")

    fused = _FusedOnCuda(work)
    fused.compiled = fail
    values = torch.ones(2).as_subclass(OnCuda)
    for _ in range(2):
        assert torch.equal(fused(values), values + 1)
    assert caplog.text.count("no C compiler") == 1


# The kernel itself ----------------------------------------------------------------------------------

# Largest error of bfloat16 products, relative to the norm: 2**-8 for each of a few roundings in a row.
HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (ours.detach().double().cpu() - exact.detach().double()).norm() / exact.detach().double().norm()
    return float(difference) if torch.isfinite(difference) else float("inf")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("share", [None, 0.5, 0.0, 1.0], ids=["full", "half observed", "only <cls>", "all observed"])
def test_kernel_equals_masks(dtype: torch.dtype, width: int, share: float | None) -> None:
    lengths = [300, 64, 1, 7, 513]
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(4, sum(lengths), width, generator=generator).to(dtype) for _ in range(3)]
    observed = some_observed(lengths, 1.0 if share is None else share)
    exact = [tensor.double().requires_grad_() for tensor in rounded]
    expected = with_gradients(masked(exact, lengths, observed), exact)
    tokens = [tensor.cuda().requires_grad_() for tensor in rounded]
    output = flash_row(tokens, lengths, None if share is None else observed.cuda())
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = [output, *torch.autograd.grad((output.double() * weights.cuda()).sum(), tokens)]
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        assert relative(mine, theirs) < HALF[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_cudnn_equals_masks(dtype: torch.dtype, width: int) -> None:
    if not cudnn_serves(torch.device("cuda"), dtype, width):
        pytest.skip("cuDNN's attention is not chosen on this card")
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(4, 3 * 200, width, generator=generator).to(dtype) for _ in range(3)]
    exact = [tensor.double().requires_grad_() for tensor in rounded]
    expected = with_gradients(masked(exact, [200] * 3, torch.ones(600, dtype=torch.bool)), exact)
    tokens = [tensor.cuda().requires_grad_() for tensor in rounded]
    bounds = torch.tensor([0, 200, 400, 600])
    attention = PackedAttention.make(bounds, 200, None, torch.device("cuda"), flash=True)
    output = attention(*(tensor[None] for tensor in tokens), 0.3)[0][0].transpose(0, 1)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = [output, *torch.autograd.grad((output.double() * weights.cuda()).sum(), tokens)]
    assert not observed_attention_tahoe_x1._cudnn_failed
    for mine, theirs in zip(ours, expected, strict=True):
        assert relative(mine, theirs) < HALF[dtype]


@pytest.mark.gpu
def test_kernel_takes_fewer_heads_of_keys_and_cells_without_keys() -> None:
    lengths = [200, 30, 90]
    tokens, observed = some_tokens(320, torch.bfloat16, heads=2), some_observed(lengths)
    there = [tensor.detach().cuda().requires_grad_() for tensor in tokens]
    exact = [tensor.detach().double().requires_grad_() for tensor in tokens]
    everything = torch.ones_like(observed)
    expected = with_gradients(masked(exact, lengths, everything), exact)
    output = flash_row(there, lengths, None)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = [output, *torch.autograd.grad((output.double() * weights.cuda()).sum(), there)]
    for mine, theirs in zip(ours, expected, strict=True):
        assert relative(mine, theirs) < HALF[torch.bfloat16]
    observed[200:230] = False
    same_heads = [tensor.detach() for tensor in some_tokens(320, torch.bfloat16)]
    ours_hidden = flash_row([tensor.cuda() for tensor in same_heads], lengths, observed.cuda())
    exact_hidden = masked([tensor.double() for tensor in same_heads], lengths, observed)
    assert relative(ours_hidden, exact_hidden) < HALF[torch.bfloat16]
