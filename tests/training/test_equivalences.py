"""Training gives the same gradients however it is arranged: checkpointed, accumulated, compiled, in bfloat16."""

import copy
import shutil
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
    rows,
    tiny_config,
    tiny_model,
    without_labels,
)
from instructions import known_instructions  # noqa: F401 - a fixture
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from tahoex1_hf import (
    TahoeX1ForPreTraining,
    TahoeX1ForSequenceClassification,
    TahoeX1ForTokenClassification,
    TahoeX1Model,
)
from tahoex1_hf.training.pretraining import compile_layers

CLOSE = 1e-5
CLOSE_GRADIENTS = 2e-5
every_shape = pytest.mark.parametrize("shape", SHAPES)
without_dropout = {"expression_encoder_dropout": 0.0}


def test_the_loss_is_the_mean_over_the_targets() -> None:
    config = tiny_config()
    model, batch = tiny_model(config), make_batch(config)
    outputs = model(**batch)
    targets = batch["target_mask"]
    expression = (outputs.expression_predictions - batch["labels"])[targets].square().mean()
    cell_expression = (outputs.cell_expression_predictions - batch["labels"])[targets].square().mean()
    assert outputs.expression_loss.item() == pytest.approx(expression.item(), rel=1e-6)
    assert outputs.cell_expression_loss.item() == pytest.approx(cell_expression.item(), rel=1e-6)
    assert outputs.loss.item() == pytest.approx((expression + cell_expression).item() / 2, rel=1e-6)
    assert outputs.loss.shape == outputs.expression_loss.shape == ()


def test_scaled_targets() -> None:
    config = tiny_config(scale_targets=True, num_bins=51)
    model, batch = tiny_model(config), make_batch(config)
    outputs = model(**batch)
    scaled = 2 * (batch["labels"] - 1) / 49 - 1  # bins 1 to 50 onto -1 to 1
    expected = (outputs.expression_predictions - scaled)[batch["target_mask"]].square().mean()
    assert outputs.expression_loss.item() == pytest.approx(expected.item(), rel=1e-6)


@every_shape
def test_no_targets_no_loss(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config)
    batch["target_mask"] = torch.zeros_like(batch["target_mask"])
    assert model(**batch).loss.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(model, [batch]).values())


def test_targets_in_the_padding_do_not_count() -> None:
    config = tiny_config()
    model, batch = tiny_model(config), make_batch(config)
    changed = batch | {"target_mask": batch["target_mask"] | ~batch["attention_mask"].bool()}
    assert torch.equal(model(**changed).loss, model(**batch).loss)


@pytest.mark.parametrize("pack", [False, True])
@every_shape
def test_four_times_four_accumulated_is_sixteen(shape: str, pack: bool) -> None:
    config = tiny_config(**SHAPES[shape])
    lengths = (9, 14, 6, 12, 5, 30, 7, 21, 20, 4, 11, 16, 8, 13, 10, 18)  # so that the microbatches weigh differently
    model, batch = tiny_model(config), make_batch(config, lengths)
    whole = gradients(model, [batch])
    arrange = packed if pack else dict
    micro: list[dict[str, Any]] = [arrange(rows(batch, slice(i, i + 4))) for i in range(0, 16, 4)]
    for num_targets in (batch["target_mask"].sum(), int(batch["target_mask"].sum())):
        accumulated = gradients(model, [b | {"num_items_in_batch": num_targets} for b in micro])
        assert largest_relative_difference(accumulated, whole) < CLOSE_GRADIENTS
    # The plain mean over microbatches would differ.
    assert largest_relative_difference(gradients(model, micro), whole) > 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_shape
def test_gradient_checkpointing_changes_nothing(shape: str, use_reentrant: bool) -> None:
    config = tiny_config(**SHAPES[shape], **without_dropout)
    model, batch = tiny_model(config).train(), make_batch(config)
    calls: list[int] = []
    model.tahoe.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients(model, [batch])
    assert len(calls) == 1
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # reentrant checkpointing needs it; harmless otherwise
    assert model.is_gradient_checkpointing
    checkpointed = gradients(model, [batch])
    assert len(calls) == 3  # forward, and once more in backward
    assert all(torch.equal(checkpointed[name], expected[name]) for name in expected)
    packed_row = packed(batch)
    assert largest_relative_difference(gradients(model, [packed_row]), expected) < CLOSE_GRADIENTS
    assert len(calls) == 5


def test_dropout_is_only_in_training_and_only_where_the_original_has_it() -> None:
    config = tiny_config(expression_encoder_dropout=0.5)
    model, batch = tiny_model(config), make_batch(config)
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    model.train()
    assert not torch.equal(model(**batch).loss, model(**batch).loss)
    model.tahoe.embeddings.expression_encoder.dropout.p = 0.0
    assert torch.equal(model(**batch).loss, model(**batch).loss)


