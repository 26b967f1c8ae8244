# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embedding of the cells of an AnnData."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

import numpy as np
import torch

from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import check_writable, open_cells
from tahoex1_hf.embedding.scores import scorer_of
from tahoex1_hf.hub.models import model_and_tokenizer, model_name, without_peft
from tahoex1_hf.inference.chunks import embed_input, with_settings
from tahoex1_hf.inference.encoder import CellEncoder, Dtype
from tahoex1_hf.inference.gene_embeddings import embed_genes, gene_kinds, gene_slot
from tahoex1_hf.inference.provenance import check_key, number_columns, provenance, provenance_key
from tahoex1_hf.inference.scoring import num_masks
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.runs.new_drugs import SmilesTable, with_new_drugs
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData


class Options(TypedDict, total=False):
    """Keyword arguments of `embed_anndata` that do not change what it returns, for the overloads below."""

    size: str | None
    revision: str | None
    key_added: str
    layer: str | None
    gene_id_column: str | None
    gene_symbols: Table | str | Path | None
    species: str
    orthologs: Mapping[str, Sequence[str]] | str | Path | None
    drugs: str | Sequence[str | None] | None
    unknown_drugs: str | None
    drug_table: SmilesTable | None
    gene_embeddings: bool | str | Sequence[str]
    max_length: int | None
    overflow: str | None
    draws: int
    seed: int
    batch_tokens: int | None
    device: str | torch.device | None
    dtype: Dtype
    hidden_layer: int | None
    score: bool | int
    progress: bool


