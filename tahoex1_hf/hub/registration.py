# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Register the model type `tahoe_x1` with transformers' Auto classes and with PEFT, once this is needed.

If `import tahoex1_hf` registered the classes at once, it would import torch and transformers' models.
"""

from typing import Any

from tahoex1_hf.common.imports import call_after_import

_AUTO = "transformers.models.auto"
_MODEL_TYPE = "tahoe_x1"


def register_when_used() -> None:
    """Register each class with transformers as soon as something that may ask for it is imported or made.

    transformers imports its Auto models in the middle of modules that ours need, so ours cannot be imported right
    after them. Ours are imported with the first configuration of a Tahoe-x1 model instead, without which no Auto class
    looks for them.
    """
    call_after_import(f"{_AUTO}.configuration_auto", _register_configuration)
    call_after_import(f"{_AUTO}.tokenization_auto", _register_tokenizer)
    call_after_import("transformers.pipelines", _import_pipeline)
    call_after_import("tahoex1_hf.configuration_tahoe_x1", _import_models_with_first_configuration)
    call_after_import("tahoex1_hf.modeling_tahoe_x1", _register_models)
    call_after_import("tahoex1_hf.pipeline_tahoe_x1", _register_pipeline)
    call_after_import("tahoex1_hf.tokenization_tahoe_x1", _let_tokenizer_read_originals)
    call_after_import("peft.utils.constants", _register_adapted_layers)


def _register_configuration() -> None:
    from transformers import AutoConfig

    from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config

    AutoConfig.register(TahoeX1Config.model_type, TahoeX1Config, exist_ok=True)


def _register_tokenizer() -> None:
    from transformers import AutoTokenizer

    from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

    AutoTokenizer.register(TahoeX1Config, tokenizer_class=TahoeX1Tokenizer, exist_ok=True)


def _import_pipeline() -> None:
    import tahoex1_hf.pipeline_tahoe_x1  # noqa: F401 - is registered then


def _register_pipeline() -> None:
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from tahoex1_hf.configuration_tahoe_x1 import CELL_EMBEDDING
    from tahoex1_hf.pipeline_tahoe_x1 import TahoeX1CellEmbeddingPipeline

    if CELL_EMBEDDING not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            CELL_EMBEDDING, TahoeX1CellEmbeddingPipeline, pt_model=AutoModel, type="multimodal"
        )


def _import_models_with_first_configuration() -> None:
    from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config

    def new(cls: type[TahoeX1Config], *args: Any, **kwargs: Any) -> TahoeX1Config:
        import tahoex1_hf.modeling_tahoe_x1  # noqa: F401 - registers the models

        return object.__new__(cls)

    TahoeX1Config.__new__ = new  # type: ignore[method-assign, assignment]


def _register_models() -> None:
    from transformers import (
        AutoModel,
        AutoModelForPreTraining,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from tahoex1_hf import modeling_tahoe_x1 as ours
    from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
    from tahoex1_hf.original.tensor_names import register_conversion_rules

    AutoModel.register(TahoeX1Config, ours.TahoeX1Model, exist_ok=True)
    AutoModelForPreTraining.register(TahoeX1Config, ours.TahoeX1ForPreTraining, exist_ok=True)
    AutoModelForSequenceClassification.register(TahoeX1Config, ours.TahoeX1ForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(TahoeX1Config, ours.TahoeX1ForTokenClassification, exist_ok=True)
    register_conversion_rules()
    ours.TahoeX1PreTrainedModel._locate_checkpoint = staticmethod(_locate_checkpoint)


def _let_tokenizer_read_originals() -> None:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

    TahoeX1Tokenizer._locate_checkpoint = staticmethod(_locate_checkpoint)


def _register_adapted_layers() -> None:
    """Let PEFT's methods choose the layers to adapt: ours bear the names of Llama's, and those are adapted here, too.

    PEFT has one table from model types to layers for each method, and asks for `target_modules` where a type is
    missing.
    """
    from peft.utils import constants

    for name, layers in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in layers:
            layers[_MODEL_TYPE] = layers["llama"]
    # Norms alone have other names.
    constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING[_MODEL_TYPE] = ["attention_norm", "mlp_norm"]


def _locate_checkpoint(name: Any, marker: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Let `from_pretrained` also read the original's published files; our files on the Hub work without it."""
    from tahoex1_hf.hub.loading import locate_checkpoint

    return locate_checkpoint(name, marker, options)
