"""The sum and the norm behind it, in plain torch on a CPU and in one kernel on a GPU."""

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from tahoex1_hf.inference import fused_norm
from tahoex1_hf.inference.fused_norm import add_and_norm


def parts(width: int, tokens: int = 37, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, nn.LayerNorm]:
    generator = torch.Generator().manual_seed(0)
    states, addend = (torch.randn(tokens, width, generator=generator) * 3 + 1 for _ in range(2))
    norm = nn.LayerNorm(width, eps=1e-5)
    with torch.no_grad():
        norm.weight += 0.3 * torch.randn(width, generator=generator)
        norm.bias += 0.3 * torch.randn(width, generator=generator)
    return states.to(device), addend.bfloat16().to(device), norm.to(device)


@torch.no_grad()
def compare(width: int, adds: bool, dtype: torch.dtype, device: str) -> None:
    states, addend, norm = parts(width, device=device)
    exact = states.double() + (addend.double() if adds else 0)
    expected = layer_norm(exact, (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    normed = add_and_norm(states, addend if adds else None, norm, dtype)
    assert normed.dtype == dtype
    # The largest value has a rounding of its own; float32 sums over the row before it have another few.
    limit = expected.abs().max() * max(torch.finfo(dtype).eps, 1e-6)
    assert (normed.double() - expected).abs().max() < limit
    assert (states.double() - exact).abs().max() < exact.abs().max() * 1e-7
    assert not fused_norm._failed


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_plain_torch(adds: bool, dtype: torch.dtype) -> None:
    compare(64, adds, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 100, 512, 2048, 2560])
def test_in_one_kernel(width: int, adds: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    compare(width, adds, dtype, "cuda")


@pytest.mark.gpu
def test_where_it_cannot_be_compiled_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(fused_norm, "_launch", fail)
    monkeypatch.setattr(fused_norm, "_failed", [])
    states, addend, norm = parts(64, device="cuda")
    expected = norm(states + addend)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(add_and_norm(states.clone(), addend, norm, torch.float32), expected)
    assert caplog.text.count("no C compiler") == 1
