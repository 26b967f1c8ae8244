# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A model with its settings, the record that its embeddings have, and embeddings that a run keeps until it ends."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.digests import json_digest, tokenizer_digest, weights_digest
from tahoex1_hf.common.files import write_json
from tahoex1_hf.common.names import public_name
from tahoex1_hf.embedding.files import embed_files
from tahoex1_hf.embedding.stored import differences
from tahoex1_hf.hub.models import model_name, without_peft
from tahoex1_hf.inference.encoder import Dtype, choose_device, choose_dtype
from tahoex1_hf.inference.provenance import model_revision, provenance_key
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

_MADE, _RECORD = "embeddings.npy", "embeddings.json"


@dataclass(frozen=True, eq=False)
class Embedder:
    """A model and the settings with which it embeds.

    Attributes:
        loaded: Model.
        given: What was asked for, the name or the model.
        tokenizer: Tokenizer, with the context length and the choice of genes that are used.
        genes: Where genes and counts are.
        seed: Seed of the samples of long cells.
        batch_tokens: Most tokens of a batch.
        device: Device.
        dtype: Precision.
    """

    loaded: Any
    given: Any
    tokenizer: TahoeX1Tokenizer
    genes: GeneOptions
    seed: int
    batch_tokens: int | None
    device: str | torch.device | None
    dtype: Dtype

    def record(self) -> dict[str, Any]:
        """Return the settings that decide embeddings, under the names of the records that `tahoex1 embed` writes."""
        name = model_name(self.given, self.loaded)
        device = choose_device(self.device)
        precision = str(choose_dtype(self.dtype, device)).removeprefix("torch.")
        return {
            "model": public_name(name),
            "revision": model_revision(name),
            "value_encoding": self.tokenizer.value_encoding,
            "max_length": self.tokenizer.context_length or 0,
            "overflow": self.tokenizer.overflow,
            "seed": self.seed,
            "draws": 1,
            "dtype": f"int8 weights, {precision}" if self.dtype == "int8" else precision,
            "hidden_layer": without_peft(self.loaded).config.num_hidden_layers,
            "normalized": "L2",
        }

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `embed_files` and `embed_anndata` that these settings stand for."""
        genes = self.genes
        return {
            "layer": genes.layer,
            "gene_id_column": genes.gene_id_column,
            "gene_symbols": genes.gene_symbols,
            "species": genes.species,
            "orthologs": genes.orthologs,
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "device": self.device,
            "dtype": self.dtype,
        }


def check_record(record: Mapping[str, Any] | None, wanted: Mapping[str, Any], where: str, key: str) -> None:
    """Raise ValueError if embeddings were not made by the same model with the same settings.

    Args:
        record: Record beside the embeddings; None where there is none.
        wanted: The settings of this run.
        where: Name of the cells, for messages.
        key: Slot of `obsm` with the embeddings.
    """
    slot = f'uns["{provenance_key(key)}"]'
    if record is None:
        raise ValueError(
            f'{where} has obsm["{key}"], but no {slot} that says how it was made, so it cannot be known whether '
            "reference and query go together: leave key (--key) out to embed both."
        )
    other = differences(record, wanted, tuple(wanted), "this run has")
    if other:
        raise ValueError(
            f'{where}: obsm["{key}"] was made otherwise ({"; ".join(other)}). Distances between embeddings of '
            "different models or settings mean nothing: leave key (--key) out to embed both, or pass the same model "
            "and settings."
        )


def embed_inputs(
    embedder: Embedder, inputs: Sequence[CellInput], folder: Path, restart: bool, progress: bool
) -> list[np.ndarray]:
    """Embed the cells of files, or take what an earlier, interrupted run has embedded.

    Args:
        embedder: Model and settings.
        inputs: Opened files.
        folder: Folder of the run, in which the embeddings are kept until it ends.
        restart: Whether to discard the files of a run with other settings.
        progress: Whether to show a progress bar.

    Returns:
        The embeddings of each file, `(cells, width)` float32, which lie on disk.
    """
    if not inputs:
        return []
    made = folder / _MADE
    embed_once(embedder, inputs, made, restart, progress)
    every = np.load(made, mmap_mode="r")
    return np.split(every, np.cumsum([each.num_cells for each in inputs])[:-1])


def embed_once(
    embedder: Embedder, inputs: Sequence[CellInput], made: Path, restart: bool, progress: bool, **more: Any
) -> None:
    """Embed the cells of files, unless an earlier, interrupted run has done so with the same settings.

    Args:
        embedder: Model and settings.
        inputs: Opened files.
        made: File for the embeddings; beside it, with the ending `.json`, lies what decides them.
        restart: Whether to discard the files of a run with other settings.
        progress: Whether to show a progress bar.
        **more: Further arguments of `embed_files`.
    """
    record = made.with_suffix(".json")
    identity = {
        "cells": [[each.path, each.fingerprint, each.num_cells] for each in inputs],
        "genes": [json_digest(np.asarray(each.genes.token_ids).tolist()) for each in inputs if each.genes is not None],
        "weights": weights_digest(embedder.loaded),
        "tokenizer": tokenizer_digest(embedder.tokenizer),
        "layer": embedder.genes.layer,
        "batch_tokens": embedder.batch_tokens,
        **embedder.record(),
        **more,
    }
    # Written and read as JSON, so that what is compared has the same types.
    if made.exists() and record.exists() and json.loads(record.read_text()) == json.loads(json.dumps(identity)):
        logger.info("Resuming: the embeddings in %s are complete.", made.parent)
        return
    record.unlink(missing_ok=True)
    arguments = {**embedder.arguments(), **more}
    paths = [each.path for each in inputs]
    embed_files(paths, made, embedder.loaded, embedder.tokenizer, restart=restart, progress=progress, **arguments)
    write_json(record, identity)


def forget_embeddings(folder: Path) -> None:
    """Remove the embeddings that a run has kept in its folder."""
    for name in (_RECORD, _MADE):
        (folder / name).unlink(missing_ok=True)
