# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows made from fingerprints and added to a drug table, for drugs that the model does not know.

The drug encoder reads a row of the table, which began as a fingerprint, so a new drug differs from the others only by
its fingerprint. The base's own rows stay as they are.
"""

import json
from pathlib import Path

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import DrugTable
from tahoex1_hf.finetuning.config import DrugResponseConfig
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


def new_fingerprints(
    config: DrugResponseConfig, tokenizer: TahoeX1Tokenizer, drugs: list[str]
) -> dict[str, np.ndarray]:
    """Read the fingerprints of those drugs that the tokenizer does not know.

    Args:
        config: Configuration of the run.
        tokenizer: Tokenizer of the base.
        drugs: Names of the drugs.

    Returns:
        Drug -> fingerprint, shape `(bits,)`, float32.

    Raises:
        ValueError: If drugs have no fingerprint; the message names them.
    """
    known = tokenizer.drug_table or DrugTable({})
    new = [drug for drug in drugs if known.find(drug) is None]
    if not new:
        return {}
    if config.drug_table is None or config.drug_fingerprints is None:
        raise ValueError(
            f"drugs={config.drugs}: {len(new)} drugs are not in the drug table of the base ({', '.join(new[:5])}): "
            "make fingerprints of them with `tahoex1 drug-fingerprints`, and name the two files with drug_table and "
            "drug_fingerprints."
        )
    table = DrugTable(json.loads(Path(config.drug_table).read_text(encoding="utf-8")))
    rows = np.load(config.drug_fingerprints, allow_pickle=False)
    numbers = {drug: table.find(drug) for drug in new}
    found = {drug: number for drug, number in numbers.items() if number is not None and number < len(rows)}
    missing = [drug for drug in new if drug not in found]
    if missing:
        raise ValueError(f"drug_table={config.drug_table} has no fingerprint of {', '.join(missing[:5])}: add them.")
    return {drug: rows[number].astype(np.float32) for drug, number in found.items()}


def teach_tokenizer(tokenizer: TahoeX1Tokenizer, drugs: list[str], first: int) -> None:
    """Add new drugs to a tokenizer's table, with ids from `first` on."""
    table = {**(tokenizer.drug_to_id or {}), **{drug: first + n for n, drug in enumerate(drugs)}}
    tokenizer.drug_to_id = table
    tokenizer.init_kwargs["drug_to_id"] = table  # `save_pretrained` writes these