def test_every_parameter_gets_a_gradient() -> None:
    config = tiny_config(**SHAPES["drugs"])
    model = tiny_model(config)
    model(**make_batch(config)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    flag = model.tahoe.embeddings.flag_embedding.weight.grad
    assert flag[0].abs().max() == 0  # row 0 is never read
    assert flag[1].abs().max() > 0


def test_training_learns() -> None:
    config = tiny_config(hidden_size=64, **without_dropout)
    model, batch = tiny_model(config).train(), make_batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


COMPILED = {
    "base": (TahoeX1Model, lambda batch: without_labels(batch)),
    "base packed": (TahoeX1Model, lambda batch: packed(without_labels(batch))),
    "pretraining": (TahoeX1ForPreTraining, lambda batch: batch),
    "pretraining packed": (TahoeX1ForPreTraining, packed),
}


def compare_compiled(shape: str, what: str, backend: str, **sizes: int) -> None:
    model_class, arrange = COMPILED[what]
    config = tiny_config(**SHAPES[shape], **sizes)
    model: PreTrainedModel = tiny_model(config, model_class)
    arguments = arrange(make_batch(config))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected, ours = model(**arguments), compiled(**arguments)
    assert largest_difference(ours.pooler_output, expected.pooler_output) < CLOSE
    if ours.get("loss") is not None:
        assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        model.zero_grad()
        expected.loss.backward()
        gradient = model.tahoe.layers[0].self_attn.q_proj.weight.grad.clone()
        model.zero_grad()
        ours.loss.backward()
        scale = gradient.abs().max().item()
        assert largest_difference(model.tahoe.layers[0].self_attn.q_proj.weight.grad, gradient) / scale < 1e-4


@pytest.mark.parametrize(
    ("shape", "what"), [("plain", "pretraining"), *(("drugs_observed_or_self_mean", what) for what in COMPILED)]
)
def test_compiled_in_one_graph(shape: str, what: str) -> None:
    compare_compiled(shape, what, "aot_eager")


@pytest.mark.parametrize("pack", [False, True])
def test_lengths_do_not_recompile_without_end(pack: bool) -> None:
    config = tiny_config(attention_mask_style="observed_or_self", num_hidden_layers=1)
    model = tiny_model(config)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")  # what is counted happens before a backend is asked
    compiled = torch.compile(model, backend=counter, dynamic=None)
    # The second batch has another number of cells and another length, so that the compiler learns of both at once.
    for lengths in ((14, 12, 9, 6), (30, 5), (9, 8, 7, 5), (11, 10, 9, 4, 3), (21, 20, 6), (17, 16, 15, 14, 3, 5)):
        batch = make_batch(config, lengths)
        batch = packed(batch) if pack else batch
        with torch.no_grad():
            assert compiled(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert counter.frame_count <= 2


def trained_and_compiled(style: str, device: str, backend: str, dtype: torch.dtype, lengths: Any) -> list[dict]:
    """Gradients of a packed row, in plain torch and by a compiled model."""
    # A cell has no gene twice: the vocabulary has more than the longest cell.
    sizes = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 1}
    config = tiny_config(attention_mask_style=style, expression_encoder_dropout=0.0, **sizes)
    batch = make_batch(config, lengths)
    row = packed(batch) | {"num_targets": int(batch["target_mask"].sum())}
    row = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in row.items()}
    expected = gradients(tiny_model(config, attention="eager").double(), [batch])
    model = tiny_model(config).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model if device == "cuda" else model.double(), fullgraph=True, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = gradients(compiled, [row])
    return [expected, {name.removeprefix("_orig_mod."): value.cpu() for name, value in ours.items()}]


@pytest.mark.parametrize("style", ["full", "observed_or_self"])
def test_compiled_rows_attend_by_flash_where_it_serves(flash_on_cpu: FlashStandIn, style: str) -> None:  # noqa: F811
    expected, ours = trained_and_compiled(style, "cpu", "aot_eager", torch.float64, (9, 14, 6, 12))
    assert (len(flash_on_cpu.calls), flash_on_cpu.backward_calls) == (1, 1)
    assert largest_relative_difference(ours, expected) < 1e-9


