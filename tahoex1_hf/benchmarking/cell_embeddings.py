# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of cells from every kind of source."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from tahoex1_hf.benchmarking.cells import CellSet, fitted_pca, variable_genes
from tahoex1_hf.benchmarking.files import aligned, read_embeddings
from tahoex1_hf.benchmarking.sources import Source, model_folder
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.embedding.in_memory import embed_anndata
from tahoex1_hf.finetuning.cells.baselines import COMPONENTS
from tahoex1_hf.hub.loading import load_tokenizer
from tahoex1_hf.hub.models import model_and_tokenizer, without_peft
from tahoex1_hf.inference.encoder import DtypeName
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1Model
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer


@dataclass(frozen=True)
class Computing:
    """How models are run; only the precision changes their embeddings by more than roundings.

    Attributes:
        dtype: Precision of the matrix products; float32 gives the same scores on all machines.
        batch_tokens: Most tokens of a batch; by default suited to the device.
        device: Device; by default the fastest there is.
    """

    dtype: DtypeName = "float32"
    batch_tokens: int | None = None
    device: str | None = None


def loaded(source: Source, seed: int) -> tuple[Any, TahoeX1Tokenizer]:
    """Return the model of a source and its tokenizer; for an untrained twin, a model of the same shape."""
    model, tokenizer = model_and_tokenizer(source.what)
    if source.kind == "untrained":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return TahoeX1Model(without_peft(model).config), tokenizer
    return model, tokenizer


def known_genes(model: str, cells: CellSet) -> np.ndarray:
    """Return whether a model's vocabulary has the genes of some cells, shape `(genes,)`."""
    opened = open_cells(cells.adata, load_tokenizer(model_folder(model)))
    assert opened.genes is not None  # an AnnData has genes
    return np.asarray(opened.genes.token_ids >= 0)


def embed_cells(source: Source, cells: CellSet, seed: int, computing: Computing) -> Any:
    """Return the embeddings of cells.

    Args:
        source: Source of the embeddings.
        cells: Cells.
        seed: Seed of random numbers, of the untrained twin and of PCA's solver.
        computing: How a model is run.

    Returns:
        `(cells, width)`, float32 for models; CSR for expression.

    Raises:
        ValueError: If a file lacks a cell.
    """
    if source.kind in ("model", "untrained"):
        model, tokenizer = loaded(source, seed)
        return embed_anndata(cells.adata, model, tokenizer, **asdict(computing), return_array=True)
    if source.kind == "file":
        names, values = read_embeddings(source, "obs")
        found = aligned(names, values, cells.adata.obs_names.astype(str).tolist())
        if np.isnan(found).any():
            missing = cells.adata.obs_names[np.isnan(found).any(axis=1)]
            raise ValueError(
                f"--source {source.name}: {source.what} has no embedding, or NaN, for {len(missing)} cells of "
                f"{cells.path} ({missing[0]} is one): name the cells as there, and embed all of them."
            )
        return found
    if source.kind == "random":
        return np.random.default_rng(seed).standard_normal((cells.adata.n_obs, COMPONENTS))
    if source.what:
        # All genes that the model knows, since the model is given all of them.
        values = cells.values[:, known_genes(source.what, cells)]
        values = values[:, np.flatnonzero(values.getnnz(axis=0))]
        return fitted_pca(values, seed).transform(values)
    values = cells.values[:, variable_genes(cells.values)]
    return values if source.kind == "expression" else fitted_pca(values, seed).transform(values)
