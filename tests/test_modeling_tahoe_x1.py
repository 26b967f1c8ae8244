"""Test the model as a transformers model: its arguments, outputs, files and initial weights; and PEFT on it."""

import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import (
    GOLDEN,
    SHAPES,
    largest_difference,
    make_batch,
    packed,
    tiny_config,
    tiny_model,
    without_labels,
)
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.utils import output_capturing

from tahoex1_hf import (
    TahoeX1ForPreTraining,
    TahoeX1ForSequenceClassification,
    TahoeX1ForTokenClassification,
    TahoeX1Model,
)

CLOSE = 1e-5
CLASSES = [TahoeX1Model, TahoeX1ForPreTraining, TahoeX1ForSequenceClassification, TahoeX1ForTokenClassification]
every_class = pytest.mark.parametrize("model_class", CLASSES)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def same_weights(ours: PreTrainedModel, theirs: PreTrainedModel) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Arguments


@every_class
def test_an_unknown_argument_is_refused(model_class: type) -> None:
    batch = make_batch(tiny_config(), targets=False)
    for name in ("expression", "attn_mask", "token_type_ids"):
        with pytest.raises(ValueError, match=f"no argument {name}"):
            tiny_model(tiny_config(), model_class)(**batch, **{name: batch["input_ids"]})


@every_class
def test_vectors_in_place_of_tokens_are_refused(model_class: type) -> None:
    batch = make_batch(tiny_config(), targets=False)
    model = tiny_model(tiny_config(), model_class)
    model(**batch, inputs_embeds=None)  # as PEFT passes it
    for name in ("inputs_embeds", "past_key_values"):
        with pytest.raises(ValueError, match=f"{name} is not supported: pass input_ids and expression_values"):
            model(**batch, **{name: torch.zeros(4, 14, 32)})
    for name in ("input_ids", "expression_values"):
        with pytest.raises(ValueError, match="input_ids and expression_values are both needed"):
            model(**batch | {name: None})


@pytest.mark.parametrize("name", ["expression_values", "attention_mask", "target_mask", "labels"])
def test_shapes_that_do_not_agree(name: str) -> None:
    batch = make_batch(tiny_config())
    with pytest.raises(ValueError, match=rf"{name} has shape \(4, 13\), input_ids has \(4, 14\)"):
        tiny_model(tiny_config())(**batch | {name: batch[name][:, 1:]})


