# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Digests that tell settings, tokenizers and models apart.

Unfinished runs and adapters keep these digests on disk, so the digest of an input must never change.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tahoex1_hf.common.finite_tensors import named_tensors

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
    """Return the SHA-256 of all of a model's tensors: their names, shapes, types and every value."""

    def digest(named: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = named
        content: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        return hashlib.sha256(head + hashlib.sha256(content).digest()).digest()

    tensors = sorted(named_tensors(model), key=lambda named: named[0])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a gigabyte takes a processor about a second
        return hashlib.sha256(b"".join(pool.map(digest, tensors))).hexdigest()


def some_weights_digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's tensors: their names, shapes, and about a thousand values of each.

    It tells two trainings apart, and is what unfinished runs of earlier versions recorded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 1024)].double().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.tobytes())
    return digest.hexdigest()
