"""Provide real cells without a download: the raw counts of the 700 human PBMCs that come with scanpy."""

import csv
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import scanpy as sc
import scipy.sparse as sp
import typer
from anndata import AnnData

LABELS = "bulk_labels"
SYMBOLS_CSV = Path(__file__).with_name("pbmc68k_symbol_to_ensembl.csv")


def load_cells() -> AnnData:
    """Return scanpy's `pbmc68k_reduced` as raw counts (int32 CSR) of 700 cells x 765 genes, genes by symbol.

    The cells are some of 10x Genomics' 68k PBMCs (Zheng et al. 2017, doi:10.1038/ncomms14049). `X` of the file is
    scaled, but `raw` holds log1p(count / n_counts * 10,000), which can be undone exactly.
    """
    with warnings.catch_warnings():
        # The file is in an old AnnData format; the warning concerns scanpy, not the user.
        warnings.simplefilter("ignore", FutureWarning)
        reduced = sc.datasets.pbmc68k_reduced()
    fractions = np.expm1(reduced.raw.X.toarray().astype(np.float64)) / 1e4
    exact = fractions * reduced.obs["n_counts"].to_numpy(dtype=np.float64)[:, None]
    counts = np.rint(exact)
    # Rounding has moved the products by up to 0.08. A larger distance would mean that this is not the known file.
    if np.abs(exact - counts).max() > 0.25:
        raise ValueError("scanpy's pbmc68k_reduced() no longer holds log-normalised counts: they cannot be recovered.")
    cells = AnnData(sp.csr_matrix(counts.astype(np.int32)), obs=reduced.obs[[LABELS, "n_counts"]].copy())
    cells.var_names = reduced.raw.var_names.astype(str)
    cells.obs_names = reduced.obs_names.astype(str)
    return cells


def load_gene_symbols() -> dict[str, str]:
    """Return gene symbol -> Ensembl id for 744 of the cells' 765 genes; the others have no current id."""
    with SYMBOLS_CSV.open(newline="", encoding="utf-8") as file:
        return {row["symbol"]: row["ensembl_id"] for row in csv.DictReader(file)}


def main(path: Annotated[Path, typer.Argument(metavar="FILE.h5ad")]) -> None:
    """Write the cells to an .h5ad file, for commands and recipes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    load_cells().write_h5ad(path)


if __name__ == "__main__":
    typer.run(main)
