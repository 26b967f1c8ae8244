# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning on labelled cells, labelled genes, drug screens, or cells alone.

`finetune` runs a configuration, which `read_finetune_config` reads from a recipe. Names are imported on first use, so
that reading a recipe does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tahoex1_hf.finetuning.config import (
        ClassificationConfig,
        DrugResponseConfig,
        FinetuneConfig,
        GeneClassificationConfig,
        MaskedExpressionConfig,
        RegressionConfig,
        parse_finetune_config,
        read_finetune_config,
    )
    from tahoex1_hf.finetuning.running import finetune

_MODULES = {
    "ClassificationConfig": "config",
    "DrugResponseConfig": "config",
    "FinetuneConfig": "config",
    "GeneClassificationConfig": "config",
    "MaskedExpressionConfig": "config",
    "RegressionConfig": "config",
    "finetune": "running",
    "parse_finetune_config": "config",
    "read_finetune_config": "config",
}

__all__ = [
    "ClassificationConfig",
    "DrugResponseConfig",
    "FinetuneConfig",
    "GeneClassificationConfig",
    "MaskedExpressionConfig",
    "RegressionConfig",
    "finetune",
    "parse_finetune_config",
    "read_finetune_config",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
