# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The cells of a benchmark, with their counts as one sparse matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.cells.gene_names import plain_id
from tahoex1_hf.cells.whole import read_all_genes
from tahoex1_hf.common.own_thread import in_own_thread
from tahoex1_hf.finetuning.cells.baselines import MOST_CELLS, log_normalized, sparse_pca

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

VARIABLE_GENES = 2000


@dataclass(frozen=True, eq=False)
class EvaluationFile:
    """A file whose cells are evaluated, read whole; baselines know no vocabulary.

    Attributes:
        path: Path of the file.
        adata: Its content; `X` holds raw counts.
    """

    path: Path
    adata: "AnnData"

    @property
    def name(self) -> str:
        """Name of the file without its ending."""
        return self.path.stem

    @cached_property
    def genes(self) -> np.ndarray:
        """Ensembl ids of the columns, without versions; other names as they are, shape `(genes,)`."""
        return np.array([plain_id(name) or name for name in self.adata.var_names.astype(str)])

    @cached_property
    def values(self) -> "csr_matrix":
        """Log-normalised counts, shape `(cells, genes)`."""
        return log_normalized(self.adata.X)

    def fingerprint(self) -> str:
        """Return a text that changes with the content of the file."""
        return content_fingerprint(self.path)

    def labels(self, column: str, option: str) -> tuple[np.ndarray, list[str]]:
        """Return class numbers, shape `(cells,)`, and the names of the classes.

        Raises:
            ValueError: If there is no such column, or it has missing values or one value only.
        """
        obs = self.adata.obs
        if column not in obs:
            raise ValueError(f"{option} {column} is not a column of obs of {self.path}; there are {', '.join(obs)}.")
        if obs[column].isna().any():
            raise ValueError(f"{option} {column} of {self.path} has missing values: remove these cells.")
        names, numbers = np.unique(obs[column].astype(str).to_numpy(dtype=str), return_inverse=True)
        if len(names) < 2:
            raise ValueError(f"{option} {column} of {self.path} has the value {names[0]} only.")
        return numbers, names.tolist()


def read_cells(path: Path) -> EvaluationFile:
    """Read the cells of an `.h5ad` file; their counts stay sparse.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If `X` does not hold raw counts, or two columns are the same gene.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--cells {path} does not exist.")
    return checked_cells(path, read_all_genes(path))


def checked_cells(path: Path, adata: "AnnData") -> EvaluationFile:
    """Return cells, whose counts become sparse.

    Raises:
        ValueError: If `X` does not hold raw counts, or two columns are the same gene.
    """
    from scipy.sparse import csr_matrix

    adata.X = csr_matrix(adata.X, dtype=np.float32)
    data = adata.X.data
    if not (np.isfinite(data).all() and (data >= 0).all() and (data == np.rint(data)).all()):
        raise ValueError(f"{path}: X does not hold raw counts, from which the baselines are made: put them there.")
    found = EvaluationFile(path, adata)
    if len(np.unique(found.genes)) != len(found.genes):
        raise ValueError(f"{path}: two columns are the same gene: add their counts up.")
    return found


def variable_genes(values: "csr_matrix") -> np.ndarray:
    """Return the columns of the 2,000 most variable genes of log-normalised counts, by scanpy's default measure."""
    import scanpy
    from anndata import AnnData

    expressed = np.flatnonzero(values.getnnz(axis=0))
    if len(expressed) <= VARIABLE_GENES:
        return expressed
    adata, options = AnnData(values[:, expressed]), {"n_top_genes": VARIABLE_GENES, "inplace": False}
    found = in_own_thread(scanpy.pp.highly_variable_genes, adata, **options)
    return expressed[found["highly_variable"].to_numpy()]


def fitted_pca(values: "csr_matrix", seed: int) -> Any:
    """Fit PCA with at most 50 components to sparse values; raise ValueError if there are too few of them."""
    pca = sparse_pca(values, seed)
    if pca is None:
        raise ValueError(f"PCA of {values.shape[0]} cells x {values.shape[1]} genes: too few.")
    return pca.fit(values)


def aligned_values(cells: EvaluationFile, genes: np.ndarray) -> "csr_matrix":
    """Return log-normalised counts for some genes, in this order; zeros for genes that the cells do not have."""
    from scipy.sparse import csr_matrix

    place = {name: number for number, name in enumerate(genes.tolist())}
    columns = np.array([place.get(name, -1) for name in cells.genes.tolist()], dtype=np.int64)
    kept = cells.values[:, np.flatnonzero(columns >= 0)].tocoo()
    to = columns[columns >= 0][kept.col]
    return csr_matrix((kept.data, (kept.row, to)), shape=(cells.adata.n_obs, len(genes)))


def stacked(sets: Sequence[EvaluationFile], genes: np.ndarray, seed: int) -> "csr_matrix":
    """Return the log-normalised counts of all cells for some genes, in this order; at most 50,000 random cells."""
    from scipy.sparse import vstack

    every = vstack([aligned_values(each, genes) for each in sets], format="csr")
    if every.shape[0] > MOST_CELLS:
        every = every[np.sort(np.random.default_rng(seed).choice(every.shape[0], MOST_CELLS, replace=False))]
    return every
