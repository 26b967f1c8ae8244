# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Predicted classes of genes: the mean of a gene's logits over all cells that express it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from tahoex1_hf.cells.encoding import DrugIds, EncodeOptions
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.encoding_tahoe_x1 import GeneRows
from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.cells.long_cells import split_long_cells
from tahoex1_hf.finetuning.methods import trained_head
from tahoex1_hf.hub.adapters import find_adapter, load_adapter, read_record
from tahoex1_hf.hub.models import without_peft
from tahoex1_hf.inference.encoder import CellEncoder, Dtype, GeneMeans
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForTokenClassification
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_ENCODED_CELLS = 256  # cells encoded at a time


def cell_chunks(cells: FinetuningData, numbers: np.ndarray) -> Iterator[tuple[GeneRows, np.ndarray | None]]:
    """Yield the genes and drugs of some cells of a file, a few hundred cells at a time."""
    for start in range(0, len(numbers), _ENCODED_CELLS):
        part, drugs = numbers[start : start + _ENCODED_CELLS], cells.drug_ids
        yield cells.rows_at(part), None if drugs is None else drugs[part]


@torch.no_grad()
def predict_genes(
    model: TahoeX1ForTokenClassification,
    head: torch.nn.Linear,
    tokenizer: TahoeX1Tokenizer,
    chunks: Iterable[tuple[GeneRows, np.ndarray | None]],
    tokens: np.ndarray,
    device: torch.device | None = None,
    dtype: Dtype = "float32",
) -> np.ndarray:
    """Predict the classes of genes from all cells.

    The head is linear, so the mean of its logits equals its logit for the mean embedding.

    Args:
        model: Model in eval mode, with adapters in it where there are any.
        head: Linear layer on its gene embeddings.
        tokenizer: Tokenizer of the model.
        chunks: Genes and drugs of the cells.
        tokens: Token ids, shape `(genes,)`.
        device: Device to compute on; by default the fastest there is.
        dtype: Precision of the transformer.

    Returns:
        `(genes, classes)` float32 mean logits over the cells that express a gene; NaN where none does.
    """
    encoder = CellEncoder(model, tokenizer, device=device, dtype=dtype)
    embeddings = torch.from_numpy(mean_embeddings(encoder, chunks, tokens)).to(head.weight)
    return cast(np.ndarray, head(embeddings).float().cpu().numpy())


@torch.inference_mode()
def mean_embeddings(
    encoder: CellEncoder, chunks: Iterable[tuple[GeneRows, np.ndarray | None]], tokens: np.ndarray
) -> np.ndarray:
    """Return mean embeddings over the cells that express a gene, `(genes, width)` float32; NaN where none does."""
    means = GeneMeans(tokens, encoder.config.vocab_size, encoder.width, encoder.device)
    for rows, drugs in chunks:
        cells = split_long_cells(encoder.tokenizer, rows, drugs)
        for _ in encoder.pooled_batches(cells, means):
            pass
    return means.means(tokens)


def predict_gene_classes(
    adapter: str | Path,
    adata: "AnnData",
    base: str | Path | None = None,
    *,
    size: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    layer: str | None = None,
    drugs: str | None = None,
) -> "pd.DataFrame":
    """Predict the classes of all genes that some cell expresses.

    Args:
        adapter: Folder or Hub id of a model trained with `task=gene_classification`.
        adata: Cells with raw counts, in memory or backed.
        base: Folder or Hub id of the base; by default the one that the adapter names.
        size: Name of the base's size, where a folder or repository holds several.
        gene_id_column: Column of `var` with Ensembl ids; by default they are looked for.
        gene_symbols: Gene symbol -> Ensembl id, or the path of a table with both; by default the package's table.
        species: "human" or "mouse"; genes of a mouse need `orthologs`.
        orthologs: Mouse gene -> Ensembl ids of human orthologues, or the path of a table. The rows are the human ones.
        layer: Layer with the counts; by default `X`.
        drugs: For models with a drug encoder: the drug of all cells.

    Returns:
        A row for every gene that some cell expresses, by Ensembl id: `predicted`, `probability_<class>` of each class,
        and `cells`, the number of cells that express it.

    Raises:
        ValueError: For an adapter of another task, and for cells that cannot be read.
    """
    import pandas as pd
    from scipy.special import softmax

    folder = find_adapter(adapter)
    record = read_record(folder)
    task = record.get("task")
    if task != "gene_classification":
        raise ValueError(f"adapter={adapter} was trained for {task}, not for gene_classification.")
    model, tokenizer = load_adapter(folder, base, size=size)
    options = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
    cells = open_cells(adata, tokenizer, options)
    drug_ids = DrugIds(cells, EncodeOptions(tokenizer, drugs, unknown_drugs=record.get("unknown_drugs") or "error"))
    expressing = np.zeros(len(tokenizer), dtype=np.int64)

    def chunks() -> Iterator[tuple[GeneRows, np.ndarray | None]]:
        for chunk in cells.chunks(0, cells.num_cells, _ENCODED_CELLS, drug_ids.columns):
            expressing[:] += np.bincount(chunk.tokens, minlength=len(expressing))
            yield chunk, drug_ids.of_rows(chunk)

    inner: Any = without_peft(model)
    known = cells.genes.token_ids  # type: ignore[union-attr]  # an AnnData has genes
    genes = np.unique(known[known >= 0])
    logits = predict_genes(inner, trained_head(model), tokenizer, chunks(), genes)
    seen = expressing[genes] > 0
    genes, chances = genes[seen], softmax(logits[seen].astype(np.float64), axis=1)
    classes = [inner.config.id2label[number] for number in range(chances.shape[1])]
    columns: dict[str, Any] = {"predicted": np.array(classes)[chances.argmax(axis=1)]}
    columns |= {f"probability_{name}": chances[:, number] for number, name in enumerate(classes)}
    names = [str(tokenizer.convert_ids_to_tokens(int(token))) for token in genes]
    return pd.DataFrame({**columns, "cells": expressing[genes]}, index=names)
