# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embedding the cells of an AnnData."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tahoex1_hf.cells.inputs import AnnDataInput, EncodeOptions
from tahoex1_hf.inference.chunks import embed_input, with_context
from tahoex1_hf.inference.encoder import CellEncoder, DtypeName
from tahoex1_hf.inference.provenance import provenance, provenance_key
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData


def embed_anndata(
    adata: "AnnData",
    model: TahoeX1PreTrainedModel,
    tokenizer: TahoeX1Tokenizer,
    *,
    key_added: str = "X_tahoe_x1",
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Mapping[str, str] | None = None,
    drugs: str | Sequence[str | None] | None = None,
    gene_embeddings: bool = False,
    max_length: int | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: DtypeName = "auto",
    progress: bool = True,
) -> None:
    """Write the cells' embeddings into `adata.obsm[key_added]`, float32 rows of length 1.

    What made them goes into `adata.uns`, under `key_added` without its `X_` (`adata.uns["tahoe_x1"]`). Nothing else
    in `adata` changes. For files larger than memory there is `embed_files`.

    Args:
        adata: cells with raw counts, in memory or backed.
        model: any Tahoe-x1 model; it is moved to the device and set to eval mode.
        tokenizer: the tokenizer of the same checkpoint.
        key_added: slot of `obsm` (and, with `gene_embeddings`, of `varm`) to write.
        layer: layer with the counts; by default `adata.X`.
        gene_id_column: column of `adata.var` with Ensembl ids; by default `adata.var_names`.
        gene_symbols: gene symbol -> Ensembl id, for genes named by symbol.
        drugs: for models with a drug encoder: a column of `adata.obs`, the drug of all cells, or one per cell.
        gene_embeddings: also write each gene's mean contextual embedding over the cells that express it to
            `adata.varm[key_added]`; NaN where no cell does, or the vocabulary lacks the gene.
        max_length: most tokens of a cell; by default the tokenizer's `context_length`.
        seed: seed of the sampling of cells with more genes than that; the same cells give the same embeddings
            whatever the batches.
        batch_tokens: most tokens of a batch, padding included; less needs less memory.
        device: by default CUDA or Apple's GPU where there is one, else the CPU.
        dtype: precision of the matrix products; `"auto"` is bfloat16 where the hardware multiplies it faster, and
            `"int8"` needs a quarter of the memory for the weights (torchao).
        progress: whether to show a progress bar.

    Raises:
        ValueError: for counts, genes or arguments that cannot be used; the message says what to do.
    """
    tokenizer = with_context(tokenizer, max_length)
    options = EncodeOptions(tokenizer, drugs, seed, gene_id_column, gene_symbols, layer)
    cells = AnnDataInput(adata, options)
    encoder = CellEncoder(model, tokenizer, batch_tokens=batch_tokens, device=device, dtype=dtype)
    gene_means = encoder.gene_means(cells.genes) if gene_embeddings else None
    embeddings, num_empty = embed_input(encoder, cells, gene_means, progress)
    # Written last, together: an interrupted run leaves adata as it was.
    adata.obsm[key_added] = embeddings
    if gene_means is not None:
        adata.varm[key_added] = gene_means.means(cells.genes.token_ids)
    name = model.name_or_path or ""
    adata.uns[provenance_key(key_added)] = provenance(name, encoder, options, [cells], num_empty)
