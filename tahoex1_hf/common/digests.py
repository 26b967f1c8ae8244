# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Digests that tell settings, tokenizers and models apart.

Unfinished runs and adapters keep these digests on disk, so the digest of an input must never change.
"""

import hashlib
import json
from typing import Any

import torch

# The attributes of a tokenizer that decide how a cell is encoded.
_ENCODING_SETTINGS = (
    "value_encoding",
    "num_bins",
    "right_binning",
    "target_sum",
    "context_length",
    "overflow",
    "pad_value",
    "drug_to_id",
    "first_gene_raw",
)


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a value written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def vocabulary_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's tokens and their ids."""
    return json_digest(sorted(tokenizer.get_vocab().items()))


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of everything that decides how a tokenizer encodes cells."""
    settings = {name: getattr(tokenizer, name) for name in _ENCODING_SETTINGS}
    special = [str(tokenizer.cls_token), str(tokenizer.pad_token)]
    return json_digest([settings, special, sorted(tokenizer.get_vocab().items())])


def weights_digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's tensors: their names, shapes, and about a thousand values of each.

    A thousand values are enough to tell two trainings apart; reading every value of a large model would take longer
    than starting the run.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 1024)].double().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.tobytes())
    return digest.hexdigest()
