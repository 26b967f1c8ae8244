"""The configuration accepts and refuses the right values, and comes back as it was saved."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPES, tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForPreTraining, PreTrainedConfig

from tahoex1_hf import TahoeX1Config, TahoeX1ForPreTraining
from tahoex1_hf.configuration_tahoe_x1 import CODE_FILES

OWN_FIELDS = sorted(set(TahoeX1Config.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__))


def test_defaults_are_the_70m_model() -> None:
    config = TahoeX1Config()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (62720, 512, 12)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (8, 8, 2048)
    assert (config.hidden_act, config.norm_position, config.use_glu) == ("relu", "pre", False)


def test_every_field_is_described() -> None:
    described = inspect.cleandoc(TahoeX1Config.__doc__)  # Python 3.13 takes the indentation off, earlier ones keep it
    for name in OWN_FIELDS:
        assert f"\n    {name} (`" in described, name


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_and_loaded(shape: str, tmp_path: Path) -> None:
    config = tiny_config(**SHAPES[shape], layer_norm_eps=1e-6, expression_max_value=20, num_bins=31)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TahoeX1Config
    assert {n: getattr(loaded, n) for n in OWN_FIELDS} == {n: getattr(config, n) for n in OWN_FIELDS}
    assert TahoeX1Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "tahoe_x1"
    assert not {"d_model", "n_layers", "n_heads"} & saved.keys()


def test_config_of_a_saved_model_loads(tmp_path: Path) -> None:
    # save_pretrained adds its own keys (architectures, dtype, auto_map, ...), and none may be refused.
    config = tiny_config(num_labels=3)
    config.auto_map = {"AutoModel": "modeling_tahoe_x1.TahoeX1Model"}
    TahoeX1ForPreTraining(config).save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path).config
    assert loaded.architectures == ["TahoeX1ForPreTraining"]
    assert (loaded.num_labels, loaded.id2label) == (3, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})


def test_names_of_the_original() -> None:
    config = TahoeX1Config(d_model=64, n_layers=3, n_heads=2)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 2)
    assert (config.d_model, config.n_layers, config.n_heads) == (64, 3, 2)
    assert (config.intermediate_size, config.num_key_value_heads) == (256, 2)  # derived from the original's names
    config.d_model = 128
    assert config.hidden_size == 128


@pytest.mark.parametrize(
    ("key", "suggestion"), [("hiden_size", "hidden_size"), ("num_layers", "n_layers"), ("d_modle", "d_model")]
)
def test_an_unknown_key_is_refused_with_a_suggestion(key: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=rf"no option '{key}'.*Did you mean.*'{suggestion}'"):
        TahoeX1Config(**{key: 64})


def test_a_misspelt_key_of_from_pretrained_is_refused(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    for load in (AutoConfig.from_pretrained, TahoeX1Config.from_pretrained):
        with pytest.raises(ValueError, match=r"no option 'hiden_size'. Did you mean 'hidden_size'"):
            load(tmp_path, hiden_size=64)


def test_unknown_keys_of_a_file_are_kept_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.json"
    tiny_config().save_pretrained(tmp_path)
    extra = {"colour": "blue", "hiden_size": 7, "to_dict": 5}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    for _ in range(2):
        config = AutoConfig.from_pretrained(tmp_path)
    assert (config.colour, config.hiden_size, config.hidden_size) == ("blue", 7, 32)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().endswith(
        "keys that nothing reads: ['colour', 'hiden_size', 'to_dict']. Is 'hiden_size' meant to be 'hidden_size'?"
    )
    config.save_pretrained(tmp_path)  # to_dict is still a method
    assert json.loads(path.read_text()).items() >= {"colour": "blue", "hiden_size": 7}.items()
    assert TahoeX1Config.from_json_file(path).colour == "blue"


# What transformers 4 wrote into every config.json, and what Trainer writes.
OTHERS = {
    "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": None, "mask_token_id": 3, "tie_word_embeddings": True,
    "torchscript": False, "finetuning_task": "cells", "pruned_heads": {}, "is_decoder": False, "prefix": None,
    "max_length": 20, "num_beams": 1, "use_cache": True, "output_attentions": False, "return_dict": True,
    "problem_type": None, "_name_or_path": "", "transformers_version": "4.40.0",
}  # fmt: skip


def test_keys_that_transformers_writes_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.json"
    tiny_config().save_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | OTHERS | {"torch_dtype": "bfloat16"}))
    config = AutoConfig.from_pretrained(tmp_path)
    config.eos_token_id = [2, 5]
    config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.mask_token_id) == (1, [2, 5], 3)
    assert (config.tie_word_embeddings, config.dtype, config.pad_token_id) == (True, torch.bfloat16, 0)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_they_may_be_given_as_arguments(tmp_path: Path) -> None:
    TahoeX1ForPreTraining(tiny_config()).save_pretrained(tmp_path)
    given = {"use_cache": False, "torchscript": True, "bos_token_id": 1, "tie_word_embeddings": False}
    config = AutoModelForPreTraining.from_pretrained(tmp_path, **given).config
    assert (config.torchscript, config.bos_token_id, config.tie_word_embeddings) == (True, 1, False)
    assert TahoeX1Config(**given).bos_token_id == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=str)
def test_dtypes_by_name_and_as_torchs(dtype: Any, tmp_path: Path) -> None:
    config = tiny_config(dtype=dtype)
    assert config.dtype == torch.bfloat16
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_whoever_saves_names_of_our_code_saves_the_code(tmp_path: Path) -> None:
    config = tiny_config()
    config.save_pretrained(tmp_path)
    config.auto_map = {"AutoModel": "someone/repository--modeling_tahoe_x1.TahoeX1Model"}  # the code is there
    config.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    config.auto_map = {"AutoModel": "modeling_tahoe_x1.TahoeX1Model"}
    config.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == set(CODE_FILES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "64"},
        {"hidden_size": 64.0},
        {"use_glu": "yes"},
        {"hidden_act": "swish2"},
        {"norm_position": "middle"},
        {"cell_pooling": "max"},
        {"attention_mask_style": "causal"},
        {"layer_norm_eps": "1e-5"},
        {"drug_token_id": 2.5},
    ],
    ids=str,
)
def test_wrong_types_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        TahoeX1Config(**wrong)
    config = TahoeX1Config()
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        setattr(config, name, wrong[name])


def test_whole_numbers_for_fractional_options() -> None:
    config = TahoeX1Config(expression_encoder_dropout=0, expression_max_value=20, classifier_dropout=0)
    assert (config.expression_encoder_dropout, config.expression_max_value) == (0, 20)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"vocab_size": -1}, "vocab_size must be at least 1"),
        ({"hidden_size": 50}, r"hidden_size \(50\) must be a multiple of num_attention_heads \(8\)"),
        ({"num_key_value_heads": 3}, r"must be a multiple of num_key_value_heads \(3\)"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads \(0\)"),
        ({"expression_decoder_layers": -1}, "expression_decoder_layers must not be negative"),
        ({"num_bins": 2}, "num_bins must be at least 3"),
        ({"expression_encoder_dropout": 1.0}, r"expression_encoder_dropout must be in \[0, 1\)"),
        ({"classifier_dropout": -0.1}, r"classifier_dropout must be in \[0, 1\)"),
        ({"num_drugs": 5}, r"num_drugs \(5\) and drug_token_id \(None\) belong together"),
        ({"drug_token_id": 5}, r"num_drugs \(0\) and drug_token_id \(5\) belong together"),
        ({"num_drugs": -1}, "must not be negative"),
        ({"num_drugs": 5, "drug_token_id": 1, "drug_fingerprint_size": 0}, "must be positive"),
        ({"pad_token_id": 62720}, r"pad_token_id \(62720\) is outside the vocabulary"),
        ({"num_drugs": 5, "drug_token_id": -1}, r"drug_token_id \(-1\) is outside"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=match):
        TahoeX1Config(**wrong)


def test_contradictions_are_refused_when_saving(tmp_path: Path) -> None:
    config = tiny_config()
    config.hidden_size = 33
    with pytest.raises(StrictDataclassClassValidationError, match="multiple"):
        config.save_pretrained(tmp_path)


def test_plans_name_modules_that_exist() -> None:
    model = TahoeX1ForPreTraining(tiny_config())
    for path in TahoeX1Config.base_model_fsdp_plan:
        assert model.tahoe.get_submodule(path.replace("*", "0")) is not None
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "num_drugs", "num_bins"])
def test_sizes_that_would_fill_the_memory_are_refused(name: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=rf"{name} must be at most \d+, got 1000000000000"):
        TahoeX1Config(**{name: 10**12})
