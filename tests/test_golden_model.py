"""The model gives the original program's numbers, on four checkpoints recorded from it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.copy_golden import gradient_positions
from golden_bounds import TOLERANCE, exact, loss_record, tolerance
from helpers import (
    GOLDEN_VARIANTS,
    NO_SHARED_GOLDEN,
    SHARED_GOLDEN,
    Variant,
    largest_difference,
    layer_outputs,
    without_labels,
)
from instructions import known_instructions  # noqa: F401 - a fixture
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, PreTrainedModel

from tahoex1_hf.original.convert import convert_original_folder
from tahoex1_hf.original.tensor_names import in_original_names

OUTPUTS = {"nomlm": "collate_bin", "masked": "batch_masked", "log": "collate_log"}
every_variant = pytest.mark.parametrize("variant", GOLDEN_VARIANTS, ids=lambda variant: variant.name)
needs_complete = pytest.mark.skipif(not SHARED_GOLDEN.is_dir(), reason=NO_SHARED_GOLDEN)
complete = pytest.mark.parametrize(
    "complete",
    [
        pytest.param(False, id="kept"),
        pytest.param(
            True, id="complete", marks=pytest.mark.skipif(not SHARED_GOLDEN.is_dir(), reason=NO_SHARED_GOLDEN)
        ),
    ],
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the golden checkpoints as the converter writes them."""
    folder = tmp_path_factory.mktemp("converted")
    for variant in GOLDEN_VARIANTS:
        convert_original_folder(variant.checkpoint, folder / variant.name)
    return {variant.name: folder / variant.name for variant in GOLDEN_VARIANTS}


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Run flex attention as plain torch, which computes the same at once instead of compiling for every shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def load(converted: dict[str, Path]):
    def load_variant(variant: Variant, attention: str = "sdpa") -> PreTrainedModel:
        return AutoModelForPreTraining.from_pretrained(converted[variant.name], attn_implementation=attention)

    return load_variant


