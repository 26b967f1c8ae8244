# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Writing adapters, with everything that using them needs; `hub/adapters.py` describes the files and reads them."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import tahoex1_hf
from tahoex1_hf.common.digests import vocabulary_digest
from tahoex1_hf.common.files import write_json
from tahoex1_hf.hub.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RECORD,
    is_peft,
    load_adapter,
    read_record,
    shape_of,
)
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# The cards of adapters that were published before `hub/adapters.py` existed import `load_adapter` from here.
__all__ = ["add_results", "load_adapter", "save_adapter"]


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
