# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read the tensors of an adapter, and put them into a model that has a place for each, and no other place."""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tahoex1_hf.common.finite_tensors import check_finite
from tahoex1_hf.common.reading import reading
from tahoex1_hf.common.weight_files import tensor_names
from tahoex1_hf.common.wrapped_names import unwrapped_in_adapter
from tahoex1_hf.hub.whole_weights import some_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX, _NAME = "base_model.model.", "default"


def adapter_file(folder: Path) -> Path:
    """Return the file of an adapter's tensors.

    Raises:
        FileNotFoundError: For a folder without one.
    """
    for name in (ADAPTER_WEIGHTS, _PICKLE):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}: copy it there, too.")


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors, under the names that PEFT gives them.

    Raises:
        FileNotFoundError: For a folder without them.
        ValueError: If the file is not what its name says, or a tensor is not finite.
    """
    path = adapter_file(folder)
    names = tensor_names([path])
    with reading(path):
        pickled = path.suffix == ".bin"
        tensors = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    named = {unwrapped_in_adapter(name): tensors[name] for name in names}
    if len(named) < len(names):
        raise ValueError(f"{path} holds tensors under two names, with and without a wrapper's: leave one of each.")
    if named.keys() != tensors.keys():
        logger.info("%s: took what wrappers put there off the names of the tensors.", path)
    check_finite(named.items(), str(path))
    return named


def tensor_of(folder: Path, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a tensor of an adapter, or raise ValueError naming the one that is missing."""
    with _naming_tensors(folder):
        return tensors[name]


def brought_by(folder: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the beginnings of the names of the base's own tensors that an adapter replaces, such as its head's."""
    with reading(folder / ADAPTER_CONFIG):
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        whole = [f"{module}." for module in settings.get("modules_to_save") or ()]
    return whole + [name.removeprefix(_PREFIX) for name in tensors if ".lora_" not in name]


def put_on(base: "PreTrainedModel", folder: Path, tensors: dict[str, torch.Tensor]) -> "PeftModel":
    """Put an adapter on its base.

    Args:
        base: Model, which becomes part of the result.
        folder: Folder of the adapter.
        tensors: Its tensors, from `read_adapter`.

    Raises:
        ValueError: If the base has no place for a tensor, or one of another shape, and where the adapter lacks a
            tensor; the message names it.
    """
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as place, _naming_tensors(folder):
        source = folder
        if set(tensor_names([adapter_file(folder)])) != tensors.keys():
            # Left to PEFT, the tensors would be read under the names in the file, which may be a wrapper's.
            source = Path(place)
            (source / ADAPTER_CONFIG).write_bytes((folder / ADAPTER_CONFIG).read_bytes())
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / ADAPTER_WEIGHTS)
        with without_warnings_of_old_names():
            adapted: PeftModel = PeftModel.from_pretrained(base, str(source))
    fill(adapted, folder, tensors, _NAME)
    return adapted


@contextmanager
def without_warnings_of_old_names() -> Iterator[None]:
    """Ignore that PEFT asks for an attribute by its name before transformers 5.23, which users cannot mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def fill(model: "PeftModel", folder: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Put an adapter's tensors into a model that has places for them, under a name; errors as for `put_on`."""
    from peft import set_peft_model_state_dict

    with _naming_tensors(folder):
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
    missing = [key for key in result.missing_keys if name in key.split(".")]
    if result.unexpected_keys:
        raise ValueError(
            f"{adapter_file(folder)} holds {len(result.unexpected_keys)} tensors for which this base has no place, "
            f"{some_of(result.unexpected_keys)}: it is an adapter of another model, or of another class of model."
        )
    if missing:
        raise ValueError(
            f"{adapter_file(folder)} lacks {len(missing)} tensors of the adapter that {ADAPTER_CONFIG} describes, "
            f"{some_of(missing)}. They would be random numbers: copy the adapter again."
        )


@contextmanager
def _naming_tensors(folder: Path) -> Iterator[None]:
    """Turn PEFT's errors about tensors into sentences that name them."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{adapter_file(folder)} lacks {error.args[0]}, which {ADAPTER_CONFIG} says the adapter has: copy the "
            "adapter again."
        ) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{folder} does not fit this base, whose layers have other sizes: {text}") from error