@overload
def embed_anndata(
    adata: "AnnData",
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    return_array: Literal[False] = False,
    return_deviations: Literal[False] = False,
    **options: Unpack[Options],
) -> None: ...
@overload
def embed_anndata(
    adata: "AnnData",
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    return_array: Literal[True],
    return_deviations: Literal[False] = False,
    **options: Unpack[Options],
) -> np.ndarray: ...
@overload
def embed_anndata(
    adata: "AnnData",
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    return_array: Literal[True],
    return_deviations: Literal[True],
    **options: Unpack[Options],
) -> tuple[np.ndarray, np.ndarray]: ...
def embed_anndata(
    adata: "AnnData",
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    size: str | None = None,
    revision: str | None = None,
    key_added: str = "X_tahoe_x1",
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    drugs: str | Sequence[str | None] | None = None,
    unknown_drugs: str | None = None,
    drug_table: SmilesTable | None = None,
    gene_embeddings: bool | str | Sequence[str] = False,
    max_length: int | None = None,
    overflow: str | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    hidden_layer: int | None = None,
    score: bool | int = False,
    return_array: bool = False,
    return_deviations: bool = False,
    progress: bool = True,
) -> np.ndarray | tuple[np.ndarray, np.ndarray] | None:
    """Write the cells' embeddings into `adata.obsm[key_added]`, float32 rows of length 1, or return them.

    A record of how they were made is written into `adata.uns`, under `key_added` without its `X_`, by default
    `adata.uns["tahoe_x1"]`. Nothing else in `adata` changes unless `gene_embeddings` or `draws` ask for it. For files
    larger than memory, use `embed_files`.

    Args:
        adata: Cells with raw counts, in memory or backed.
        model: Folder or Hub name of a Tahoe-x1 model, folder of an adapter, or a loaded model, which is moved to the
            device and set to eval mode.
        tokenizer: Tokenizer of the model; a loaded model needs one, otherwise the model's own is loaded.
        size: Name of the size to load, such as `"70m"`, where a folder or repository holds several.
        revision: Branch, tag or commit of a Hub repository.
        key_added: Slot of `obsm` (and, with `gene_embeddings`, of `varm`) to write.
        layer: Layer with the counts, or "raw" for `adata.raw`, or "X". By default `adata.X`; if it does not hold
            counts, the first that does of the layers `counts`, `raw_counts` and `raw` and of `adata.raw`, with a
            warning.
        gene_id_column: Column of `adata.var` with Ensembl ids; by default `adata.var_names` and all columns are
            searched for ids.
        gene_symbols: Gene symbol -> Ensembl id, or the path of a table with both, for genes that are named by symbol;
            by default the package's table.
        species: Species of the cells, "human" or "mouse"; mouse genes need `orthologs`.
        orthologs: Mouse gene (Ensembl id or symbol) -> Ensembl ids of human orthologues, or the path of a table.
        drugs: Column of `adata.obs`, one drug for all cells, or one drug per cell, for models with a drug encoder.
        unknown_drugs: Rule for drugs that are not in the model's table: `"pad"` counts their cells as cells without a
            drug, as in the original, and lists them in a warning; `"error"` refuses them; by default the tokenizer's
            `unknown_drugs`, which is `"pad"`. A single drug for all cells must always be known.
        drug_table: Table with the columns `drug` and `canonical_smiles` (or `smiles`), or drug -> SMILES, for drugs
            that the model's table lacks: each gets its Morgan fingerprint as a row. A compound of similar structure
            gets a similar vector; the encoder saw 377 compounds, and how well it does on others is not known.
        gene_embeddings: True for each gene's mean contextual embedding over the cells that express it, in
            `adata.varm[key_added]`; or some of the kinds in the original's benchmarks, such as `"GE,TE"`. `"GE"` is
            the model's input table, in `varm[key_added + "_GE"]`; `"TE"` is the output of the layers without any cell,
            in `varm[key_added + "_TE"]`; `"EA"` is the same as True. A gene that no cell expresses gets its TE as EA,
            and is listed in `uns[…]["genes_not_expressed"]`; genes that are not in the vocabulary are NaN.
        max_length: Largest number of tokens of a cell; by default the tokenizer's `context_length`.
        overflow: Choice of the genes of a cell longer than `max_length`: `"sample"` for random genes, which depend
            only on the cell's content and the seed; `"highest"` for the highest counts; `"first"` for the first
            columns; by default the tokenizer's `overflow`.
        draws: Number of samples of each cell longer than `max_length`. With more than one, a cell's embedding is the
            mean over its samples, scaled to length 1. `adata.obs["tahoe_x1_sd"]`, or the same with the name of another
            `key_added`, then says how far the embedding of one sample lies from the mean: the square root of the
            variances over the samples, summed over the dimensions, in units of the embeddings' length, which is 1. It
            is 0 for cells that fit. Gene embeddings are those of the first sample.
        seed: Seed of the sampling; a cell's sample depends only on its genes, its counts and the seed.
        batch_tokens: Largest number of tokens in a batch, padding included, by default chosen for the device. Smaller
            batches need less memory and change embeddings only by float32 roundings.
        device: Device to run on; by default CUDA or Apple's GPU if there is one, otherwise the CPU.
        dtype: Precision of the matrix products: `"float32"`; `"bfloat16"`; `"auto"`, which is bfloat16 where the
            hardware multiplies it faster; or `"int8"`, which needs a quarter of the memory for the weights (torchao);
            or torch's dtype of such a name.
        hidden_layer: Number of the layer from whose output all embeddings are taken, as in the model's
            `hidden_states`: 0 is the input of the first layer, and -1, the default, the last layer's output after the
            final norm. Outputs of other layers are taken without that norm.
        score: Whether to score how surprising each cell is to the model, or by how many masks; True is 4. Half of a
            cell's genes are hidden, as in the model's training, and predicted from the others; `obs["tahoe_x1_score"]`
            (or with the name of another `key_added`) has the squared error as a share of the variance of the cell's
            values, 0 for a perfect prediction and 1 for what the cell's mean alone gives, and
            `obs["tahoe_x1_score_sd"]` how far one mask's score lies from their mean. A score depends on the cell's
            content and the seed alone. The model must have its pretraining head. Each mask takes a further pass over
            the cells. Of several samples, the first is scored.
        return_array: Whether to return the embeddings instead of writing anything into `adata`.
        return_deviations: Whether to return the deviations of `draws`, too; goes with `return_array`.
        progress: Whether to show a progress bar.

    Returns:
        `(cells, width)` float32 with `return_array`, in the order of the cells; with `return_deviations` a pair of
        that and of `(cells,)` float32, what else would be in `obs["tahoe_x1_sd"]`; else None.

    Raises:
        ValueError: If counts, genes or arguments cannot be used; the message says what to do.
    """
    kinds = gene_kinds(gene_embeddings)
    check_key(key_added)
    if return_deviations and not return_array:
        raise ValueError("return_deviations goes with return_array=True; without it, deviations are written into obs.")
    if not return_array:
        check_writable(adata)
    elif kinds:
        raise ValueError(
            f"gene_embeddings={gene_embeddings!r} are written into varm, and return_array=True writes nothing: leave "
            "one of them out."
        )
    masks = num_masks(score)
    if masks and return_array:
        raise ValueError(f"score={score!r} is written into obs, and return_array=True writes nothing: leave one out.")
    loaded, tokenizer = model_and_tokenizer(model, tokenizer, size=size, revision=revision, expression=masks > 0)
    used, tokenizer, new_drugs = with_new_drugs(without_peft(loaded), tokenizer, drug_table, drugs)
    tokenizer = with_settings(tokenizer, max_length, overflow)
    options = EncodeOptions(tokenizer, drugs, seed, unknown_drugs, draws)
    genes = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
    cells = open_cells(adata, tokenizer, genes)
    encoder = CellEncoder(
        used,
        tokenizer,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        hidden_layer=hidden_layer,
        sole_user=isinstance(model, (str, Path)),
    )
    match = cells.genes
    if kinds:
        cells.check_gene_slots()
    gene_means = encoder.gene_means(match) if "EA" in kinds and match is not None else None
    scorer = scorer_of(encoder, used, masks, seed)
    embeddings, numbers, num_empty = embed_input(encoder, ChunkEncoder(cells, options), gene_means, progress, scorer)
    if return_array:
        return (embeddings, numbers["deviation"]) if return_deviations else embeddings
    made_by = provenance(model_name(model, loaded), encoder, options, [cells], num_empty)
    made_by |= {} if new_drugs is None else new_drugs.provenance()
    made_by |= {"score_masks": masks} if masks else {}
    found = None
    if kinds and match is not None:
        found = embed_genes(encoder, match.token_ids, kinds, gene_means, progress)
    # All results are written together at the end, so that an interrupted run leaves adata unchanged.
    adata.obsm[key_added] = embeddings
    for name, column in number_columns(key_added, draws, masks).items():
        adata.obs[column] = numbers[name]
    if found is not None:
        for kind, values in found.kinds.items():
            adata.varm[gene_slot(key_added, kind)] = values
        made_by |= found.provenance(adata.var_names)
    adata.uns[provenance_key(key_added)] = made_by
    return None