def test_compiled_layers_take_rows_of_any_length(flash_on_cpu: FlashStandIn) -> None:  # noqa: F811
    config = tiny_config(attention_mask_style="observed_or_self", expression_encoder_dropout=0.0)
    model, plain = tiny_model(config).double(), tiny_model(config, attention="eager").double()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(model, backend=counter)
    for lengths in ((9, 14, 6, 12), (7, 3, 30), (5, 5, 5), (20,), (11, 10, 9, 4, 3)):
        batch = make_batch(config, lengths)
        row = packed(batch) | {"num_targets": int(batch["target_mask"].sum())}
        assert largest_relative_difference(gradients(model, [row]), gradients(plain, [batch])) < 1e-9
    assert counter.frame_count <= 2  # for all layers and lengths, once or twice


@pytest.mark.parametrize("style", ["full", "observed_or_self"])
def test_checkpointing_keeps_as_little_when_layers_are_compiled(flash_on_cpu: FlashStandIn, style: str) -> None:  # noqa: F811
    config = tiny_config(attention_mask_style=style, num_hidden_layers=3)
    batch = make_batch(config, (9, 14, 6, 12))
    row = packed(batch) | {"num_targets": int(batch["target_mask"].sum())}
    bytes_kept = []
    for compiled in (False, True):
        model = tiny_model(config).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch._dynamo.reset()
        if compiled:
            compile_layers(model, backend="aot_eager")
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(**row).loss.backward()
        bytes_kept.append(sum(kept.values()))
    assert bytes_kept[1] <= bytes_kept[0]


def test_compiled_layers_can_be_copied() -> None:
    model = tiny_model(tiny_config())
    compile_layers(model, backend="eager")
    copied = copy.deepcopy(model)
    assert all(layer.run.__self__ is layer for layer in copied.tahoe.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("style", ["full", "observed_or_self"])
def test_compiled_rows_on_gpu(style: str) -> None:
    expected, ours = trained_and_compiled(style, "cuda", "inductor", torch.bfloat16, (70, 9, 133, 64, 2))
    error = sum(float((ours[name].double() - value).square().sum()) for name, value in expected.items())
    assert error**0.5 < 6e-2 * sum(float(value.square().sum()) for value in expected.values()) ** 0.5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_compiled_to_machine_code(known_instructions: None) -> None:  # noqa: F811
    # Of the same width everywhere, so that layers and encoder share some of the compiled loops.
    compare_compiled("plain", "pretraining", "inductor", num_hidden_layers=1, intermediate_size=32)


@every_shape
def test_bfloat16_autocast_is_close(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config)
    expected = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(**batch)
    ours.loss.backward()
    assert ours.loss.dtype == torch.float32
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    assert largest_difference(ours.pooler_output.float(), expected.pooler_output) < 0.15
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_shape
def test_bfloat16_weights_run(shape: str, attention: str, pack: bool) -> None:
    config = tiny_config(**SHAPES[shape])
    batch = packed(make_batch(config)) if pack else make_batch(config)
    expected = tiny_model(config, attention=attention)(**batch)
    model = tiny_model(config, attention=attention).to(torch.bfloat16)
    ours = model(**batch)
    ours.loss.backward()
    assert ours.pooler_output.dtype == ours.expression_predictions.dtype == torch.bfloat16
    assert ours.loss.dtype == torch.float32
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=3e-2)
    assert largest_difference(ours.pooler_output.float(), expected.pooler_output) < 0.2


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1, 1])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
        ("regression", torch.randn(4, 3)),
    ],
)
def test_classifier_losses(problem_type: str, labels: torch.Tensor) -> None:
    config = tiny_config(num_labels=3, problem_type=problem_type)
    model, batch = tiny_model(config, TahoeX1ForSequenceClassification), make_batch(config, targets=False)
    outputs = model(**batch, labels=labels)
    expected = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[problem_type](outputs.logits, labels)
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    outputs.loss.backward()
    assert model.tahoe.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_gene_classifier_loss() -> None:
    config = tiny_config(num_labels=3)
    model, batch = tiny_model(config, TahoeX1ForTokenClassification), make_batch(config, targets=False)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2], labels[0, 5], labels[3, 1] = 1, 0, 2
    outputs = model(**batch, labels=labels)
    chances = torch.log_softmax(outputs.logits, dim=-1)
    expected = -(chances[0, 2, 1] + chances[0, 5, 0] + chances[3, 1, 2]) / 3
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model(**batch, labels=labels, num_items_in_batch=6).loss.item() == pytest.approx(expected.item() / 2)
    outputs.loss.backward()
    assert model.tahoe.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    none = model(**batch, labels=torch.full_like(labels, -100)).loss
    assert none.item() == 0
    none.backward()  # a step in which no gene has a label changes nothing and gives no NaN
    with pytest.raises(ValueError, match=r"labels has shape \(4,\), input_ids has \(4, 14\)"):
        model(**batch, labels=torch.zeros(4, dtype=torch.long))
