# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find adapters, and models that were fine-tuned as a whole, on disk or on the Hub, and load them with one call.

A folder holds what PEFT writes (`adapter_config.json`, `adapter_model.safetensors`), the tokenizer, a card, and
`finetuning.json`: the task, the names of the classes, and the required shape of the base. There is no `config.json`:
with one, transformers would take the folder for a whole model and not look for the base.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from tahoex1_hf import modeling_tahoe_x1
from tahoex1_hf.common.digests import vocabulary_digest
from tahoex1_hf.common.reading import reading
from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.hub.adapter_weights import ADAPTER_CONFIG, brought_by, fill, put_on, read_adapter, tensor_of
from tahoex1_hf.hub.added_drugs import add_saved_drugs
from tahoex1_hf.hub.base_sample import check_base
from tahoex1_hf.hub.loading import find_model, load_folder, load_tokenizer
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining, TahoeX1Model
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

RECORD = "finetuning.json"
# The settings that a base must share with the base that an adapter was trained on.
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "use_glu")
# The model class for each `task_type` that PEFT writes, for adapters without a `finetuning.json`.
_CLASSES = {"SEQ_CLS": "TahoeX1ForSequenceClassification", "TOKEN_CLS": "TahoeX1ForTokenClassification"}


def shape_of(config: TahoeX1Config) -> dict[str, Any]:
    """Return the settings of a base that an adapter depends on."""
    return {name: getattr(config, name) for name in _SHAPE}


def is_peft(model: Any) -> bool:
    """Return whether a model is wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read `finetuning.json` of an adapter; for an adapter written by PEFT alone, derive it from the adapter's files.

    Raises:
        FileNotFoundError: If the folder holds neither an adapter nor a fine-tuned model.
        ValueError: For files that cannot be read, or are not what their names say.
    """
    folder = Path(folder)
    if (folder / RECORD).is_file():
        with reading(folder / RECORD):
            return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: there is neither {RECORD} nor {ADAPTER_CONFIG}.")
    with reading(folder / ADAPTER_CONFIG):
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        model, task = settings["base_model_name_or_path"], settings.get("task_type")
    tensors = read_adapter(folder)
    # In a model with a head, the transformer is called `tahoe`; this adapter may have been trained in it alone.
    alone = any(name.startswith(("base_model.model.layers.", "base_model.model.embeddings.")) for name in tensors)
    kind = TahoeX1Model.__name__ if alone else _CLASSES.get(task, TahoeX1ForPreTraining.__name__)
    head = [tensor for name, tensor in tensors.items() if name.endswith("classifier.weight")]
    return {"model": model, "model_class": kind, "model_options": {"num_labels": len(head[0])} if head else {}}


def find_adapter(adapter: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an adapter: the folder itself, or the local copy of a Hub repository.

    Args:
        adapter: Folder or Hub name.
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        FileNotFoundError: For a name that is neither a folder nor a Hub repository within reach.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(adapter), revision=revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"adapter={str(adapter)!r} is neither a folder nor a Hub repository that can be downloaded: {error}"
        ) from None


