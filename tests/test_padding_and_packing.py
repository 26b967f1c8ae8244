"""A cell's result depends on the cell alone: not on its batch, the padding, the order, or its hidden values."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    DRUG,
    PAD,
    SHAPES,
    gradients,
    largest_difference,
    largest_relative_difference,
    make_batch,
    packed,
    rows,
    tiny_config,
    tiny_model,
    without_labels,
)

from tahoex1_hf import TahoeX1ForSequenceClassification, TahoeX1ForTokenClassification, TahoeX1Model

CLOSE = 1e-5  # absolute, on float32 outputs of order one
CLOSE_GRADIENTS = 2e-5  # relative to the largest of each tensor
PREDICTIONS = ("expression_predictions", "cell_expression_predictions")
pytestmark = pytest.mark.usefixtures("uncompiled")
every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Run flex attention as plain torch, which computes the same at once instead of compiling for every shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("targets", [True, False])
@every_shape
def test_packed_equals_padded(shape: str, targets: bool) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config, targets=targets)
    valid, row = batch["attention_mask"].bool(), packed(batch)
    assert row["input_ids"].shape == (1, 41)
    with torch.no_grad():
        padded, ours = model(**batch), model(**row)
        hidden = model.tahoe(**without_labels(row)).last_hidden_state[0]
        expected_hidden = model.tahoe(**without_labels(batch)).last_hidden_state[valid]
    assert ours.pooler_output.shape == (4, config.hidden_size)
    assert largest_difference(ours.pooler_output, padded.pooler_output) < CLOSE
    assert largest_difference(hidden, expected_hidden) < CLOSE
    for name in PREDICTIONS:
        assert largest_difference(ours[name][0], padded[name][valid]) < CLOSE, name
    if targets:
        assert ours.loss.item() == pytest.approx(padded.loss.item(), rel=1e-6)
        assert ours.expression_loss.item() == pytest.approx(padded.expression_loss.item(), rel=1e-6)
    else:
        assert ours.loss is None


@every_shape
def test_packed_gradients_equal_padded_ones(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config)
    padded, ours = gradients(model, [batch]), gradients(model, [packed(batch)])
    assert largest_relative_difference(ours, padded) < CLOSE_GRADIENTS


def test_packed_classification() -> None:
    config = tiny_config(num_labels=3)
    model, batch = tiny_model(config, TahoeX1ForSequenceClassification), make_batch(config, targets=False)
    labels = torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        padded, ours = model(**batch, labels=labels), model(**packed(batch), labels=labels)
    assert largest_difference(ours.logits, padded.logits) < CLOSE
    assert ours.loss.item() == pytest.approx(padded.loss.item(), rel=1e-6)


@every_shape
def test_packed_gene_classification(shape: str) -> None:
    config = tiny_config(**SHAPES[shape], num_labels=3)
    model, batch = tiny_model(config, TahoeX1ForTokenClassification), make_batch(config, targets=False)
    valid = batch["attention_mask"].bool()
    labels = torch.randint(0, 3, valid.shape, generator=torch.Generator().manual_seed(0))
    labels[torch.rand(valid.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = -100
    labels[~valid] = 1  # labels of padding do not count, whatever they are
    with torch.no_grad():
        padded, ours = model(**batch, labels=labels), model(**packed(batch | {"labels": labels}))
    assert padded.logits.shape == (*valid.shape, 3)
    assert largest_difference(ours.logits[0], padded.logits[valid]) < CLOSE
    assert ours.loss.item() == pytest.approx(padded.loss.item(), rel=1e-6)


def test_one_cell_packed() -> None:
    config = tiny_config()
    model, batch = tiny_model(config), make_batch(config, lengths=(7,))
    with torch.no_grad():
        assert largest_difference(model(**packed(batch)).pooler_output, model(**batch).pooler_output) < CLOSE


@every_shape
def test_one_by_one_equals_a_batch_of_eight(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    lengths = (9, 14, 6, 12, 5, 30, 7, 21)
    model, batch = tiny_model(config), make_batch(config, lengths)
    with torch.no_grad():
        together = model(**batch)
        for i, length in enumerate(lengths):
            cell = {n: t[i : i + 1, :length] if t.dim() == 2 else t[i : i + 1] for n, t in batch.items()}
            alone = model(**cell)
            assert largest_difference(alone.pooler_output, together.pooler_output[i : i + 1]) < CLOSE
            for name in PREDICTIONS:
                assert largest_difference(alone[name][0], together[name][i, :length]) < CLOSE, name


@every_shape
def test_order_of_cells_does_not_matter(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        expected, shuffled = model(**batch), model(**rows(batch, order))
    assert largest_difference(shuffled.pooler_output, expected.pooler_output[order]) < CLOSE
    assert shuffled.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@every_shape
def test_order_of_genes_does_not_matter(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config, lengths=(15, 15))
    first_gene = 2 if config.num_drugs else 1
    order = torch.cat([torch.arange(first_gene), first_gene + torch.randperm(15 - first_gene)])
    shuffled = {name: tensor[:, order] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}
    with torch.no_grad():
        expected, ours = model(**batch), model(**shuffled)
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE
    assert largest_difference(ours.expression_predictions, expected.expression_predictions[:, order]) < CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@every_shape
def test_length_of_padding_does_not_matter(shape: str, attention: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model = tiny_model(config, attention=attention)
    short, long = make_batch(config), make_batch(config, padded_to=23)
    with torch.no_grad():
        expected, ours = model(**short), model(**long)
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize("fill", [0.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_shape
def test_padding_may_hold_anything(shape: str, attention: str, fill: float) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config, attention=attention), make_batch(config)
    pad = ~batch["attention_mask"].bool()
    changed = {
        "input_ids": batch["input_ids"].masked_fill(pad, DRUG),  # also another cell's special token
        "expression_values": batch["expression_values"].masked_fill(pad, fill),
        "labels": batch["labels"].masked_fill(pad, fill),
        "target_mask": batch["target_mask"],
    }
    assert not torch.equal(changed["input_ids"], batch["input_ids"])
    with torch.no_grad():
        expected, ours = model(**batch), model(**batch | changed)
        as_targets = model(**batch | changed | {"target_mask": batch["target_mask"] | pad})
    for outputs in (ours, as_targets):
        assert torch.equal(outputs.pooler_output, expected.pooler_output)
        assert torch.equal(outputs.loss, expected.loss)
        for name in PREDICTIONS:
            assert torch.equal(outputs[name][~pad], expected[name][~pad]), name
    filled = gradients(model, [batch | changed])
    assert all(gradient.isfinite().all() for gradient in filled.values())
    assert largest_relative_difference(filled, gradients(model, [batch])) < 1e-6


@pytest.mark.parametrize("fill", [0.0, 1e30, math.nan])
@every_shape
def test_hidden_values_are_not_read(shape: str, fill: float) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config)
    changed = batch | {
        "expression_values": batch["expression_values"].masked_fill(batch["target_mask"], fill),
        "labels": batch["labels"].masked_fill(~batch["target_mask"], fill),
    }
    with torch.no_grad():
        expected, ours = model(**batch), model(**changed)
    assert torch.equal(ours.expression_predictions, expected.expression_predictions)
    assert torch.equal(ours.cell_expression_predictions, expected.cell_expression_predictions)
    assert torch.equal(ours.loss, expected.loss)
    before, after = gradients(model, [batch]), gradients(model, [changed])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_values_are_read() -> None:
    config = tiny_config()
    model, batch = tiny_model(config), make_batch(config)
    observed = batch["attention_mask"].bool() & ~batch["target_mask"] & (batch["expression_values"] > 0)
    changed = batch | {"expression_values": batch["expression_values"] + 5.0 * observed}
    with torch.no_grad():
        assert largest_difference(model(**changed).pooler_output, model(**batch).pooler_output) > 1e-3


@every_shape
def test_attention_mask_is_derived_from_the_padding_token(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config)
    derived = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    with torch.no_grad():
        expected = model(**batch)
        for ours in (model(**derived), model(**batch | {"attention_mask": batch["attention_mask"].bool()})):
            assert torch.equal(ours.pooler_output, expected.pooler_output)
            assert torch.equal(ours.loss, expected.loss)


def test_without_a_padding_token_every_position_counts() -> None:
    config = tiny_config(pad_token_id=None)
    model, batch = tiny_model(config, TahoeX1Model), make_batch(config, targets=False)
    assert (batch["input_ids"] == PAD).any()
    everywhere = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        derived = model(batch["input_ids"], batch["expression_values"])
        expected = model(**batch | {"attention_mask": everywhere})
    assert largest_difference(derived.pooler_output, expected.pooler_output) < CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_shape
def test_a_row_of_padding_alone(shape: str, attention: str) -> None:
    # This happens where the last batch is filled up to a fixed size.
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config, attention=attention), make_batch(config)
    empty: dict[str, Any] = {name: torch.zeros_like(tensor[:1]) for name, tensor in batch.items()}
    with_empty = {name: torch.cat([tensor, empty[name]]) for name, tensor in batch.items()}
    with torch.no_grad():
        expected, ours = model(**batch), model(**with_empty)
    assert largest_difference(ours.pooler_output[:4], expected.pooler_output) < CLOSE
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert ours.pooler_output.isfinite().all()
    before, after = gradients(model, [batch]), gradients(model, [with_empty])
    assert largest_relative_difference(after, before) < CLOSE_GRADIENTS


def test_mean_with_padding_counts_the_padding_and_mean_does_not() -> None:
    batch = make_batch(tiny_config())
    valid = batch["attention_mask"].bool()
    for pooling, counted in (("mean", valid), ("mean_with_padding", torch.ones_like(valid))):
        model = tiny_model(tiny_config(cell_pooling=pooling), TahoeX1Model)
        with torch.no_grad():
            outputs = model(**without_labels(batch))
        expected = torch.stack([h[c].mean(0) for h, c in zip(outputs.last_hidden_state, counted, strict=True)])
        assert largest_difference(outputs.pooler_output, expected) < CLOSE
    with torch.no_grad():
        longer = model(**without_labels(make_batch(tiny_config(), padded_to=30)))
    assert largest_difference(longer.pooler_output, outputs.pooler_output) > 1e-2


@pytest.mark.parametrize("pack", [False, True])
def test_each_cell_gets_its_own_drug(pack: bool) -> None:
    config = tiny_config(**SHAPES["drugs"])
    model, batch = tiny_model(config), make_batch(config)

    def cells(drug_ids: list[int] | None) -> torch.Tensor:
        arguments = batch | {"drug_ids": torch.tensor(drug_ids or [0])}
        arguments = packed(arguments) if pack else arguments
        if drug_ids is None:
            del arguments["drug_ids"]
        with torch.no_grad():
            return model(**arguments).pooler_output

    expected, changed = cells([1, 2, 3, 4]), cells([1, 5, 3, 4])
    moved = (expected - changed).abs().amax(1)
    assert moved[1] > 1e-2
    assert moved[[0, 2, 3]].max() == 0
    assert torch.equal(cells(None), cells([0, 0, 0, 0]))  # row 0: no or unknown drug


# Every gene from the cell embedding ---------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_the_loss_over_every_gene(scaled: bool) -> None:
    config = tiny_config(num_drugs=0, scale_targets=scaled)
    model, batch = tiny_model(config), make_batch(config)
    number = len(batch["input_ids"])
    labels = torch.arange(float(number * config.vocab_size)).view(number, -1).remainder(50)
    labels[:, :4] = -100
    every: dict[str, torch.Tensor] = {}

    def keep(_: Any, arguments: tuple, output: torch.Tensor) -> None:
        every["given" if arguments[2] is None else "tokens"] = output

    model.cell_decoder.register_forward_hook(keep)
    with torch.no_grad():
        usual, found = model(**batch), model(**batch, cell_labels=labels)
        in_row = model(**packed(batch), cell_labels=labels)
    # The prediction of a gene is the one that its token would have.
    at_tokens = every["given"].gather(1, batch["input_ids"])
    assert largest_difference(at_tokens, usual.cell_expression_predictions) < CLOSE
    wanted = 2 * (labels - 1) / (config.num_bins - 2) - 1 if scaled else labels
    expected = (every["given"] - wanted)[:, 4:].double().square().mean().item()
    assert found.cell_expression_loss.item() == pytest.approx(expected, rel=1e-5)
    assert in_row.cell_expression_loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(found.expression_loss, usual.expression_loss)
    assert found.loss.item() == pytest.approx((found.expression_loss.item() + expected) / 2, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 64), (4, 0), (4, 10**6)])
def test_labels_of_every_gene_in_a_wrong_shape(shape: tuple[int, int]) -> None:
    config = tiny_config(num_drugs=0)
    with pytest.raises(ValueError, match="cell_labels has shape"):
        tiny_model(config)(**make_batch(config), cell_labels=torch.zeros(shape))
