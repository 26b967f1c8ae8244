# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of cells from every kind of source."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.benchmarking.cells import (
    EvaluationFile,
    aligned_values,
    fitted_pca,
    read_cells,
    stacked,
    variable_genes,
)
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
        max_length: Largest number of tokens of a cell; by default the context length of the model.
    """

    dtype: DtypeName = "float32"
    batch_tokens: int | None = None
    device: str | None = None
    max_length: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return everything on which embeddings depend by more than roundings."""
        return {"dtype": self.dtype} | ({"max_length": self.max_length} if self.max_length else {})

    def of_encoder(self) -> dict[str, Any]:
        """Return the arguments of a `CellEncoder`."""
        return {"dtype": self.dtype, "batch_tokens": self.batch_tokens, "device": self.device}


def loaded(source: Source, seed: int) -> tuple[Any, TahoeX1Tokenizer]:
    """Return the model of a source and its tokenizer; for an untrained twin, a model of the same shape."""
    model, tokenizer = model_and_tokenizer(source.what)
    if source.kind == "untrained":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return TahoeX1Model(without_peft(model).config), tokenizer
    return model, tokenizer


def known_genes(model: str, cells: EvaluationFile) -> np.ndarray:
    """Return whether a model's vocabulary has the genes of some cells, shape `(genes,)`."""
    opened = open_cells(cells.adata, load_tokenizer(model_folder(model)))
    assert opened.genes is not None  # an AnnData has genes
    return np.asarray(opened.genes.token_ids >= 0)


def embed_cells(source: Source, cells: EvaluationFile, seed: int, computing: Computing) -> Any:
    """Return the embeddings of cells.

    Args:
        source: Source of the embeddings.
        cells: Cells.
        seed: Seed of random numbers, of the untrained twin and of PCA's solver.
        computing: How a model is run.

    Returns:
        `(cells, width)`, float32 for models; CSR for expression.

    Raises:
        ValueError: If a file lacks a cell, or the cells that PCA is fitted to are these.
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
    if source.kind == "projected":
        return projected(source, cells, seed)
    if source.what:
        # All genes that the model knows, since the model is given all of them.
        values = cells.values[:, known_genes(source.what, cells)]
        values = values[:, np.flatnonzero(values.getnnz(axis=0))]
        return fitted_pca(values, seed).transform(values)
    values = cells.values[:, variable_genes(cells.values)]
    return values if source.kind == "expression" else fitted_pca(values, seed).transform(values)


def projected(source: Source, cells: EvaluationFile, seed: int) -> np.ndarray:
    """Return the components of cells on the axes of PCA that was fitted to other cells, `(cells, components)`.

    PCA is fitted to the most variable genes of the other cells among those that both have.
    """
    others = read_cells(Path(source.what))
    if others.fingerprint() == cells.fingerprint():
        raise ValueError(f"--source {source.name}: {source.what} holds the cells of {cells.path}: name other cells.")
    shared = np.intersect1d(others.genes, cells.genes)
    if len(shared) < 2:
        raise ValueError(f"--source {source.name}: {source.what} shares {len(shared)} genes with {cells.path}.")
    training = stacked([others], shared, seed)
    chosen = variable_genes(training)
    return np.asarray(fitted_pca(training[:, chosen], seed).transform(aligned_values(cells, shared[chosen])))


def harmonized(cells: EvaluationFile, batches: np.ndarray, seed: int) -> np.ndarray:
    """Return the principal components of cells from which Harmony has removed the batches, `(cells, components)`.

    Args:
        cells: Cells.
        batches: Number of each cell's batch, shape `(cells,)`.
        seed: Seed of PCA's solver and of Harmony's clusters.
    """
    import pandas as pd
    from harmonypy import run_harmony

    values = embed_cells(Source("PCA", "pca"), cells, seed, Computing())
    table = pd.DataFrame({"batch": batches.astype(str)})
    found = np.asarray(run_harmony(values, table, "batch", verbose=False, random_state=seed, ncores=1).Z_corr)
    return found if len(found) == len(batches) else found.T
