"""Layers made ready for inference compute what the model's own compute."""

import numpy as np
import pytest
import torch
from helpers import SHAPES, largest_difference, make_batch, tiny_config, tiny_model
from torch import nn

from tahoex1_hf import TahoeX1Config, TahoeX1Model
from tahoex1_hf.inference import encoder, prepared_layers
from tahoex1_hf.inference.prepared_layers import (
    KeptLayers,
    PreparedLayer,
    blocks_on_cpu,
    packs_weights,
    prepare_layers,
    round_layers,
)
from tahoex1_hf.inference.ragged import ragged_forward
from tahoex1_hf.padding_tahoe_x1 import EncodedCells

LENGTHS = (14, 14, 9, 3)


def embedded(model: TahoeX1Model, all_tokens: bool, dtype: torch.dtype, ready: bool) -> list[torch.Tensor]:
    batch = make_batch(model.config, LENGTHS, targets=False)
    valid = batch["attention_mask"].bool()
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    layers = prepare_layers(model, dtype) if ready else None
    assert (layers is not None) == ready
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = ragged_forward(
            model, batch["input_ids"][valid], batch["expression_values"][valid], offsets, batch.get("drug_ids"),
            all_tokens, layers,
        )  # fmt: skip
    return [output for output in outputs if output is not None]


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_layers_of_the_model(shape: str, all_tokens: bool) -> None:
    model = tiny_model(tiny_config(**SHAPES[shape]), TahoeX1Model)
    expected = embedded(model, all_tokens, torch.float32, ready=False)
    ours = embedded(model, all_tokens, torch.float32, ready=True)
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
    exact = embedded(model, all_tokens, torch.float32, ready=False)
    automatic, ours = (embedded(model, all_tokens, torch.bfloat16, ready) for ready in (False, True))
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
            assert torch.equal(_dense(getattr(one, name)), _dense(getattr(other, name)))


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


class Tokens(list):
    """As much of a tokenizer as an encoder asks for."""

    pad_token_id, pad_value = 0, -2.0

    def __init__(self, size: int) -> None:
        super().__init__(range(size))


def encoded(config: TahoeX1Config) -> EncodedCells:
    batch = make_batch(config, LENGTHS, targets=False)
    valid = batch["attention_mask"].bool().numpy()
    drugs = batch["drug_ids"].numpy() if "drug_ids" in batch else None
    return EncodedCells(
        batch["input_ids"].numpy()[valid], batch["expression_values"].numpy()[valid],
        np.concatenate([[0], np.cumsum(LENGTHS)]), drugs, np.arange(len(LENGTHS)), np.zeros(0, int),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "observed_or_self"])
def test_an_encoder_on_a_cpu_takes_them_where_they_are_packed(shape: str) -> None:
    config = tiny_config(hidden_size=64, **SHAPES[shape])
    tokenizer, model = Tokens(config.vocab_size), tiny_model(config, TahoeX1Model)
    exact, ours = (
        encoder.CellEncoder(model, tokenizer, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert exact._prepared() is None
    assert exact.batch_tokens == 8192
    assert (ours._prepared() is not None) == packs_weights(torch.bfloat16)
    assert ours.batch_tokens == (4096 if packs_weights(torch.bfloat16) else 8192)
    assert (exact.embed(encoded(config)) * ours.embed(encoded(config))).sum(1).min() > 0.999


def scale_in_place(model: TahoeX1Model) -> None:
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.mul_(1.5)


def scale_a_bias(model: TahoeX1Model) -> None:
    with torch.inference_mode():
        model.layers[1].self_attn.q_proj.bias.add_(1)


def put_another_tensor(model: TahoeX1Model) -> None:
    projection = model.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.detach() * 2)


def set_data(model: TahoeX1Model) -> None:
    weight = model.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 2


def load_others(model: TahoeX1Model) -> None:
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


def put_another_layer(model: TahoeX1Model) -> None:
    first, second = model.layers
    model.layers = nn.ModuleList([second, first])


CHANGES = (scale_in_place, scale_a_bias, put_another_tensor, set_data, load_others, put_another_layer)


def test_prepared_layers_are_kept_until_a_weight_changes() -> None:
    model = tiny_model(tiny_config(), TahoeX1Model)
    kept = KeptLayers(model, torch.bfloat16)
    for change in CHANGES:
        before = kept.current()
        assert before is kept.current()
        change(model)
        after, expected = kept.current(), prepare_layers(model, torch.bfloat16)
        assert after is not before, change.__name__
        for ours, anew in zip(after, expected, strict=True):
            assert ours.layer is anew.layer
            for name in ("query_key_value", "output", "up", "down"):
                one, other = getattr(ours, name), getattr(anew, name)
                assert torch.equal(_dense(one), _dense(other)), change.__name__
                assert torch.equal(one.bias, other.bias), change.__name__


def _dense(product: prepared_layers.Product) -> torch.Tensor:
    return product.weight.to_dense() if product.packed else product.weight


def test_layers_with_an_adapter_are_not_taken_for_kept_ones() -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny_model(tiny_config(), TahoeX1Model)
    kept = KeptLayers(model, torch.bfloat16)
    assert kept.current() is not None
    model.layers[0].mlp.up_proj.__class__ = Adapted
    assert kept.current() is None
    model.layers[0].mlp.up_proj.__class__ = nn.Linear
    assert kept.current() is not None


def test_weights_made_in_inference_mode_are_prepared_each_time() -> None:
    with torch.inference_mode():
        model = tiny_model(tiny_config(), TahoeX1Model)
    kept = KeptLayers(model, torch.bfloat16)
    before = kept.current()
    assert before is not None
    assert kept.current() is not before


@pytest.mark.parametrize("shape", list(SHAPES)[:2])
def test_an_encoder_gives_the_same_bits_with_kept_layers(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(hidden_size=64, **SHAPES[shape])
    model = tiny_model(config, TahoeX1Model)
    monkeypatch.setattr(encoder.CellEncoder, "_packs", True)
    ours = encoder.CellEncoder(model, Tokens(config.vocab_size), device="cpu", dtype="bfloat16")
    first, second = ours.embed(encoded(config)), ours.embed(encoded(config))
    assert np.array_equal(first, second)
    load_others(model)
    changed = ours.embed(encoded(config))
    anew = encoder.CellEncoder(model, Tokens(config.vocab_size), device="cpu", dtype="bfloat16")
    assert np.array_equal(changed, anew.embed(encoded(config)))
    assert not np.array_equal(changed, first)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "observed_or_self"])
def test_an_encoder_on_a_gpu_takes_them(shape: str) -> None:
    config = tiny_config(hidden_size=64, **SHAPES[shape])
    cells = encoded(config)
    tokenizer = Tokens(config.vocab_size)
    found = {}
    for name, device, dtype in (("exact", "cpu", "float32"), ("gpu", "cuda", "bfloat16")):
        made = encoder.CellEncoder(
            tiny_model(config, TahoeX1Model), tokenizer, batch_tokens=25, device=device, dtype=dtype
        )
        assert (made._prepared() is None) == (device == "cpu")
        found[name] = made.embed(cells)
    assert (found["exact"] * found["gpu"]).sum(1).min() > 0.999
