"""The attention backends agree, and use the mask that the configuration names."""

import logging
from collections.abc import Iterator

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
    without_labels,
)
from transformers.masking_utils import create_bidirectional_mask

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Model
from tahoex1_hf.packing_tahoe_x1 import observed_or_self

CLOSE = 1e-5  # absolute, on float32 outputs of order one

pytestmark = pytest.mark.usefixtures("uncompiled")
every_shape = pytest.mark.parametrize("shape", SHAPES)
other_backends = pytest.mark.parametrize("attention", ["eager", "flex_attention"])


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Run flex attention as plain torch, which computes the same at once instead of compiling for every shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def brute_force_mask(batch: dict[str, torch.Tensor], style: str) -> torch.Tensor:
    """Return whether a query (row) may see a key, `(cells, length, length)`, straight from the written rule."""
    valid, target = batch["attention_mask"].bool(), batch["target_mask"]
    cells, length = valid.shape
    allowed = torch.zeros(cells, length, length, dtype=torch.bool)
    for b in range(cells):
        for q in range(length):
            for k in range(length):
                hidden = style == "observed_or_self" and bool(target[b, k]) and q != k
                allowed[b, q, k] = bool(valid[b, k]) and not hidden
    return allowed


@other_backends
@every_shape
def test_backends_agree(shape: str, attention: str) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = make_batch(config)
    with torch.no_grad():
        expected = tiny_model(config)(**batch)
        ours = tiny_model(config, attention=attention)(**batch)
    valid = batch["attention_mask"].bool()
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name in ("expression_predictions", "cell_expression_predictions"):
        assert largest_difference(ours[name][valid], expected[name][valid]) < CLOSE, name


@other_backends
@pytest.mark.parametrize("shape", ["plain", "drugs_observed_or_self_mean"])
def test_backends_agree_on_packed_rows(shape: str, attention: str) -> None:
    config = tiny_config(**SHAPES[shape])
    row = packed(make_batch(config))
    with torch.no_grad():
        expected = tiny_model(config)(**row)
        ours = tiny_model(config, attention=attention)(**row)
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE
    assert largest_difference(ours.expression_predictions, expected.expression_predictions) < CLOSE


