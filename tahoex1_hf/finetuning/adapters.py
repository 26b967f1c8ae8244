# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Write adapters with everything that loading them needs; `hub/adapters.py` describes and reads the files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import tahoex1_hf
from tahoex1_hf.common.digests import vocabulary_digest
from tahoex1_hf.common.files import write_json
from tahoex1_hf.hub.adapter_weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tahoex1_hf.hub.adapters import (
    RECORD,
    is_peft,
    load_adapter,
    read_record,
    shape_of,
)
from tahoex1_hf.hub.base_sample import sample_of
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# The cards of adapters that were published before `hub/adapters.py` existed import `load_adapter` from here.
__all__ = ["add_results", "load_adapter", "save_adapter"]


def save_adapter(model: Any, tokenizer: TahoeX1Tokenizer, folder: Path, record: dict[str, Any]) -> None:
    """Write an adapter, or with `full` a whole model.

    Args:
        model: PEFT model, or the model itself.
        tokenizer: Tokenizer of the model.
        folder: Folder to write into.
        record: Content of `finetuning.json`; the shape, the vocabulary and a few weights of the base are added here.
    """
    from tahoex1_hf.finetuning.cards import adapter_card

    folder.mkdir(parents=True, exist_ok=True)
    inner = without_peft(model)
    record = {**record, "base_shape": shape_of(inner.config), "base_vocabulary": vocabulary_digest(tokenizer)}
    record["model_class"] = type(inner).__name__
    record["package_version"] = tahoex1_hf.__version__
    if is_peft(model):
        record["base_sample"] = sample_of(inner)
        settings = model.peft_config["default"]
        settings.base_model_name_or_path = record["model"]
        with without_card(model):  # ours follows
            model.save_pretrained(folder)
        _complete_adapter(folder, type(inner).__name__)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(adapter_card(record), encoding="utf-8")
    write_json(folder / RECORD, record)


@contextmanager
def without_card(model: Any) -> Iterator[None]:
    """Keep PEFT from writing a model card, an empty form which takes longer than a small adapter itself.

    Args:
        model: PEFT model, or any other, of which nothing changes.
    """
    if not is_peft(model):
        yield
        return
    model.create_or_update_model_card = lambda output_dir: None
    try:
        yield
    finally:
        del model.create_or_update_model_card


def add_results(folder: Path, metrics: dict[str, float], verdict: str) -> None:
    """Put the results of a run into its adapter's record and card.

    Args:
        folder: Folder of the adapter.
        metrics: Metrics on the test cells by title, means over the splits.
        verdict: Comparison with the baselines, in words.
    """
    from tahoex1_hf.finetuning.cards import adapter_card

    record = {**read_record(folder), "metrics": metrics, "verdict": verdict}
    (folder / "README.md").write_text(adapter_card(record), encoding="utf-8")
    write_json(folder / RECORD, record)


def _complete_adapter(folder: Path, class_name: str) -> None:
    """Write the settings in a stable order, and complete what PEFT leaves out."""
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    # PEFT keeps both as sets, whose order differs from process to process.
    for name in ("modules_to_save", "target_modules"):
        if isinstance(settings.get(name), list):
            settings[name] = sorted(set(settings[name]))
    if settings.get("task_type") is None:
        # With a base loaded by remote code, PEFT would name a module that exists in that process only.
        settings["auto_mapping"] = {
            "base_model_class": class_name,
            "parent_library": "tahoex1_hf.modeling_tahoe_x1",
        }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if settings.get("use_dora"):
        # PEFT leaves `.weight` out of these names and adds it when it loads; transformers' own load_adapter does not
        # add it, and would silently keep new magnitudes. Both load the full names.
        weights = load_file(folder / ADAPTER_WEIGHTS)
        suffix = "lora_magnitude_vector"
        named = {f"{name}.weight" if name.endswith(suffix) else name: value for name, value in weights.items()}
        save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
