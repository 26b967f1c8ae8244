"""Embedding the cells of an AnnData."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from tqdm.auto import tqdm

from tahoex1_hf.cells.inputs import AnnDataInput, CellInput, Chunk, EncodeOptions
from tahoex1_hf.inference.encoder import CellEncoder, DtypeName, GeneMeans
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


def embed_chunks(
    encoder: CellEncoder,
    chunks: Iterator[Chunk],
    gene_means: GeneMeans | None = None,
    on_batch: Callable[[int], object] = lambda num_cells: None,
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Embed chunk after chunk; the next one is read and encoded in a thread while the model works on this one.

    Args:
        encoder: the model.
        chunks: from `CellInput.chunks`.
        gene_means: running means to which the cells' gene embeddings are added.
        on_batch: called after each batch with its number of cells.

    Yields:
        Every chunk, and its `(cells, width)` float32 embeddings, each row of length 1.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="encode-cells") as pool:
        coming = pool.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, chunks, None)
            yield chunk, encoder.embed(chunk.cells, gene_means, on_batch)


def with_context(tokenizer: TahoeX1Tokenizer, max_length: int | None) -> TahoeX1Tokenizer:
    """The tokenizer, or a copy with another context length.

    Raises:
        ValueError: for a length that leaves no room for a gene.
    """
    if max_length is None:
        return tokenizer
    if max_length < 3:
        raise ValueError(f"max_length must leave room for a gene behind <cls> and <drug>, got {max_length}.")
    tokenizer = copy.copy(tokenizer)
    tokenizer.context_length = max_length
    return tokenizer


def provenance(
    model_name: str, encoder: CellEncoder, options: EncodeOptions, inputs: Sequence[CellInput], num_empty: int
) -> dict[str, Any]:
    """Say what made embeddings, in types that an h5ad file holds."""
    from tahoex1_hf import __version__

    tokenizer = options.tokenizer
    genes = [each.genes for each in inputs if each.genes is not None]
    counts = {
        "matched_genes": [match.num_matched for match in genes],
        "unknown_genes": [match.num_unknown for match in genes],
        "duplicate_genes": [match.num_duplicates for match in genes],
    }
    return {
        "model": model_name,
        "revision": model_revision(model_name),
        "package_version": __version__,
        **{name: values[0] if len(inputs) == 1 else values for name, values in counts.items() if values},
        "cells_without_known_genes": num_empty,
        "value_encoding": tokenizer.value_encoding,
        "max_length": tokenizer.context_length or 0,
        "overflow": tokenizer.overflow,
        "seed": options.seed,
        "dtype": encoder.dtype_name,
        "device": encoder.device.type,
        "attention": str(encoder.config._attn_implementation),
        "normalized": "L2",
    }


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
    embeddings = np.empty((cells.num_cells, encoder.width), dtype=np.float32)
    num_empty = 0
    with tqdm(total=cells.num_cells, unit="cell", desc="Embedding", disable=not progress) as bar:
        for chunk, part in embed_chunks(encoder, cells.chunks(0, cells.num_cells), gene_means, bar.update):
            embeddings[chunk.start : chunk.start + len(part)] = part
            num_empty += len(chunk.cells.empty_cells)
    # Written last, together: an interrupted run leaves adata as it was.
    adata.obsm[key_added] = embeddings
    if gene_means is not None:
        adata.varm[key_added] = gene_means.means(cells.genes.token_ids)
    name = model.name_or_path or ""
    adata.uns[provenance_key(key_added)] = provenance(name, encoder, options, [cells], num_empty)


def provenance_key(key_added: str) -> str:
    """Return the slot of `uns` that goes with a slot of `obsm`."""
    return key_added.removeprefix("X_")


def model_revision(name_or_path: str) -> str:
    """Return the commit of a model in the Hugging Face cache, given its path there or its repo id; else ""."""
    path: Any = name_or_path
    if name_or_path.count("/") == 1 and not Path(name_or_path).exists():
        path = try_to_load_from_cache(name_or_path, "config.json")
    parts = Path(path).parts if isinstance(path, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""


__all__ = ["embed_anndata", "embed_chunks", "model_revision", "provenance", "provenance_key", "with_context"]