@every_class
def test_dummy_inputs(model_class: type) -> None:
    model = tiny_model(tiny_config(), model_class)
    assert torch.isfinite(model(**model.dummy_inputs)[0]).all()


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(4, 2, 14, 14), r"shape \(4, 2, 14, 14\), expected \(4, 1, 14, 14\)"),
        (torch.ones(4, 14, 14), r"shape \(4, 14, 14\), input_ids has \(4, 14\)"),
        (torch.ones(4, 1, 14, 14), r"may hold 0, .* use attention_mask\.bool\(\)"),
        (torch.full((4, 1, 14, 14), -0.5), "may hold 0"),
    ],
)
def test_masks_of_queries_and_keys_of_a_wrong_form(mask: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_model(tiny_config())(**make_batch(tiny_config()) | {"attention_mask": mask})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target_mask": None}, "labels was given without target_mask"),
        ({"target_mask": torch.ones(4, 14)}, r"target_mask must be bool, got torch\.float32"),
        ({"target_mask": torch.ones(4, 14, dtype=torch.long)}, r"target_mask must be bool, got torch\.int64"),
        ({"drug_ids": torch.zeros(4, dtype=torch.long)}, "no drug encoder"),
        ({"cu_seq_lens_q": torch.tensor([0, 14])}, "attention_mask does not go with cu_seq_lens_q"),
        ({"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 14])}, "one row, but input_ids has 4 rows"),
    ],
)
def test_arguments_that_do_not_go_together(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_model(tiny_config())(**make_batch(tiny_config()) | change)


@pytest.mark.parametrize(
    ("name", "row", "value", "match"),
    [
        ("input_ids", (2, 3), 80, r"input_ids holds numbers outside 0 to 79 \(config\.vocab_size is 80\)"),
        ("input_ids", (0, 1), -1, "input_ids holds numbers outside 0 to 79"),
        ("drug_ids", 1, 6, r"drug_ids holds numbers outside 0 to 5 \(config\.num_drugs is 6\)"),
        ("attention_mask", (3, 0), 0, "attention_mask pads on the left"),
    ],
)
def test_ids_out_of_range_and_padding_on_the_left(name: str, row: Any, value: int, match: str) -> None:
    config = tiny_config(**SHAPES["drugs"])
    batch = make_batch(config)
    batch[name][row] = value
    with pytest.raises(ValueError, match=match):
        tiny_model(config)(**batch)


def test_a_wrong_number_of_targets_is_refused() -> None:
    """Attention would take seen genes for targets, or targets for seen ones, without a word."""
    batch = packed(make_batch(tiny_config()))
    number = int(batch["target_mask"].sum())
    model = tiny_model(tiny_config(**SHAPES["observed_or_self"]))
    model(**batch, num_targets=number)
    with pytest.raises(ValueError, match=f"num_targets={number + 1} is not the number of targets"):
        model(**batch, num_targets=number + 1)


def test_padding_on_the_left_is_seen_without_a_mask() -> None:
    batch = make_batch(tiny_config())
    del batch["attention_mask"]
    with pytest.raises(ValueError, match="input_ids pads on the left"):
        tiny_model(tiny_config())(**{name: tensor.flip(1) for name, tensor in batch.items()})


@pytest.mark.parametrize("drug_ids", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(())])
def test_one_drug_per_cell(drug_ids: torch.Tensor) -> None:
    config = tiny_config(**SHAPES["drugs"])
    batch = make_batch(config) | {"drug_ids": drug_ids.long()}
    for arguments in (batch, packed(batch)):
        with pytest.raises(ValueError, match=r"drug_ids has shape .*, expected \(4,\)"):
            tiny_model(config)(**arguments)


def test_counting_padding_needs_padding() -> None:
    config = tiny_config(cell_pooling="mean_with_padding")
    with pytest.raises(ValueError, match=r'mean_with_padding.*set config\.cell_pooling = "mean"'):
        tiny_model(config)(**packed(make_batch(config)))


# Outputs


@every_shape
def test_outputs(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model, batch = tiny_model(config), make_batch(config)
    base = model.tahoe(**without_labels(batch))
    assert list(base) == ["last_hidden_state", "pooler_output", "gene_embeddings"]
    assert base.last_hidden_state.shape == base.gene_embeddings.shape == (4, 14, 32)
    genes = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(base.gene_embeddings, model.tahoe.embeddings.gene_encoder.norm(genes))
    outputs = model(**batch)
    assert outputs.expression_predictions.shape == outputs.cell_expression_predictions.shape == (4, 14)
    assert torch.equal(outputs.pooler_output, base.pooler_output)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs.loss)
    labelless = model(**without_labels(batch))
    assert labelless.loss is labelless.expression_loss is labelless.cell_expression_loss is None


@every_class
def test_hidden_states_and_attentions(model_class: type) -> None:
    config = tiny_config(num_hidden_layers=3)
    batch = make_batch(config, targets=False)
    model = tiny_model(config, model_class, "eager")
    assert model(**batch).hidden_states is None
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4
    assert [attention.shape for attention in outputs.attentions] == [(4, 4, 14, 14)] * 3
    base = model.base_model(**batch)
    assert torch.equal(outputs.hidden_states[-1], base.last_hidden_state)
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 4


@pytest.mark.skipif(
    not hasattr(output_capturing, "selected_hidden_states"), reason="this transformers cannot choose hidden states"
)
def test_some_hidden_states() -> None:
    config = tiny_config(num_hidden_layers=3)
    batch = make_batch(config, targets=False)
    model = tiny_model(config, TahoeX1Model, "eager")
    states = model(**batch, output_hidden_states=True).hidden_states
    kept = [state for state in model(**batch, output_hidden_states=[0, 2]).hidden_states if state is not None]
    assert len(kept) == 2
    assert torch.equal(kept[0], states[0])
    assert torch.equal(kept[1], states[2])


# Export


@pytest.mark.parametrize(
    ("shape", "strict"), [("plain", False), ("drugs_observed_or_self_mean", False), ("drugs", True)]
)
def test_exported_programs_take_any_number_of_cells_and_tokens(shape: str, strict: bool, tmp_path: Path) -> None:
    config = tiny_config(**SHAPES[shape])
    model = tiny_model(config, TahoeX1Model)
    batch = make_batch(config, targets=False)
    cells, length = torch.export.Dim("cells", min=2, max=64), torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {0: cells} if name == "drug_ids" else {0: cells, 1: length} for name in batch}
    torch.export.save(
        torch.export.export(model, (), batch, dynamic_shapes=shapes, strict=strict), tmp_path / "program.pt2"
    )
    program = torch.export.load(tmp_path / "program.pt2").module()
    other = make_batch(config, (5, 3, 20, 11, 9), targets=False, seed=3)
    ours, expected = program(**other), model(**other)
    assert torch.equal(ours["pooler_output"], expected.pooler_output)
    assert torch.equal(ours["last_hidden_state"], expected.last_hidden_state)