def load_adapter(
    adapter: str | Path, base: "str | Path | PreTrainedModel | None" = None, *, size: str | None = None
) -> tuple[Any, TahoeX1Tokenizer]:
    """Load an adapter on its base, or a model that was trained as a whole.

    Args:
        adapter: Folder or Hub name of the adapter.
        base: Folder, Hub name or loaded model to put the adapter on; by default the base that the adapter names.
        size: Name of the base's size, such as `"70m"`, where a folder or repository holds several; by default the
            size that the adapter names.

    Returns:
        A `PeftModel` (or the whole model) in eval mode, whose `config.id2label` names the classes, and its tokenizer.

    Raises:
        FileNotFoundError: For an adapter or a base that cannot be found.
        ValueError: For a base of another size, vocabulary or training; for files that are not what their names say;
            and where the base or the adapter lacks a tensor, or holds one that does not fit or is not finite.
    """
    folder = find_adapter(adapter)
    record = read_record(folder)
    kind = getattr(modeling_tahoe_x1, record["model_class"])
    if not (folder / ADAPTER_CONFIG).is_file():
        folder = folder if size is None else find_model(folder, size=size)
        return load_folder(folder, kind).eval(), load_tokenizer(folder)
    tensors = read_adapter(folder)
    model: Any
    if isinstance(base, PreTrainedModel):
        if size is not None:
            raise ValueError(f"size={size!r} chooses among bases by name, and base is loaded already: leave it out.")
        model, place = base, Path(str(base.name_or_path))
        check_fits(folder, record, model.config)
    else:
        place = _base_folder(record, base, size)
        with reading(place / "config.json"):
            config = TahoeX1Config.from_pretrained(place)
        check_fits(folder, record, config, load_tokenizer(place))
        model = load_folder(place, kind, brought_by(folder, tensors), dtype=torch.float32, **_model_options(record))
    check_base(folder, record.get("base_sample", {}), record["model"], model)
    add_saved_drugs(folder, model)
    adapted = put_on(model, folder, tensors)
    has_own = (folder / "tokenizer_config.json").is_file()
    return adapted.eval(), load_tokenizer(folder if has_own else place)


def _model_options(record: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for the base, with the class numbers, text in JSON, as integers."""
    options = dict(record.get("model_options", {}))
    if "id2label" in options:
        options["id2label"] = {int(number): name for number, name in options["id2label"].items()}
    return options


def _base_folder(record: dict[str, Any], base: str | Path | None, size: str | None) -> Path:
    name = record["model"] if base is None else base
    try:
        return find_model(name, size=record.get("size") if base is None and size is None else size)
    except OSError as error:
        error.add_note(f"The adapter was trained on {record['model']}: pass base= to say where that is now.")
        raise


def check_fits(
    folder: Path, record: dict[str, Any], config: TahoeX1Config, tokenizer: TahoeX1Tokenizer | None = None
) -> None:
    """Raise ValueError for a base of another size or vocabulary than the base that the adapter was trained on."""
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
    """Load another adapter on a model that has one already; its head may have other classes.

    Args:
        model: Model from `load_adapter`.
        adapter: Folder or Hub name of the adapter.
        name: Name of the adapter, for `use_adapter`.

    Raises:
        ValueError: For an adapter of another size, vocabulary, base or model class, for one that lacks a tensor or
            holds a wrong one, and for a name that is taken.
    """
    from peft import PeftConfig
    from peft.utils import ModulesToSaveWrapper

    folder = find_adapter(adapter)
    record = read_record(folder)
    inner: Any = model.get_base_model()
    check_fits(folder, record, inner.config)
    if name in model.peft_config:
        raise ValueError(f"name={name!r}: the model has an adapter of this name, choose another.")
    if record["model_class"] != type(inner).__name__:
        raise ValueError(f"{folder} belongs to a {record['model_class']}, this model is a {type(inner).__name__}.")
    check_base(folder, record.get("base_sample", {}), record["model"], inner)
    weights = read_adapter(folder)
    model.add_adapter(name, PeftConfig.from_pretrained(str(folder)))
    for place, module in inner.named_modules():
        # PEFT copies the head of the base, with its number of classes; the adapter's own number may differ.
        if isinstance(module, ModulesToSaveWrapper):
            rows = tensor_of(folder, weights, f"base_model.model.{place}.weight").shape[0]
            head = torch.nn.Linear(inner.config.hidden_size, rows)
            module.modules_to_save[name] = head.to(next(inner.parameters()).device)
    fill(model, folder, weights, name)
    model.requires_grad_(False)
    model.eval()


def use_adapter(model: "PeftModel", name: str, adapter: str | Path) -> None:
    """Switch to an adapter and to its class names.

    Args:
        model: Model with several adapters.
        name: Name of the adapter; the first one is called `"default"`.
        adapter: Folder or Hub name of the adapter, for the class names.
    """
    model.set_adapter(name)
    inner: Any = model.get_base_model()
    for key, value in _model_options(read_record(find_adapter(adapter))).items():
        setattr(inner.config, key, value)
