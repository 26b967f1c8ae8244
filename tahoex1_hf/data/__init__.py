# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Training data: prepare a dataset from any source, and feed it to a model.

Names are imported on first use, so that a module of this folder does not import what it does not need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tahoex1_hf.data.collator import CellCollator
    from tahoex1_hf.data.feeding import CellBatches
    from tahoex1_hf.data.preparation import prepare

__all__ = ["CellBatches", "CellCollator", "prepare"]

_MODULES = {"CellBatches": "feeding", "CellCollator": "collator", "prepare": "preparation"}

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
