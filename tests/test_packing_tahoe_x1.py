"""A product with the activation in it equals the two, in its gradients too; a packed row's tokens know their cells."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from helpers import SHAPES, gradients, make_batch, packed, tiny_config, tiny_model
from torch import nn

from tahoex1_hf import packing_tahoe_x1
from tahoex1_hf.packing_tahoe_x1 import CellLayout, _relu_serves, linear_and_relu


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Layers that were multiplied with the activation, on a CPU as on a GPU."""
    layers: list[Any] = []

    def serve(linear: Any, hidden_states: torch.Tensor) -> bool:
        layers.append(linear)
        return True

    monkeypatch.setattr(packing_tahoe_x1, "_relu_serves", serve)
    return layers


def results(linear: nn.Linear, inputs: torch.Tensor, work: Any = linear_and_relu) -> list[torch.Tensor]:
    inputs = inputs.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = work(linear, inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    return [output, *torch.autograd.grad(output, [inputs, linear.weight, linear.bias], weights)]


def some_layer() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(24, 40), torch.randn(2, 7, 24)


@pytest.mark.parametrize("compiled", [False, True])
def test_product_and_activation_in_one(served: list[Any], compiled: bool) -> None:
    linear, inputs = some_layer()
    expected = results(linear, inputs, lambda layer, states: torch.relu(layer(states)))
    torch._dynamo.reset()
    work = torch.compile(linear_and_relu, backend="aot_eager", fullgraph=True) if compiled else linear_and_relu
    ours = results(linear, inputs, work)
    assert served
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == theirs.dtype
        # Of some forty products in bfloat16, whose sums may be rounded in another order.
        assert (mine.double() - theirs.double()).norm() < 1e-2 * theirs.double().norm()


def test_frozen_weights_get_no_gradients(served: list[Any]) -> None:
    linear, inputs = some_layer()
    linear.requires_grad_(False)
    inputs.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_and_relu(linear, inputs).sum().backward()
    assert inputs.grad is not None
    assert linear.weight.grad is None
    assert linear.bias.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", ["plain", "observed_or_self"])
def test_models_learn_the_same(served: list[Any], shape: str, checkpointing: bool) -> None:
    config = tiny_config(**SHAPES[shape] | {"expression_encoder_dropout": 0.0})
    row = packed(make_batch(config))
    model = tiny_model(config)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(model, [row])
        assert len(served) == config.num_hidden_layers * (2 if checkpointing else 1)
        served.clear()
    exact = gradients(tiny_model(config, attention="eager").double(), [make_batch(config)])
    errors = torch.cat([(ours[name].double() - value).flatten() for name, value in exact.items()])
    assert errors.norm() < 5e-2 * torch.cat([value.flatten() for value in exact.values()]).norm()


def test_elsewhere_layer_and_activation_are_run() -> None:
    linear, inputs = some_layer()
    with torch.no_grad():
        expected = torch.relu(linear(inputs))
        for overwrite in (False, True):
            assert torch.equal(linear_and_relu(linear, inputs, overwrite), expected)
    assert not _relu_serves(linear, inputs)


class OnCuda(torch.Tensor):
    """A tensor that seems to be on a GPU."""

    is_cuda = True


def test_what_the_product_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapted(nn.Linear):
        pass

    linear, inputs = some_layer()
    there = inputs.bfloat16().as_subclass(OnCuda)
    half = copy.deepcopy(linear).bfloat16()
    assert _relu_serves(half, there)
    assert not _relu_serves(linear, there)  # without autocast, torch's own error is due
    assert not _relu_serves(linear, inputs.as_subclass(OnCuda))
    assert not _relu_serves(half, inputs.bfloat16())
    assert not _relu_serves(nn.Linear(24, 40, bias=False).bfloat16(), there)
    assert not _relu_serves(nn.Linear(24, 40, device="meta", dtype=torch.bfloat16), there)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _relu_serves(linear, inputs.as_subclass(OnCuda))
    hooked = copy.deepcopy(half)
    hooked.register_forward_hook(lambda *_: None)
    assert not _relu_serves(hooked, there)
    half.__class__ = Adapted
    assert not _relu_serves(half, there)


def test_remote_code_may_bring_the_operation_again(served: list[Any]) -> None:
    """A checkpoint with its code is loaded beside the package: both register the operation under one name."""
    linear, inputs = some_layer()
    before = results(linear, inputs)
    spec = importlib.util.spec_from_file_location("tahoex1_hf.again", packing_tahoe_x1.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    again._relu_serves = lambda *_: True  # type: ignore[attr-defined]
    for work in (linear_and_relu, again.linear_and_relu):
        for mine, theirs in zip(results(linear, inputs, work), before, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("lengths", [(3, 1, 4), (1,), (2, 2, 2, 5)])
def test_tokens_know_their_cells(lengths: tuple[int, ...]) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    layout = CellLayout.packed(bounds.int(), torch.Size((1, sum(lengths))))
    assert layout.token_cells is not None
    assert layout.token_cells.tolist() == [
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).tolist()
    ]


def test_boundaries_are_searched_whole() -> None:
    """On CUDA, torch 2.11's compiler reads a slice of them from the beginning of the whole."""
    seen: list[int] = []
    real = torch.searchsorted

    def search(boundaries: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(boundaries.storage_offset())
        return real(boundaries, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "searchsorted", search)
        CellLayout.packed(torch.tensor([0, 2, 5]), torch.Size((1, 5)))
    assert seen == [0]
