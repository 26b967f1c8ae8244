"""Embedding the cells of an AnnData."""

import copy
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from tqdm.auto import tqdm

from tahoex1_hf.encoder import CellEncoder, DtypeName, GeneMeans
from tahoex1_hf.encoding_tahoe_x1 import EncodedCells
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

# Cells tokenized at a time: enough for batches of similar length, few enough for memory (12 MB at 1,000 genes a cell).
CHUNK_CELLS = 1024
# From so many cells on, compiling the encoding (about 10 s, once per installation) costs less than it saves.
COMPILE_FROM_CELLS = 20_000


class EmbeddingRun:
    """One pass over the cells of an AnnData, in memory or on disk, yielding their embeddings chunk by chunk.

    Takes the arguments of `embed_anndata`.
    """

    def __init__(
        self,
        adata: "AnnData",
        model: TahoeX1PreTrainedModel,
        tokenizer: TahoeX1Tokenizer,
        *,
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
    ):
        if max_length is not None:
            if max_length < 3:
                raise ValueError(f"max_length must leave room for a gene behind <cls> and <drug>, got {max_length}.")
            tokenizer = copy.copy(tokenizer)
            tokenizer.context_length = max_length
        self.adata, self.tokenizer, self.seed, self.progress = adata, tokenizer, seed, progress
        self.matrix, self.genes = tokenizer.read_anndata(adata, gene_id_column, layer, gene_symbols)
        if getattr(self.matrix, "format", None) == "csc":
            logger.warning("The counts are stored by gene (CSC): all of them are read into memory to be read by cell.")
            on_disk = hasattr(self.matrix, "to_memory")
            self.matrix = (self.matrix.to_memory() if on_disk else self.matrix).tocsr()
        self.drugs = tokenizer.resolve_drugs(adata, drugs)
        if self.drugs is not None and not isinstance(self.drugs, str) and len(self.drugs) != adata.n_obs:
            raise ValueError(f"drugs has {len(self.drugs)} entries for {adata.n_obs} cells: pass one per cell.")
        self.encoder = CellEncoder(model, tokenizer, batch_tokens=batch_tokens, device=device, dtype=dtype)
        self.num_empty = 0
        self._model_name = model.name_or_path or ""
        self._gene_means = None
        if gene_embeddings:
            self._gene_means = GeneMeans(
                self.genes.token_ids, model.config.vocab_size, self.encoder.width, self.encoder.device
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and width of the embeddings."""
        return self.adata.n_obs, self.encoder.width

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of a chunk's first cell and its `(cells, width)` float32 embeddings, in order."""
        starts = range(0, self.adata.n_obs, CHUNK_CELLS)
        with (
            tqdm(total=self.adata.n_obs, unit="cell", desc="Embedding", disable=not self.progress) as bar,
            ThreadPoolExecutor(1, thread_name_prefix="encode-cells") as pool,
        ):
            # The next chunk is read and encoded while the model works on this one.
            coming = [pool.submit(self._encode, start) for start in starts[:1]]
            for start in starts:
                cells = coming.pop().result()
                if start + CHUNK_CELLS < self.adata.n_obs:
                    coming.append(pool.submit(self._encode, start + CHUNK_CELLS))
                self.num_empty += len(cells.empty_cells)
                yield start, self.encoder.embed(cells, self._gene_means, on_batch=bar.update)

    def _encode(self, start: int) -> EncodedCells:
        stop = min(start + CHUNK_CELLS, self.adata.n_obs)
        encode = self.tokenizer.encode_counts
        if self.adata.n_obs >= COMPILE_FROM_CELLS:
            from tahoex1_hf.fast_encoding import encode_chunk

            encode = functools.partial(encode_chunk, self.tokenizer)
        return encode(
            self.matrix[start:stop],
            self.genes,
            drugs=self.drugs if self.drugs is None or isinstance(self.drugs, str) else self.drugs[start:stop],
            first_cell=start,
            seed=self.seed,
            source=self.adata,
        )

    def gene_embeddings(self) -> np.ndarray:
        """Return `(n_vars, width)` mean gene embeddings of the cells seen; NaN where a gene has none."""
        if self._gene_means is None:
            raise ValueError("gene_embeddings was False: no gene embeddings were collected.")
        return self._gene_means.means(self.genes.token_ids)

    def provenance(self) -> dict[str, Any]:
        """Say what made the embeddings, in types that an h5ad file holds."""
        from tahoex1_hf import __version__

        tokenizer = self.tokenizer
        return {
            "model": self._model_name,
            "revision": model_revision(self._model_name),
            "package_version": __version__,
            "matched_genes": self.genes.num_matched,
            "unknown_genes": self.genes.num_unknown,
            "duplicate_genes": self.genes.num_duplicates,
            "cells_without_known_genes": self.num_empty,
            "value_encoding": tokenizer.value_encoding,
            "max_length": tokenizer.context_length or 0,
            "overflow": tokenizer.overflow,
            "seed": self.seed,
            "dtype": str(self.encoder.dtype).removeprefix("torch."),
            "device": self.encoder.device.type,
            "attention": str(self.encoder.config._attn_implementation),
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
    in `adata` changes.

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
        dtype: precision of the matrix products; `"auto"` is bfloat16 where the hardware multiplies it faster.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for counts, genes or arguments that cannot be used; the message says what to do.
    """
    run = EmbeddingRun(
        adata,
        model,
        tokenizer,
        layer=layer,
        gene_id_column=gene_id_column,
        gene_symbols=gene_symbols,
        drugs=drugs,
        gene_embeddings=gene_embeddings,
        max_length=max_length,
        seed=seed,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    embeddings = np.empty(run.shape, dtype=np.float32)
    for start, chunk in run.chunks():
        embeddings[start : start + len(chunk)] = chunk
    # Written last, together: an interrupted run leaves adata as it was.
    adata.obsm[key_added] = embeddings
    if gene_embeddings:
        adata.varm[key_added] = run.gene_embeddings()
    adata.uns[provenance_key(key_added)] = run.provenance()


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


__all__ = ["EmbeddingRun", "embed_anndata", "model_revision", "provenance_key"]