# Training


UNDER_DDP = """
    import os, sys
    import torch
    from helpers import SHAPES, make_batch, tiny_config, tiny_model
    import tahoex1_hf

    config = tiny_config(**SHAPES["drugs"], num_labels=3)
    batch = make_batch(config, targets=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    for name in sys.argv[2:]:
        model = tiny_model(config, getattr(tahoex1_hf, name)).train()
        model.gradient_checkpointing_enable()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # it complains of the first step in the second
            sum(value.square().sum() for value in wrapped(**batch).values()).backward()
        assert not model.base_model.embeddings.flag_embedding.weight.grad.any()
        print(name, flush=True)
    os._exit(0)
"""


def test_distributed_data_parallel_gets_every_gradient(tmp_path: Path) -> None:
    """With gradient checkpointing, Trainer has DDP expect that each parameter takes part in each step."""
    # In a process that ends at once: where DDP's reducer is the last to hold gloo's group, taking it down may wait
    # forever, for a thread that waits for the interpreter.
    names = [model_class.__name__ for model_class in CLASSES]
    done = forked.run([sys.executable, "-c", textwrap.dedent(UNDER_DDP), tmp_path / "store", *names])
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.10's own
    assert said == names


# Files


@every_class
@every_shape
def test_saved_models_load_unchanged(model_class: type, shape: str, tmp_path: Path) -> None:
    config = tiny_config(**SHAPES[shape], num_labels=3)
    model, batch = tiny_model(config, model_class), make_batch(config, targets=False)
    model.save_pretrained(tmp_path)
    auto = {
        TahoeX1Model: AutoModel,
        TahoeX1ForPreTraining: AutoModelForPreTraining,
        TahoeX1ForSequenceClassification: AutoModelForSequenceClassification,
        TahoeX1ForTokenClassification: AutoModelForTokenClassification,
    }[model_class]
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not any(report.values()), report
    assert not loaded.training
    assert same_weights(loaded, model)
    with torch.no_grad():
        ours, expected = loaded(**batch), model(**batch)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


ON_DISK = {"tahoe.layers.0": "disk", "tahoe.norm": "cpu", "expression_decoder": "disk", "cell_decoder": "cpu"}


@pytest.mark.parametrize(
    "device_map", [{"": "cpu"}, "auto", "cpu", {"tahoe.embeddings": "cpu", "tahoe.layers.1": "cpu", **ON_DISK}]
)
def test_sharded_and_placed(device_map: Any, tmp_path: Path) -> None:
    config = tiny_config(**SHAPES["drugs"])
    model = tiny_model(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded, report = AutoModelForPreTraining.from_pretrained(
        tmp_path, device_map=device_map, output_loading_info=True, offload_folder=tmp_path / "offloaded"
    )
    assert not any(report.values()), report
    assert "disk" in str(device_map) or same_weights(loaded, model)
    batch = make_batch(config)
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)


@every_class
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", ["plain", "drugs_observed_or_self_mean"])
def test_layers_on_two_devices(model_class: type, pack: bool, shape: str) -> None:
    """The second device is "meta": it computes nothing, but refuses what lies elsewhere, as a second GPU does."""
    config = tiny_config(**SHAPES[shape], num_labels=3)
    model, batch = tiny_model(config, model_class), make_batch(config)
    labels = {
        TahoeX1ForPreTraining: batch.pop("labels"),
        TahoeX1ForSequenceClassification: torch.tensor([0, 1, 2, 0]),
        TahoeX1ForTokenClassification: batch["input_ids"] % 3,
    }
    batch |= {"labels": labels[model_class]} if model_class in labels and not pack else {}
    for name, module in model.named_modules():
        whole = type(module).__name__ in model._no_split_modules
        last = name.startswith(("classifier", "expression_decoder", "cell_decoder")) or name in ("norm", "tahoe.norm")
        if whole or (last and not list(module.children())):
            device = "meta" if "layers.1" in name or last else "cpu"
            hook = AlignDevicesHook(execution_device=device, io_same_device=False, place_submodules=True)
            add_hook_to_module(module.to(device), hook)
    cells = packed(batch) if pack else batch
    for extra in ({}, {"output_attentions": True}):
        outputs = model(**cells, **extra)
        assert outputs[0].device.type == "meta"
        assert len(outputs.get("attentions", ())) == 2 * bool(extra)


