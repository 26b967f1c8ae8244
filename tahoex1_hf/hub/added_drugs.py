# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows added to a model's drug table, and the file beside an adapter that keeps them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel

ADDED = "added_drugs.safetensors"


def add_drugs(model: TahoeX1PreTrainedModel, fingerprints: np.ndarray) -> None:
    """Add rows to the drug table of a model, in place; existing rows stay as they are.

    Args:
        model: Model with a drug encoder.
        fingerprints: `(drugs, bits)` fingerprints of the new drugs.

    Raises:
        ValueError: For a model without a drug encoder, or fingerprints of another length.
    """
    config = model.config
    if not config.num_drugs:
        raise ValueError("the base has no drug encoder (num_drugs is 0): use one that has, such as the 3B model.")
    if fingerprints.shape[1] != config.drug_fingerprint_size:
        raise ValueError(
            f"the fingerprints have {fingerprints.shape[1]} bits, the base reads {config.drug_fingerprint_size}: make "
            "them with as many (tahoex1 drug-fingerprints --num-bits)."
        )
    encoder: Any = model.base_model.get_submodule("embeddings.drug_encoder")
    old = encoder.embedding
    with torch.no_grad():
        table = type(old)(config.num_drugs + len(fingerprints), old.embedding_dim, padding_idx=0)
        rows = torch.from_numpy(np.ascontiguousarray(fingerprints))
        table.weight.copy_(torch.cat([old.weight, rows.to(old.weight)]))
    encoder.embedding = table.to(old.weight.device, old.weight.dtype)
    config.num_drugs += len(fingerprints)


def with_added_drugs(model: Any, fingerprints: np.ndarray) -> Any:
    """Return a model with further rows in its drug table, which shares all other weights with `model`.

    Args:
        model: Model with a drug encoder, with or without a head; it stays as it is.
        fingerprints: `(drugs, bits)` fingerprints of the new drugs.

    Raises:
        ValueError: As for `add_drugs`.
    """
    twin = _sharing(model)
    twin.config = copy.deepcopy(model.config)
    inner = twin
    if model.base_model is not model:
        inner = _sharing(model.base_model)
        inner.config = twin.config
        twin._modules[model.base_model_prefix] = inner
    inner._modules["embeddings"] = _sharing(inner.embeddings)
    inner.embeddings._modules["drug_encoder"] = _sharing(inner.embeddings.drug_encoder)
    add_drugs(twin, fingerprints)
    return twin


def _sharing(module: torch.nn.Module) -> Any:
    """Return a copy of a module that shares everything with it but the places of its parts."""
    twin: Any = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def save_added_drugs(folder: Path, fingerprints: np.ndarray, first: int) -> None:
    """Write the added rows beside an adapter; `first` is the number of the first row."""
    rows = torch.from_numpy(np.ascontiguousarray(fingerprints))
    save_file({"fingerprints": rows, "first": torch.tensor(first)}, folder / ADDED)


def add_saved_drugs(folder: Path, model: TahoeX1PreTrainedModel) -> None:
    """Add the drugs in an adapter's folder to its base, unless the base has them already.

    Raises:
        ValueError: For a base that has other drugs in these rows.
    """
    if not (folder / ADDED).is_file():
        return
    added = load_file(folder / ADDED)
    first, rows = int(added["first"]), added["fingerprints"]
    if model.config.num_drugs == first:
        add_drugs(model, rows.numpy())
        return
    table: Any = model.base_model.get_submodule("embeddings.drug_encoder.embedding")
    there = table.weight.detach()[first : first + len(rows)].float().cpu()
    if not torch.equal(there, rows):
        raise ValueError(
            f"{folder} adds drugs from row {first} on, where this base ({model.config.num_drugs} rows) has other "
            "drugs: load the adapter on a fresh copy of its base."
        )
