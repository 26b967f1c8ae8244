# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A record of how embeddings or predictions were made, kept beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from tahoex1_hf.cells.encoding import EncodeOptions
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.names import public_name
from tahoex1_hf.inference.encoder import CellEncoder


def provenance(
    model_name: str, encoder: CellEncoder, options: EncodeOptions, inputs: Sequence[CellInput], num_empty: int
) -> dict[str, Any]:
    """Describe how embeddings were made, in types that an h5ad file holds.

    Args:
        model_name: Folder or Hub name of the model.
        encoder: Model that was run.
        options: Options of the encoding.
        inputs: Origin of the cells.
        num_empty: Number of cells in which no known gene is expressed.
    """
    from tahoex1_hf import __version__

    tokenizer = options.tokenizer
    genes = [each.genes for each in inputs if each.genes is not None]
    seen = [each.seen for each in inputs if each.seen is not None]
    found: dict[str, list[Any]] = {
        "matched_genes": [match.num_matched for match in genes],
        "unknown_genes": [match.num_unknown for match in genes],
        "duplicate_genes": [match.num_duplicates for match in genes],
        "genes_from": [each.found.source for each in inputs if each.found is not None],
        "counts_from": [each.counts_from for each in inputs if each.counts_from],
        "unknown_counts_share": [each.lost for each in seen],
        "unknown_genes_with_most_counts": [", ".join(name for name, _ in each.most) for each in seen],
    }
    return {
        "model": public_name(model_name),
        "revision": model_revision(model_name),
        "package_version": __version__,
        **{name: values[0] if len(inputs) == 1 else values for name, values in found.items() if values},
        "cells_without_known_genes": num_empty,
        "value_encoding": tokenizer.value_encoding,
        "max_length": tokenizer.context_length or 0,
        "overflow": tokenizer.overflow,
        "seed": options.seed,
        "draws": options.draws,
        "dtype": encoder.dtype_name,
        "hidden_layer": encoder.hidden_layer,
        "device": encoder.device.type,
        "attention": encoder.attention,
        "normalized": "L2",
    }


def model_revision(name_or_path: str) -> str:
    """Return the commit of a model in the Hugging Face cache, given its path there or its Hub name; otherwise ""."""
    path: Any = name_or_path
    if name_or_path.count("/") == 1 and not Path(name_or_path).exists():
        path = try_to_load_from_cache(name_or_path, "config.json")
    parts = Path(path).parts if isinstance(path, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""


def deviation_key(key_added: str) -> str:
    """Return the column of `obs`, or of a table, that says how far embeddings vary with the sample."""
    return f"{provenance_key(key_added)}_sd"


def number_columns(key_added: str, draws: int, score_masks: int) -> dict[str, str]:
    """Return the numbers that a run computes of each cell beside its embedding, with their columns of `obs`.

    Args:
        key_added: Slot of the embeddings.
        draws: Number of samples of a long cell; with several, a cell has a deviation.
        score_masks: Number of masks of the scores; 0 for no scores.
    """
    columns = {"deviation": deviation_key(key_added)} if draws > 1 else {}
    if score_masks:
        score = f"{provenance_key(key_added)}_score"
        columns |= {"score": score, "score_sd": f"{score}_sd"}
    return columns


def check_key(key_added: str) -> None:
    """Raise ValueError for a name of a slot that `.h5ad` files cannot have."""
    if not key_added or "/" in key_added:
        raise ValueError(
            f"key_added={key_added!r} (--key-added): .h5ad files take a slash for a folder. Choose a name without one."
        )


def provenance_key(key_added: str) -> str:
    """Return the slot of `uns` that goes with a slot of `obsm`."""
    return key_added.removeprefix("X_")
