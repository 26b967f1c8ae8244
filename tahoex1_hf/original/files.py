# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of the files in a folder of the original's layout."""

from pathlib import Path

MODEL_CONFIG, COLLATOR_CONFIG, VOCAB = "model_config.yml", "collator_config.yml", "vocab.json"
SAFETENSORS, PICKLE = "model.safetensors", "best-model.pt"
SHARDED_METADATA = ".metadata"  # the index of a sharded checkpoint
DRUG_TABLE, DRUG_FINGERPRINTS = "drug_to_id_pad.json", "drug_fps_pad.npy"


def is_original_folder(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint of the original: its settings, and no config.json."""
    return (folder / MODEL_CONFIG).is_file() and not (folder / "config.json").is_file()
