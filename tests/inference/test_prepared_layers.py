"""Layers made ready for inference compute what the model's own compute."""

import pytest
import torch
from encoder_parts import Tokens, dense, embedded
from helpers import SHAPES, largest_difference, make_batch, tiny_config, tiny_model
from torch import nn

from tahoex1_hf import TahoeX1Model
from tahoex1_hf.inference import encoder, prepared_layers
from tahoex1_hf.inference.kept_layers import prepare_layers
from tahoex1_hf.inference.prepared_layers import PreparedLayer, blocks_on_cpu, packs_weights, round_layers

LENGTHS = (14, 14, 9, 3)


def outputs(model: TahoeX1Model, all_tokens: bool, dtype: torch.dtype, ready: bool) -> list[torch.Tensor]:
    layers = [PreparedLayer.make(layer, dtype) for layer in model.layers] if ready else None
    assert layers is None or None not in layers
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return embedded(model, LENGTHS, all_tokens, layers)


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_layers_of_the_model(shape: str, all_tokens: bool) -> None:
    model = tiny_model(tiny_config(**SHAPES[shape]), TahoeX1Model)
    expected = outputs(model, all_tokens, torch.float32, ready=False)
    ours = outputs(model, all_tokens, torch.float32, ready=True)
    for mine, theirs in zip(ours, expected, strict=True):
        assert largest_difference(mine, theirs) < 1e-5


@pytest.fixture(params=["packed", "plain"])
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return how weights are laid out, as on CPUs with and without products in bfloat16."""
    if request.param == "plain":
        monkeypatch.setattr(prepared_layers, "packs_weights", lambda dtype: False)
    elif not packs_weights(torch.bfloat16):
        pytest.skip("this CPU has no products in bfloat16 for which oneDNN lays weights out")
    return str(request.param)


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_precise_as_autocast(shape: str, all_tokens: bool, weights: str) -> None:
    model = tiny_model(tiny_config(**SHAPES[shape]), TahoeX1Model)
    exact = outputs(model, all_tokens, torch.float32, ready=False)
    automatic, ours = (outputs(model, all_tokens, torch.bfloat16, ready) for ready in (False, True))
    for mine, theirs, value in zip(ours, automatic, exact, strict=True):
        assert mine.dtype == theirs.dtype
        errors = [float((tensor.float() - value).norm() / value.norm()) for tensor in (mine, theirs)]
        # The same roundings, but for sums in another order: of some hundred values, the norms hardly differ.
        assert errors[0] < 1.3 * errors[1] + 1e-3


@pytest.mark.parametrize(("rows", "width"), [(0, 2048), (1, 2048), (3000, 2048), (8192, 2048), (5000, 10240)])
def test_blocks_on_a_cpu_are_even_and_hold_all_rows(rows: int, width: int) -> None:
    states = torch.arange(rows)
    sizes = [len(part) for part in blocks_on_cpu(states, width)]
    assert torch.equal(torch.cat(blocks_on_cpu(states, width)), states)
    assert max(sizes) * width <= 1.5 * 2**22
    assert max(sizes) - min(sizes) <= len(sizes)


def test_a_layer_that_something_was_done_to_is_left_alone() -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny_model(tiny_config(), TahoeX1Model)
    assert prepare_layers(model, torch.bfloat16) is not None
    assert prepare_layers(model.to(torch.bfloat16), torch.bfloat16) is None  # nothing to gain, and a stream of its own
    model = model.float()
    model.layers[1].mlp.up_proj.__class__ = Adapted
    assert prepare_layers(model, torch.bfloat16) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_layers_give_the_same_bits(shape: str) -> None:
    config = tiny_config(hidden_size=64, **SHAPES[shape])
    batch = make_batch(config, LENGTHS, targets=False)
    whole, rounded = tiny_model(config, TahoeX1Model), tiny_model(config, TahoeX1Model)
    round_layers(rounded, torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in rounded.named_parameters()}
    assert {kind for name, kind in kinds.items() if "_proj" in name} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if "_proj" not in name} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, ours = whole(**batch), rounded(**batch)
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)
    for one, other in zip(
        prepare_layers(rounded, torch.bfloat16) or [], prepare_layers(whole, torch.bfloat16) or [], strict=True
    ):
        for name in ("query_key_value", "output", "up", "down"):
            assert torch.equal(dense(getattr(one, name)), dense(getattr(other, name)))


def test_layers_that_cannot_be_prepared_are_not_rounded() -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny_model(tiny_config(), TahoeX1Model)
    model.layers[1].mlp.up_proj.__class__ = Adapted
    round_layers(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_weight_alone_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_layers, "packs_weights", lambda dtype: False)
    model = tiny_model(tiny_config(), TahoeX1Model)
    round_layers(model, torch.bfloat16)
    made = PreparedLayer.make(model.layers[0], torch.bfloat16)
    assert made is not None
    assert made.down.weight.data_ptr() == model.layers[0].mlp.down_proj.weight.data_ptr()


@pytest.mark.parametrize("sole_user", [False, True])
def test_only_who_alone_uses_a_model_rounds_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch, sole_user: bool) -> None:
    config = tiny_config()
    model = tiny_model(config, TahoeX1Model)
    monkeypatch.setattr(encoder, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(TahoeX1Model, "to", lambda self, device: self)  # there is none
    encoder.CellEncoder(model, Tokens(config.vocab_size), dtype="bfloat16", sole_user=sole_user)
    assert model.layers[0].mlp.up_proj.weight.dtype == (torch.bfloat16 if sole_user else torch.float32)
