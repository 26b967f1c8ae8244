# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Drugs that a model does not know, given by their SMILES.

The drug encoder reads a row of a table, which began as the drug's fingerprint. A new drug gets a row that is its
fingerprint, so that it differs from the others by its structure alone, and cells can be embedded with it without any
training. That says nothing about how well the model foretells its effect: the encoder has seen 377 compounds.
"""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.common.names import public_name
from tahoex1_hf.data.fingerprints import read_fingerprints
from tahoex1_hf.hub.added_drugs import with_added_drugs
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

SmilesTable = str | Path | Mapping[str, str]
"""A table with the columns `drug` and `canonical_smiles` (or `smiles`), or drug -> SMILES."""


@dataclass(frozen=True, eq=False)
class NewDrugs:
    """Drugs that were added to a model's table.

    Attributes:
        fingerprints: Drug -> fingerprint.
        source: Name of the table that they come from.
    """

    fingerprints: dict[str, np.ndarray]
    source: str

    def digest(self) -> str:
        """Return the SHA-256 of the drugs' names and fingerprints, which decide the result."""
        digest = hashlib.sha256()
        for name, row in self.fingerprints.items():
            digest.update(f"{name}\0".encode() + np.packbits(row > 0).tobytes())
        return digest.hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Return what to note beside a result, in types that an h5ad file holds."""
        return {"drug_table": self.source, "drug_table_digest": self.digest(), "new_drugs": len(self.fingerprints)}


def with_new_drugs(
    model: Any,
    tokenizer: TahoeX1Tokenizer,
    table: SmilesTable | None,
    drugs: str | Sequence[str | None] | None,
) -> tuple[Any, TahoeX1Tokenizer, NewDrugs | None]:
    """Return a model and a tokenizer that know the drugs of a table; those given stay as they are.

    Args:
        model: Model with a drug encoder; its weights are shared.
        tokenizer: Tokenizer of the model.
        table: Drugs and their SMILES; None changes nothing. Drugs that the model knows keep its own row.
        drugs: Drugs of the cells, without which the table has no use.

    Raises:
        ValueError: For a table that cannot be read, a drug that the model knows with another fingerprint, a model
            without a drug encoder, and a table without drugs of cells.
    """
    if table is None:
        return model, tokenizer, None
    name = "drug_table" if isinstance(table, Mapping) else f"drug_table={str(table)!r}"
    known, config = tokenizer.drug_table, model.config
    if known is None or not config.num_drugs:
        raise ValueError(f"{name}: this model has no drug encoder, leave the table out, or use the 3B model.")
    if drugs is None:
        raise ValueError(f"{name} says what drugs are, and drugs= (--drugs) which cells have them: pass that, too.")
    rows = read_fingerprints(table, config.drug_fingerprint_size)
    encoder = model.base_model.get_submodule("embeddings.drug_encoder.embedding")
    new: dict[str, np.ndarray] = {}
    for drug, fingerprint in rows.items():
        number = known.find(drug)
        if number is None:
            new[drug] = fingerprint
        elif not np.array_equal(_bits(encoder, number), fingerprint > 0):
            raise ValueError(
                f"{name}: the model knows a drug {drug!r}, whose row is not the fingerprint of this SMILES: rename "
                "yours, or take it out to use the model's."
            )
    logger.info(
        "%s: %d drugs are new to the model and get their fingerprint as a row; %d are in its table.",
        name,
        len(new),
        len(rows) - len(new),
    )
    taught = copy.copy(tokenizer)
    taught.drug_to_id = {**known.ids, **{drug: config.num_drugs + place for place, drug in enumerate(new)}}
    if new:
        model = with_added_drugs(model, np.stack(list(new.values())))
    return model, taught, NewDrugs(new, "" if isinstance(table, Mapping) else public_name(str(table)))


def _bits(encoder: Any, number: int) -> np.ndarray:
    """Return the fingerprint that a row of a drug table began as; training moves its zeros and ones a little."""
    found: np.ndarray = (encoder.weight.detach()[number].float() > 0.5).cpu().numpy()
    return found
