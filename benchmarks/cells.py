"""Cells to measure with: real ones where they lie beside the project, else synthetic counts, and a vocabulary."""

import json
import tempfile
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from tahoex1_hf import TahoeX1Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HEART = SHARED / "h5ad" / "heart_san_1000_native_ensembl.h5ad"
VOCABULARY_SIZE = 62720  # of the released models


def real_or_synthetic_cells(num_cells: int) -> tuple[csr_matrix, np.ndarray, str]:
    """Return counts, Ensembl ids, and where they come from."""
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
