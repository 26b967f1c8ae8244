"""Estimate how well a hidden gene's bin can be predicted, by its mean over all cells and over cells of a kind.

    python -m benchmarks.expression_ceiling CELLS.h5ad COLUMN --model FOLDER

The kind, a column of obs, stands for everything that a model could find out about a cell. Bins are taken over all
genes of a cell and mapped to -1 ... 1 as `scale_targets` does; errors are measured on a tenth of the cells, which no
mean includes.
"""

from pathlib import Path
from typing import Annotated

import anndata
import numpy as np
import typer

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.encoding_tahoe_x1 import bin_expression, matrix_rows

NUM_BINS, DRAWN_TO_MEAN = 51, 10  # a gene's mean over a kind includes its overall mean as if it were 10 more cells


def mean_where(keys: np.ndarray, values: np.ndarray, size: int, prior: float) -> np.ndarray:
    """Return the mean of each key's values and of `prior` further zeros, `(size,)`."""
    return np.bincount(keys, values, size) / (np.bincount(keys, minlength=size) + prior)


def main(
    cells: Annotated[Path, typer.Argument(help="Raw counts, by Ensembl id.")],
    column: Annotated[str, typer.Argument(help="Column of obs with the annotation.")],
    model: Annotated[Path, typer.Option(help="Folder with the tokenizer.")],
) -> None:
    """Print the mean squared error of three predictions."""
    adata = anndata.read_h5ad(cells)
    matrix, match = TahoeX1Tokenizer.from_pretrained(model).read_anndata(adata)
    rows, _ = matrix_rows(matrix[:], match)
    lengths = np.diff(rows.offsets)
    bins = bin_expression(np.asarray(rows.counts, dtype=np.float32), rows.offsets, NUM_BINS)
    values = (bins.astype(np.float64) - 1) / (NUM_BINS - 2) * 2 - 1
    cell = np.repeat(np.arange(len(lengths)), lengths)
    genes, gene = np.unique(rows.tokens, return_inverse=True)
    kinds, kind = np.unique(adata.obs[column].astype(str), return_inverse=True)
    held_out = np.isin(cell, np.random.default_rng(0).choice(len(lengths), len(lengths) // 10, replace=False))
    seen, left = ~held_out, values - values[~held_out].mean()
    print(f"the mean bin: {(left[held_out] ** 2).mean():.4f}")
    left = left - mean_where(gene[seen], left[seen], len(genes), 2)[gene]
    print(f"each gene's mean: {(left[held_out] ** 2).mean():.4f}")
    both = kind[cell] * len(genes) + gene
    left = left - mean_where(both[seen], left[seen], len(kinds) * len(genes), DRAWN_TO_MEAN)[both]
    print(f"each gene's mean in cells of the same {column}: {(left[held_out] ** 2).mean():.4f}")


if __name__ == "__main__":
    typer.run(main)
