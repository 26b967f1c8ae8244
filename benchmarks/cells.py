"""Provide cells to measure with (real ones if they lie beside the project, else synthetic) and a vocabulary."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix

from tahoex1_hf import TahoeX1Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HEART = SHARED / "h5ad" / "heart_san_1000_native_ensembl.h5ad"
VOCABULARY_SIZE = 62720  # as in the released models


def real_or_synthetic_cells(num_cells: int) -> tuple[csr_matrix, np.ndarray, str]:
    """Return counts, Ensembl ids, and the origin of the cells."""
    if HEART.is_file():
        import anndata

        adata = anndata.read_h5ad(HEART)
        rows = np.arange(num_cells) % adata.n_obs
        return csr_matrix(adata.X[rows]), adata.var_names.to_numpy(), HEART.name
    rng = np.random.default_rng(0)
    num_genes, expressed = 30000, 2000
    columns = np.concatenate([np.sort(rng.choice(num_genes, expressed, replace=False)) for _ in range(num_cells)])
    values = rng.geometric(0.4, num_cells * expressed).astype(np.float32)
    counts = csr_matrix((values, columns, np.arange(num_cells + 1) * expressed), shape=(num_cells, num_genes))
    return counts, np.array([f"ENSG{i:011d}" for i in range(num_genes)]), "synthetic counts"


def tokenizer_for(gene_ids: np.ndarray, context_length: int) -> TahoeX1Tokenizer:
    """Make a tokenizer with the released models' number of tokens that knows these genes."""
    tokens = ["<pad>", "<cls>", "<eoc>", *gene_ids]
    tokens += [f"<junk{i}>" for i in range(VOCABULARY_SIZE - len(tokens))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        return TahoeX1Tokenizer(str(path), context_length=context_length)


def synthetic_counts(genes_per_cell: np.ndarray, num_columns: int, seed: int = 0) -> csr_matrix:
    """Return cells with given numbers of expressed genes, and whole counts as float32 (as .h5ad files have them)."""
    rng = np.random.default_rng(seed)
    columns = [np.sort(rng.choice(num_columns, genes, replace=False)) for genes in genes_per_cell]
    offsets = np.concatenate([[0], np.cumsum(genes_per_cell)])
    values = rng.geometric(0.4, offsets[-1]).astype(np.float32)
    indices = np.concatenate(columns).astype(np.int32)
    return csr_matrix((values, indices, offsets.astype(np.int32)), shape=(len(genes_per_cell), num_columns))


def ensembl_ids(number: int) -> np.ndarray:
    """Return gene names that look like Ensembl ids."""
    return np.array([f"ENSG{i:011d}" for i in range(number)])


def cells_in_torch(counts: csr_matrix, token_ids: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the cells as the reference takes them: token ids and counts of each."""
    genes = torch.from_numpy(token_ids[counts.indices])
    values = torch.from_numpy(counts.data.astype(np.float32))
    sizes = np.diff(counts.indptr).tolist()
    return list(zip(genes.split(sizes), values.split(sizes), strict=True))
