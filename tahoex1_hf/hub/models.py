# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Get a model and its tokenizer from whatever a caller has: a folder, a Hub name or a loaded model."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from tahoex1_hf.hub.adapter_weights import ADAPTER_CONFIG
from tahoex1_hf.hub.adapters import find_adapter, is_peft, load_adapter
from tahoex1_hf.hub.download import is_repo_id
from tahoex1_hf.hub.loading import find_model, load_folder, load_model_and_tokenizer, load_tokenizer
from tahoex1_hf.hub.whole_weights import has_part
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining, TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


def model_and_tokenizer(
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    size: str | None = None,
    revision: str | None = None,
    expression: bool = False,
) -> tuple[Any, TahoeX1Tokenizer]:
    """Return a model and its tokenizer, loading what is not loaded yet.

    Args:
        model: Loaded model, which is returned as it is, or a folder (of a model or of an adapter) or Hub name.
        tokenizer: Tokenizer to use; by default the one in the model's folder or repository.
        size: Size of a model by name, or of an adapter's base, where there are several, as for `find_model`.
        revision: Branch, tag or commit of a Hub repository.
        expression: Whether to load the pretraining head, which predicts expression.

    Raises:
        FileNotFoundError: For a name under which there is no model.
        ValueError: For a loaded model without a tokenizer, or with a size or revision, and for a checkpoint without
            the head that is needed.
    """
    if not isinstance(model, (str, Path)):
        given = {name: value for name, value in {"size": size, "revision": revision}.items() if value is not None}
        if given:
            raise ValueError(f"{given} chooses among models by name, and model is loaded already: leave it out.")
        if tokenizer is None:
            raise ValueError(
                "tokenizer is missing: pass the tokenizer of the loaded model, or the model's folder or Hub name as "
                "model."
            )
        return model, tokenizer
    loaded, own = _load(model, size, revision, expression)
    return loaded, own if tokenizer is None else tokenizer


def _load(model: str | Path, size: str | None, revision: str | None, expression: bool) -> tuple[Any, TahoeX1Tokenizer]:
    if (Path(model) / ADAPTER_CONFIG).is_file():
        return load_adapter(model, size=size)
    try:
        if not expression:
            return load_model_and_tokenizer(model, size=size, revision=revision)
        folder = find_model(model, size=size, revision=revision)
    except FileNotFoundError:
        if not _is_adapter_on_hub(model, revision):
            raise
        return load_adapter(find_adapter(model, revision), size=size)
    if not has_part(folder, "expression_decoder"):
        raise ValueError(no_expression_head(f"the checkpoint {model}"))
    # What a cell decoder predicts is not asked for.
    return load_folder(folder, TahoeX1ForPreTraining, ["cell_decoder."]), load_tokenizer(folder)


def _is_adapter_on_hub(model: str | Path, revision: str | None) -> bool:
    """Return whether a Hub repository, whose small files `find_model` has just fetched, holds an adapter."""
    if Path(model).exists() or not is_repo_id(str(model)):
        return False
    return isinstance(try_to_load_from_cache(str(model), ADAPTER_CONFIG, revision=revision), str)


def no_expression_head(what: str) -> str:
    """Return the message for a model or checkpoint, described by `what`, that cannot predict expression."""
    return (
        f"expression needs the pretraining head, which {what} lacks: pass a TahoeX1ForPreTraining "
        "(AutoModelForPreTraining), or leave out what needs it (expression, score)."
    )


def expression_decoder(model: TahoeX1PreTrainedModel) -> Any:
    """Return the expression decoder of a loaded model; raise ValueError if it has none."""
    decoder = getattr(model, "expression_decoder", None)
    if decoder is None:
        raise ValueError(no_expression_head(f"a {type(model).__name__}"))
    return decoder


def without_peft(model: Any) -> Any:
    """Return the model inside a PEFT model, with its adapters in its layers; another model is returned as it is."""
    return model.get_base_model() if is_peft(model) else model


def model_name(given: Any, loaded: Any) -> str:
    """Return the name to record for a model: the folder of an adapter, or the place that the model came from."""
    if isinstance(given, (str, Path)) and is_peft(loaded):
        return str(given)
    return str(loaded.name_or_path or "")