def test_bfloat16_files_stay_bfloat16(tmp_path: Path) -> None:
    tiny_model(tiny_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_head_on_a_saved_base_is_new_and_finite(tmp_path: Path) -> None:
    base = tiny_model(tiny_config(), TahoeX1Model)
    base.save_pretrained(tmp_path)
    model, report = TahoeX1ForSequenceClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert same_weights(model.tahoe, base)
    assert model.classifier.weight.isfinite().all()
    assert model.classifier.weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.3)
    assert model.classifier.bias.abs().max() == 0


# Initial weights


@every_class
@every_shape
def test_initial_weights(model_class: type, shape: str) -> None:
    config = tiny_config(**SHAPES[shape] | {"hidden_size": 64})
    torch.manual_seed(0)
    model = model_class(config)
    for name, module in model.named_modules():
        if name.endswith("drug_encoder.embedding"):
            assert module.weight.abs().max() == 0  # until fingerprints are loaded
        elif isinstance(module, torch.nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
        elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            fan_in = getattr(module, "in_features", None) or module.embedding_dim
            std = (2 / fan_in) ** 0.5
            if name.endswith("o_proj"):
                std /= (2 * config.num_hidden_layers) ** 0.5
            few = module.weight.numel() < 500
            assert module.weight.std().item() == pytest.approx(std, rel=0.35 if few else 0.1), name
        if getattr(module, "bias", None) is not None:
            assert module.bias.abs().max() == 0, name


@every_shape
def test_no_weight_is_left_uninitialised(shape: str, tmp_path: Path) -> None:
    # from_pretrained builds on the meta device: weights that neither the file nor _init_weights fills would be random.
    config = tiny_config(**SHAPES[shape])
    with torch.device("meta"):
        model = TahoeX1ForPreTraining(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert list(model.buffers()) == []
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
            parameter._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []
    from_config = AutoModelForPreTraining.from_config(config)
    assert all(parameter.isfinite().all() for parameter in from_config.parameters())


def test_gene_embedding_table() -> None:
    for model_class in CLASSES:
        model = tiny_model(tiny_config(), model_class)
        table = model.get_input_embeddings()
        assert table is model.base_model.embeddings.gene_encoder.embedding
        replacement = torch.nn.Embedding(80, 32)
        model.set_input_embeddings(replacement)
        assert model.get_input_embeddings() is replacement
        assert model.get_output_embeddings() is None


# PEFT

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("model_class", "task"),
    [(TahoeX1Model, "FEATURE_EXTRACTION"), (CLASSES[2], "SEQ_CLS"), (CLASSES[3], "TOKEN_CLS")],
)
def test_lora(model_class: type, task: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = tiny_config(num_labels=3)
    batch = make_batch(config, targets=False)
    classifies = task.endswith("CLS")
    modules_to_save = ["classifier"] if classifies else None
    lora = peft.LoraConfig(
        task_type=task, r=4, target_modules=LORA_TARGETS, init_lora_weights=False, modules_to_save=modules_to_save
    )
    model = peft.get_peft_model(tiny_model(config, model_class), lora).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert sum("lora_A" in name for name in trained) == len(LORA_TARGETS) * config.num_hidden_layers
    if modules_to_save:
        labels = torch.tensor([0, 1, 2, 0]) if task == "SEQ_CLS" else batch["input_ids"] % 3
        model(**batch, labels=labels).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    key = "logits" if classifies else "pooler_output"
    with torch.no_grad():
        expected = model(**batch)[key]
        assert largest_difference(expected, tiny_model(config, model_class)(**batch)[key]) > 1e-2
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(tiny_model(config, model_class), tmp_path).eval()
        assert largest_difference(loaded(**batch)[key], expected) == 0
        merged = loaded.merge_and_unload()
        assert type(merged) is model_class
        assert largest_difference(merged(**batch)[key], expected) < CLOSE


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("LoraConfig", {"q_proj", "v_proj"}),
        ("IA3Config", {"k_proj", "v_proj", "down_proj"}),
        ("LNTuningConfig", {"attention_norm", "mlp_norm"}),
    ],
)
def test_peft_chooses_the_layers(name: str, layers: set[str]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(tiny_config()), getattr(peft, name)())
    trained = [key for key, weight in model.named_parameters() if weight.requires_grad]
    assert all(".layers." in key for key in trained)
    assert {part for key in trained for part in key.split(".") if part in LORA_TARGETS or "_norm" in part} == layers


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("name", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_methods_that_put_vectors_before_the_tokens_are_refused(task: str, name: str) -> None:
    peft = pytest.importorskip("peft")
    config = tiny_config()
    model_class = {"SEQ_CLS": CLASSES[2], "TOKEN_CLS": CLASSES[3]}.get(task, TahoeX1Model)
    model = peft.get_peft_model(
        tiny_model(config, model_class), getattr(peft, name)(task_type=task, num_virtual_tokens=4)
    )
    # PEFT itself refuses prefixes before classifiers.
    with pytest.raises(ValueError, match=r"is not supported: .* use LoRA|does not support past key values"):
        model(**make_batch(config, targets=False))


# Quantisation


def quantised_layers(model: PreTrainedModel) -> set[str]:
    """Return the names of the layers whose weights are no plain floats."""
    return {
        name
        for name, layer in model.named_modules()
        if type(layer).__module__.startswith(("bitsandbytes.", "torch.ao."))
        or type(getattr(layer, "weight", None)).__module__.startswith("torchao.")
    }


def torchao_setting(kind: str) -> Any:
    """Return torchao's 8 bits, or its 4 bits for CPUs: those of `Int4WeightOnlyConfig` need CUDA."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra int8)")
    if kind == "int8":
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    if kind == "int4 on CUDA":
        return TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=32))
    groups = quantization.PerGroup(32)
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups))


def bitsandbytes_setting(kind: str) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra qlora)")
    return BitsAndBytesConfig(load_in_8bit=kind == "8 bits", load_in_4bit=kind == "4 bits")


def check_quantised(model_class: type, setting: Any, tmp_path: Path, device: str = "cpu", **options: Any) -> None:
    """Every layer of the transformer is quantised, values, embeddings and heads are not, and results are close."""
    shape = SHAPES["drugs"] | {"drug_fingerprint_size": 64, "hidden_size": 64}  # 4 bits come in groups of up to 64
    config = tiny_config(**shape, num_labels=3)
    model, batch = tiny_model(config, model_class), make_batch(config, targets=False)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, quantization_config=setting, device_map=device, **options)
    found = quantised_layers(loaded)
    layers = {f"layers.{i}.{name}" for i in range(2) for name in ("mlp.up_proj", "mlp.down_proj")}
    layers |= {f"layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"}
    assert {name.removeprefix("tahoe.") for name in found if ".layers" in f".{name}"} >= layers
    assert not [name for name in found if name.endswith(("expression_encoder.linear1", "classifier", "output"))]
    assert not [name for name in found if "embedding" in name.rpartition(".")[2]]
    with torch.no_grad():
        ours = loaded(**{name: tensor.to(device) for name, tensor in batch.items()})[0].float().cpu()
        expected = model(**batch)[0]
    assert 0.95 < torch.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) < 1 - 1e-8


@every_class
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_torchao_needs_no_list_of_layers(model_class: type, kind: str, tmp_path: Path) -> None:
    check_quantised(model_class, torchao_setting(kind), tmp_path)


@every_class
@pytest.mark.parametrize("kind", ["8 bits", "4 bits"])
def test_bitsandbytes_needs_no_list_of_layers(model_class: type, kind: str, tmp_path: Path) -> None:
    check_quantised(model_class, bitsandbytes_setting(kind), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "int4 on CUDA", "8 bits", "4 bits"])
def test_quantised_on_cuda(kind: str, tmp_path: Path) -> None:
    if kind == "int4 on CUDA":
        pytest.importorskip("mslk", reason="mslk, whose kernels torchao's 4 bits need on CUDA, is not installed")
    setting = torchao_setting(kind) if "int" in kind else bitsandbytes_setting(kind)
    check_quantised(CLASSES[2], setting, tmp_path, "cuda", dtype=torch.bfloat16)


@every_class
def test_dynamic_quantisation_needs_no_list_of_layers(model_class: type) -> None:
    config = tiny_config(**SHAPES["drugs"], num_labels=3)
    model, batch = tiny_model(config, model_class), make_batch(config, targets=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    plain = {name for name, layer in quantised.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert {name.rpartition(".")[2] for name in plain} <= {"classifier", "output"}
    ours, expected = quantised(**batch)[0], model(**batch)[0]
    assert 0.95 < torch.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) < 1 - 1e-8


def test_float16_models_predict_in_float32(tmp_path: Path) -> None:
    config = tiny_config(num_labels=3)
    for model_class, name in ((CLASSES[1], "expression_predictions"), (CLASSES[2], "logits")):
        tiny_model(config, model_class).save_pretrained(tmp_path / name)
        model = model_class.from_pretrained(tmp_path / name, dtype=torch.float16)
        outputs = model(**make_batch(config, targets=False))
        assert outputs[name].dtype == torch.float32
        assert model.tahoe.embeddings.expression_encoder.linear1.weight.dtype == torch.float16


def test_golden_checkpoints_are_not_transformers_folders() -> None:
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(GOLDEN / "a_70m_like" / "model")