@every_shape
def test_eager_and_sdpa_gradients_agree(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = make_batch(config)
    # In float64, since roundings of float32 differ from one kind of CPU to another.
    expected = gradients(tiny_model(config).double(), [batch])
    ours = gradients(tiny_model(config, attention="eager").double(), [batch])
    assert largest_relative_difference(ours, expected) < 1e-9


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("style", ["full", "observed_or_self"])
def test_mask_against_brute_force(style: str, attention: str) -> None:
    config = tiny_config(attention_mask_style=style)
    batch = make_batch(config)
    model = tiny_model(config, TahoeX1Model, attention)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    model(**without_labels(batch))
    (mask,) = seen
    allowed = mask[:, 0] if attention == "sdpa" else mask[:, 0] == 0
    expected = brute_force_mask(batch, style)
    assert torch.equal(allowed.expand_as(expected), expected)


def test_attention_weights_follow_the_mask() -> None:
    config = tiny_config(attention_mask_style="observed_or_self")
    batch = make_batch(config)
    outputs = tiny_model(config, TahoeX1Model, "eager")(**without_labels(batch), output_attentions=True)
    allowed = brute_force_mask(batch, "observed_or_self").unsqueeze(1)
    assert len(outputs.attentions) == config.num_hidden_layers
    for weights in outputs.attentions:
        assert weights.shape == (4, config.num_attention_heads, 14, 14)
        assert weights.masked_select(~allowed).abs().max() == 0
        assert weights.masked_select(allowed).min() > 0
        assert largest_difference(weights.sum(-1), torch.ones(weights.shape[:-1])) < CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("style", ["full", "observed_or_self"])
@pytest.mark.parametrize("kind", ["bool", "int", "float", "float16"])
def test_masks_of_queries_and_keys(attention: str, style: str, kind: str) -> None:
    """They are joined with what padding and targets leave to see, and read alike by every backend."""
    config = tiny_config(attention_mask_style=style)
    batch = make_batch(config)
    length = batch["input_ids"].shape[1]
    seen = torch.rand(len(batch["input_ids"]), 1, length, length, generator=torch.Generator().manual_seed(3)) < 0.6
    seen |= torch.eye(length, dtype=torch.bool)
    masks = {
        "bool": seen,
        "int": seen.long(),
        "float": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        "float16": torch.zeros(seen.shape, dtype=torch.float16).masked_fill(~seen, -torch.inf),
    }
    model = tiny_model(config, TahoeX1Model, "eager")
    arguments = {name: batch[name] for name in ("input_ids", "expression_values", "target_mask")}
    valid = batch["attention_mask"].bool()
    outputs = model(**arguments, attention_mask=masks[kind], output_attentions=True)
    allowed = seen & valid[:, None, None]
    if style == "observed_or_self":
        allowed = allowed & (~batch["target_mask"][:, None, None] | torch.eye(length, dtype=torch.bool))
    for weights in outputs.attentions:
        for cell in range(len(valid)):
            tokens = valid[cell]
            assert torch.equal(weights[cell][:, tokens] > 0, allowed[cell][:, tokens].expand(4, -1, -1))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        ours = model(**arguments, attention_mask=masks[kind]).last_hidden_state
    assert largest_difference(ours[valid], outputs.last_hidden_state[valid]) < CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("pack", [False, True])
def test_attention_weights_are_there_on_every_backend(
    attention: str, pack: bool, caplog: pytest.LogCaptureFixture
) -> None:
    batch = make_batch(tiny_config())
    arguments = packed(batch) if pack else batch
    expected = tiny_model(tiny_config(), attention="eager")(**arguments, output_attentions=True)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    ours = tiny_model(tiny_config(), attention=attention)(**arguments, output_attentions=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f'"{attention}" keeps no weights' in caplog.text
    assert len(ours.attentions) == 2
    for weights, wanted in zip(ours.attentions, expected.attentions, strict=True):
        assert torch.equal(weights, wanted)
    assert torch.equal(ours.loss, expected.loss)


def test_combining_masks_with_or_would_do_nothing() -> None:
    # This is why the model combines masks with "and": transformers starts from a mask that allows everything.
    config = tiny_config()
    config._attn_implementation = "sdpa"
    batch = make_batch(config)
    rule = observed_or_self(~batch["target_mask"])
    arguments = {"config": config, "inputs_embeds": torch.zeros(4, 14, 32), "attention_mask": batch["attention_mask"]}
    combined = {
        how: create_bidirectional_mask(**arguments, **{how: rule}) for how in ("and_mask_function", "or_mask_function")
    }
    expected = brute_force_mask(batch, "observed_or_self")
    assert torch.equal(combined["and_mask_function"][:, 0].expand_as(expected), expected)
    assert not torch.equal(combined["or_mask_function"][:, 0].expand_as(expected), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_targets_do_not_see_each_other(attention: str) -> None:
    config = tiny_config(attention_mask_style="observed_or_self", num_hidden_layers=1)
    batch = without_labels(make_batch(config, lengths=(12,)))
    model = tiny_model(config, attention=attention)
    first, second = batch["target_mask"][0].nonzero().flatten()[:2].tolist()
    observed = (~batch["target_mask"][0]).nonzero().flatten()[-1].item()

    def change_at_first_target(position: int) -> float:
        changed = batch["input_ids"].clone()
        changed[0, position] = config.vocab_size - 1 - changed[0, position] % 2
        with torch.no_grad():
            before = model(**batch).expression_predictions[0, first]
            after = model(**batch | {"input_ids": changed}).expression_predictions[0, first]
        return (before - after).abs().item()

    assert change_at_first_target(second) == 0
    assert change_at_first_target(observed) > 1e-3
    model.config.attention_mask_style = "full"
    assert change_at_first_target(second) > 1e-3


def test_without_targets_both_styles_are_the_same() -> None:
    batch = make_batch(tiny_config(), targets=False)
    with torch.no_grad():
        full = tiny_model(tiny_config())(**batch)
        masked = tiny_model(tiny_config(attention_mask_style="observed_or_self"))(**batch)
        none_hidden = tiny_model(tiny_config(attention_mask_style="observed_or_self"))(
            **batch, target_mask=torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        )
    assert torch.equal(full.expression_predictions, masked.expression_predictions)
    valid = batch["attention_mask"].bool()
    difference = largest_difference(none_hidden.expression_predictions[valid], full.expression_predictions[valid])
    assert difference < CLOSE


def test_switching_the_backend_of_a_loaded_model(tmp_path) -> None:
    config = tiny_config()
    tiny_model(config).save_pretrained(tmp_path)
    model = TahoeX1ForPreTraining.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    batch = make_batch(config)
    eager = model(**batch).loss
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == model.tahoe.config._attn_implementation == "sdpa"
    assert model(**batch).loss.item() == pytest.approx(eager.item(), rel=1e-6)
    assert TahoeX1ForPreTraining.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_attention"):
        tiny_model(tiny_config(), attention="no_such_attention")


def test_eager_attention_is_exact_in_float64() -> None:
    config = tiny_config()
    batch = make_batch(config, targets=False)
    batch["expression_values"] = batch["expression_values"].double()
    eager, sdpa = (tiny_model(config, attention=attention).double() for attention in ("eager", "sdpa"))
    ours, theirs = (model(**batch).expression_predictions for model in (eager, sdpa))
    assert largest_difference(ours, theirs) < 1e-12  # a softmax in float32 would leave 1e-7
