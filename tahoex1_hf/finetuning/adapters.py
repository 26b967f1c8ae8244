# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Adapters on disk: saved with all that using them takes, loaded in one line, several on one base.

A folder holds what PEFT writes (`adapter_config.json`, `adapter_model.safetensors`), the tokenizer, a card, and
`finetuning.json`: the task, the names of the classes, and what the base must be like. There is no `config.json`, for
which transformers would take the folder for a whole model and not look for the base.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import tahoex1_hf
from tahoex1_hf.common.files import write_json
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.finetuning.bases import vocabulary_digest
from tahoex1_hf.finetuning.drugs.table import add_saved
from tahoex1_hf.hub.loading import find_model
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

RECORD = "finetuning.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a base must have in common with that of an adapter.
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "use_glu")
# Head of a task -> class of the model; those of transformers' names that PEFT writes are read too.
_CLASSES = {
    "SEQ_CLS": "TahoeX1ForSequenceClassification",
    "TOKEN_CLS": "TahoeX1ForTokenClassification",
    None: "TahoeX1ForPreTraining",
}


def shape_of(config: TahoeX1Config) -> dict[str, Any]:
    """What of a base's configuration an adapter depends on."""
    return {name: getattr(config, name) for name in _SHAPE}


def save_adapter(model: Any, tokenizer: TahoeX1Tokenizer, folder: Path, record: dict[str, Any]) -> None:
    """Write an adapter, or with `full` a whole model.

    Args:
        model: PEFT model, or the model itself.
        tokenizer: of its cells.
        folder: to write into.
        record: for `finetuning.json`; the shape and vocabulary of the base are added here.
    """
    from tahoex1_hf.finetuning.cards import adapter_card

    folder.mkdir(parents=True, exist_ok=True)
    inner = model.get_base_model() if is_peft(model) else model
    record = {**record, "base_shape": shape_of(inner.config), "base_vocabulary": vocabulary_digest(tokenizer)}
    record["model_class"] = type(inner).__name__
    record["package_version"] = tahoex1_hf.__version__
    if is_peft(model):
        settings = model.peft_config["default"]
        settings.base_model_name_or_path = record["model"]
        model.save_pretrained(folder)
        _complete(folder, type(inner).__name__)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(adapter_card(record), encoding="utf-8")
    write_json(folder / RECORD, record)


def add_results(folder: Path, metrics: dict[str, float], verdict: str) -> None:
    """Put what a run's report says into its adapter's record and card.

    Args:
        folder: of the adapter.
        metrics: of the test cells, means over the splits.
        verdict: how they compare with baselines, in words.
    """
    from tahoex1_hf.finetuning.cards import adapter_card

    record = {**read_record(folder), "metrics": metrics, "verdict": verdict}
    (folder / "README.md").write_text(adapter_card(record), encoding="utf-8")
    write_json(folder / RECORD, record)


def is_peft(model: Any) -> bool:
    """Whether a model is wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _complete(folder: Path, class_name: str) -> None:
    """Mend what PEFT writes."""
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("modules_to_save"):
        settings["modules_to_save"] = sorted(set(settings["modules_to_save"]))
    if settings.get("task_type") is None:
        # Of a base loaded with remote code, the module would be one that exists in that process only.
        settings["auto_mapping"] = {
            "base_model_class": class_name,
            "parent_library": "tahoex1_hf.modeling_tahoe_x1",
        }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if settings.get("use_dora"):
        # PEFT leaves `.weight` out of these names and adds it when it loads; transformers' own load_adapter does not,
        # and would go on with new magnitudes. With it, both load them.
        weights = load_file(folder / ADAPTER_WEIGHTS)
        suffix = "lora_magnitude_vector"
        named = {f"{name}.weight" if name.endswith(suffix) else name: value for name, value in weights.items()}
        save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `finetuning.json` of an adapter says; of one that PEFT alone wrote, what can be told from its files.

    Raises:
        FileNotFoundError: where the folder holds no adapter and no model.
    """
    folder = Path(folder)
    if (folder / RECORD).is_file():
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: there is neither {RECORD} nor {ADAPTER_CONFIG}.")
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    record = {"model": settings["base_model_name_or_path"], "model_class": _CLASSES[settings.get("task_type")]}
    head = [v for k, v in load_file(folder / ADAPTER_WEIGHTS).items() if k.endswith("classifier.weight")]
    record["model_options"] = {"num_labels": head[0].shape[0]} if head else {}
    return record