def columns(ours: torch.Tensor, recorded: np.ndarray) -> torch.Tensor:
    """Return the numbers of a contextual embedding that the recordings keep: every eighth, or all."""
    return ours[..., :: ours.shape[-1] // recorded.shape[-1]]


def gradients_in_original_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return dict(in_original_names(model.config, ours.__getitem__))


def test_the_variants_differ_in_what_they_cover(load) -> None:
    configs = {variant.name[0]: load(variant).config for variant in GOLDEN_VARIANTS}
    assert configs["b"].num_drugs > 0 == configs["a"].num_drugs
    assert configs["c"].num_key_value_heads < configs["c"].num_attention_heads
    assert (configs["c"].use_glu, configs["c"].norm_position) == (True, "post")
    assert (configs["c"].cell_pooling, configs["c"].scale_targets) == ("mean_with_padding", True)
    assert configs["d"].attention_mask_style == "observed_or_self"
    assert configs["a"].attention_mask_style == "full"


def compare_outputs(model: PreTrainedModel, variant: Variant, kind: str, complete: bool) -> None:
    recorded = variant.recorded(f"out_{kind}", complete)
    batch = without_labels(variant.batch(OUTPUTS[kind], targets=kind == "masked"))
    with torch.no_grad():
        ours = model(**batch)
        base = model.tahoe(**batch)
    compared = batch["input_ids"] != model.config.pad_token_id
    if model.config.cell_pooling == "mean_with_padding":
        compared = torch.ones_like(compared)  # the embeddings of padding are part of such a cell's
    differences = {
        "cell": largest_difference(ours.pooler_output, recorded["cell_emb"]),
        "gene": largest_difference(
            columns(base.last_hidden_state, recorded["gene_emb"])[compared], recorded["gene_emb"][compared]
        ),
        "expression": largest_difference(ours.expression_predictions[compared], recorded["expr_preds"][compared]),
        "cell_expression": largest_difference(
            ours.cell_expression_predictions[compared], recorded["mvc_output"][compared]
        ),
    }
    assert max(differences.values()) < TOLERANCE.output, differences


@complete
@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_variant
def test_outputs(load, variant: Variant, attention: str, kind: str, complete: bool) -> None:
    compare_outputs(load(variant, attention), variant, kind, complete)


@pytest.mark.parametrize("kind", OUTPUTS)
@every_variant
def test_outputs_with_flex_attention(load, uncompiled: None, variant: Variant, kind: str) -> None:
    compare_outputs(load(variant, "flex_attention"), variant, kind, complete=False)


@pytest.mark.slow
@pytest.mark.parametrize("variant", GOLDEN_VARIANTS[2:], ids=lambda variant: variant.name)
def test_outputs_with_compiled_flex_attention(load, known_instructions: None, variant: Variant) -> None:  # noqa: F811
    torch._dynamo.reset()
    compare_outputs(load(variant, "flex_attention"), variant, "masked", complete=False)


@pytest.mark.parametrize("kind", OUTPUTS)
@every_variant
def test_auto_model_on_the_same_folder(converted, variant: Variant, kind: str) -> None:
    model, recorded = AutoModel.from_pretrained(converted[variant.name]), variant.recorded(f"out_{kind}")
    with torch.no_grad():
        ours = model(**without_labels(variant.batch(OUTPUTS[kind], targets=kind == "masked")))
    assert largest_difference(ours.pooler_output, recorded["cell_emb"]) < TOLERANCE.output


@complete
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_variant
def test_intermediates(load, variant: Variant, attention: str, complete: bool) -> None:
    model, recorded = exact(load(variant, attention), variant), variant.recorded("inter_masked", complete)
    batch = without_labels(variant.batch("batch_masked", targets=True))
    cells = recorded.pop("cells", np.arange(len(batch["input_ids"])))
    with torch.no_grad(), layer_outputs(model) as layers:
        hidden_states = model(**batch, output_hidden_states=True).hidden_states
        encoders = {
            "gene_encoder": model.tahoe.embeddings.gene_encoder(batch["input_ids"]),
            "expression_encoder": model.tahoe.embeddings.expression_encoder(batch["expression_values"]),
            "encoder_input": hidden_states[0],
        }
        if model.config.num_drugs:
            encoders["chem_encoder"] = model.tahoe.embeddings.drug_encoder(batch["drug_ids"])
    num_layers = model.config.num_hidden_layers
    assert len(hidden_states) == num_layers + 1
    assert len(layers) == num_layers
    ours = encoders | {f"layer{i}": layer for i, layer in enumerate(layers)}
    assert ours.keys() == recorded.keys()
    for i in range(num_layers - 1):  # the last of hidden_states comes after the final norm
        assert torch.equal(hidden_states[i + 1], layers[i])
    assert torch.equal(hidden_states[-1], model.tahoe.norm(layers[-1]))
    compared = (batch["input_ids"] != model.config.pad_token_id)[cells]
    for name, theirs in recorded.items():
        limit = TOLERANCE.intermediate if name.startswith("layer") else tolerance(variant).encoder
        tokens = compared if theirs.ndim == 3 else slice(None)  # drugs are per cell
        difference = largest_difference(columns(ours[name][cells], theirs)[tokens], theirs[tokens])
        assert difference < limit, (name, difference)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_variant
def test_loss_and_its_parts(load, variant: Variant, attention: str) -> None:
    recorded = loss_record(variant)
    with torch.no_grad():
        ours = load(variant, attention)(**variant.batch("batch_masked", targets=True))
    for value, names in (
        (ours.loss, ["loss"]),
        (ours.expression_loss, ["loss_mse", "metric_MSE"]),
        (ours.cell_expression_loss, ["loss_mvc", "metric_MVC"]),
    ):
        for name in names:
            assert value.item() == pytest.approx(recorded[name], rel=TOLERANCE.loss), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_variant
def test_gradients(load, variant: Variant, attention: str) -> None:
    model, recorded, norms = load(variant, attention), variant.recorded("grads_masked"), loss_record(variant)
    model(**variant.batch("batch_masked", targets=True)).loss.backward()
    ours = gradients_in_original_names(model)
    assert ours.keys() == recorded.keys() == norms["grad_norms"].keys()
    for name, theirs in recorded.items():
        kept = ours[name].flatten()[torch.tensor(gradient_positions(ours[name].numel()))]
        scale = ours[name].abs().max().item() or 1.0
        assert largest_difference(kept, theirs) / scale < tolerance(variant).gradient, name
        norm = pytest.approx(norms["grad_norms"][name], rel=tolerance(variant).gradient_norm)
        assert ours[name].norm().item() == norm, name


@needs_complete
@every_variant
def test_complete_gradients(load, variant: Variant) -> None:
    model = load(variant)
    model(**variant.batch("batch_masked", targets=True)).loss.backward()
    ours = gradients_in_original_names(model)
    recorded = load_file(SHARED_GOLDEN / variant.name / f"grads_masked_{variant.mode}.safetensors")
    assert ours.keys() == recorded.keys()
    for name, theirs in recorded.items():
        scale = theirs.abs().max().item() or 1.0
        assert largest_difference(ours[name], theirs) / scale < tolerance(variant).gradient, name


@every_variant
def test_the_same_parameters_have_no_gradient(load, variant: Variant) -> None:
    model = load(variant)
    model(**variant.batch("batch_masked", targets=True)).loss.backward()
    ours = {name: torch.full_like(p, float(p.grad is None)) for name, p in model.named_parameters()}
    originals = in_original_names(model.config, ours.__getitem__)
    assert [name for name, tensor in originals if tensor.any()] == loss_record(variant)["params_without_grad"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_variant
def test_five_training_steps(load, variant: Variant, attention: str) -> None:
    model, recorded = exact(load(variant, attention), variant), loss_record(variant)["train_trace"]
    learning_rate, decoupled_weight_decay = 3e-3, 1e-4
    # Composer's DecoupledAdamW shrinks by (lr / initial lr) * decay, torch's AdamW by lr * decay.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=decoupled_weight_decay / learning_rate
    )
    losses, norms = [], []
    for _ in recorded["losses"]:
        optimizer.zero_grad()
        loss = model(**variant.batch("batch_masked", targets=True)).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    limit = tolerance(variant)
    assert losses == pytest.approx(recorded["losses"], rel=limit.training)
    assert norms == pytest.approx(recorded["grad_norms_before_clip"], rel=limit.training)
    ends = dict(in_original_names(model.config, model.state_dict().__getitem__))
    assert ends.keys() == recorded["end_param_norms"].keys()
    for name, norm in recorded["end_param_norms"].items():
        relative = limit.key_bias if name.endswith("Wqkv.bias") else limit.training
        assert ends[name].norm().item() == pytest.approx(norm, rel=relative), name
