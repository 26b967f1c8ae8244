# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Drugs that a model does not know: rows added to its drug table, made from fingerprints.

The drug encoder reads a row of the table, which began as a fingerprint, so that a new drug is told from the others by
its fingerprint alone. The rows that the base has stay as they are.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tahoex1_hf.finetuning.config import FinetuneConfig
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

ADDED = "added_drugs.safetensors"


def new_fingerprints(config: FinetuneConfig, tokenizer: TahoeX1Tokenizer, drugs: list[str]) -> dict[str, np.ndarray]:
    """Fingerprints of those drugs that the tokenizer does not know.

    Args:
        config: `drug_table` and `drug_fingerprints`.
        tokenizer: of the base.
        drugs: names.

    Returns:
        Drug -> `(bits,)` float32.

    Raises:
        ValueError: for drugs without a fingerprint, naming them.
    """
    known = tokenizer.drug_to_id or {}
    new = [drug for drug in drugs if drug not in known]
    if not new:
        return {}
    if config.drug_table is None or config.drug_fingerprints is None:
        raise ValueError(
            f"drugs={config.drugs}: {len(new)} drugs are not in the drug table of the base ({', '.join(new[:5])}): "
            "make fingerprints of them with `tahoex1 drug-fingerprints`, and name the two files with drug_table and "
            "drug_fingerprints."
        )
    table = json.loads(Path(config.drug_table).read_text(encoding="utf-8"))
    rows = np.load(config.drug_fingerprints, allow_pickle=False)
    missing = [drug for drug in new if drug not in table or table[drug] >= len(rows)]
    if missing:
        raise ValueError(f"drug_table={config.drug_table} has no fingerprint of {', '.join(missing[:5])}: add them.")
    return {drug: rows[table[drug]].astype(np.float32) for drug in new}


def teach_tokenizer(tokenizer: TahoeX1Tokenizer, drugs: list[str], first: int) -> None:
    """Let a tokenizer know new drugs, with ids from `first` on."""
    table = {**(tokenizer.drug_to_id or {}), **{drug: first + n for n, drug in enumerate(drugs)}}
    tokenizer.drug_to_id = table
    tokenizer.init_kwargs["drug_to_id"] = table  # what is saved


def add_drugs(model: TahoeX1PreTrainedModel, fingerprints: np.ndarray) -> None:
    """Add rows to the drug table of a model, in place.

    Args:
        model: with a drug encoder.
        fingerprints: `(drugs, bits)`.

    Raises:
        ValueError: for a model without a drug encoder, or fingerprints of another length.
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


def save_added(folder: Path, fingerprints: np.ndarray, first: int) -> None:
    """Write the added rows beside an adapter; `first` is the number of the first."""
    rows = torch.from_numpy(np.ascontiguousarray(fingerprints))
    save_file({"fingerprints": rows, "first": torch.tensor(first)}, folder / ADDED)


def add_saved(folder: Path, model: TahoeX1PreTrainedModel) -> None:
    """Give a base the drugs that an adapter's folder adds; one that has them already is left as it is.

    Raises:
        ValueError: where the base has other drugs in their place.
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
            f"{folder} adds drugs from row {first} on, but this base has {model.config.num_drugs} rows, and others "
            "there: load the adapter on a base of its own."
        )