def find_adapter(adapter: str | Path) -> Path:
    """Folder of an adapter: itself, or a copy of a Hub repository.

    Raises:
        FileNotFoundError: where it is neither.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(adapter)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{adapter} is neither a folder nor a Hub repository that can be had: {error}"
        ) from None


def load_adapter(
    adapter: str | Path, base: "str | Path | PreTrainedModel | None" = None
) -> tuple[Any, TahoeX1Tokenizer]:
    """Load an adapter on its base, or a model that was trained as a whole.

    Args:
        adapter: folder or Hub id.
        base: where the base is now, or the loaded base; by default it is where the adapter says.

    Returns:
        A `PeftModel` (or the whole model) in eval mode, whose `config.id2label` names the classes, and its tokenizer.

    Raises:
        FileNotFoundError: for an adapter or a base that cannot be found.
        ValueError: for a base of another size or vocabulary.
    """
    folder = find_adapter(adapter)
    record = read_record(folder)
    kind = getattr(tahoex1_hf, record["model_class"])
    if not (folder / ADAPTER_CONFIG).is_file():
        model: Any = kind.from_pretrained(folder)
        return model.eval(), TahoeX1Tokenizer.from_pretrained(folder)
    from peft import PeftModel

    if isinstance(base, PreTrainedModel):
        model, place = base, Path(str(base.name_or_path))
        check_fits(folder, record, model.config)
    else:
        place = _base_folder(record, base)
        check_fits(folder, record, TahoeX1Config.from_pretrained(place), TahoeX1Tokenizer.from_pretrained(place))
        model = kind.from_pretrained(place, dtype=torch.float32, **_model_options(record))
    add_saved(folder, model)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(f"{folder} does not fit this base, whose layers have other sizes: {error}") from error
    has_own = (folder / "tokenizer_config.json").is_file()
    return adapted.eval(), TahoeX1Tokenizer.from_pretrained(folder if has_own else place)


def _model_options(record: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained`; JSON made the class numbers text."""
    options = dict(record.get("model_options", {}))
    if "id2label" in options:
        options["id2label"] = {int(number): name for number, name in options["id2label"].items()}
    return options


def _base_folder(record: dict[str, Any], base: str | Path | None) -> Path:
    name = record["model"] if base is None else base
    try:
        return find_model(name, size=record.get("size") if base is None else None)
    except OSError as error:
        error.add_note(f"The adapter was trained on {record['model']}: pass base= to say where that is now.")
        raise


def check_fits(
    folder: Path, record: dict[str, Any], config: TahoeX1Config, tokenizer: TahoeX1Tokenizer | None = None
) -> None:
    """Raise ValueError where a base has another size or vocabulary than that of an adapter."""
    shape, here = record.get("base_shape", {}), shape_of(config)
    different = [f"{name} {here[name]} instead of {wanted}" for name, wanted in shape.items() if here[name] != wanted]
    if different:
        raise ValueError(
            f"{folder} is an adapter for another size or vocabulary: this base has {', '.join(different)}. It was "
            f"trained on {record['model']}{' ' + record['size'] if record.get('size') else ''}."
        )
    digest = record.get("base_vocabulary")
    if tokenizer is not None and digest is not None and vocabulary_digest(tokenizer) != digest:
        raise ValueError(
            f"{folder} is an adapter for another vocabulary: the genes of this base have other token ids. It was "
            f"trained on {record['model']}."
        )


def add_adapter(model: "PeftModel", adapter: str | Path, name: str) -> None:
    """Load one more adapter on a model that has one; its head may have other classes.

    Args:
        model: from `load_adapter`.
        adapter: folder or Hub id.
        name: to switch to it by, with `use_adapter`.

    Raises:
        ValueError: for an adapter of another size, vocabulary or kind of model, and a name that is taken.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    folder = find_adapter(adapter)
    record = read_record(folder)
    inner: Any = model.get_base_model()
    check_fits(folder, record, inner.config)
    if name in model.peft_config:
        raise ValueError(f"name={name!r}: the model has an adapter of this name, choose another.")
    if record["model_class"] != type(inner).__name__:
        raise ValueError(f"{folder} belongs to a {record['model_class']}, this model is a {type(inner).__name__}.")
    model.add_adapter(name, PeftConfig.from_pretrained(str(folder)))
    weights = load_file(folder / ADAPTER_WEIGHTS)
    for place, module in inner.named_modules():
        if isinstance(module, ModulesToSaveWrapper):  # a copy of the base's head, which has as many classes as that
            rows = weights[f"base_model.model.{place}.weight"].shape[0]
            head = torch.nn.Linear(inner.config.hidden_size, rows)
            module.modules_to_save[name] = head.to(next(inner.parameters()).device)
    set_peft_model_state_dict(model, weights, adapter_name=name)
    model.requires_grad_(False)
    model.eval()


def use_adapter(model: "PeftModel", name: str, adapter: str | Path) -> None:
    """Switch to an adapter, and its names of classes.

    Args:
        model: with several adapters.
        name: of the adapter, `"default"` for the first.
        adapter: its folder, for the names.
    """
    model.set_adapter(name)
    inner: Any = model.get_base_model()
    for key, value in _model_options(read_record(find_adapter(adapter))).items():
        setattr(inner.config, key, value)
