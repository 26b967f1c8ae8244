# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Read cell lines as CCLE and DepMap publish them: counts, facts about the lines, and dependencies on genes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.benchmarking.cells import EvaluationFile, checked_cells
from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.cells.gene_names import plain_id
from tahoex1_hf.common.reading import reading
from tahoex1_hf.data.vocabulary import read_table

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

MODEL, LINE, TISSUE = "ModelID", "CCLEName", "OncotreeLineage"
_ROWS = 2000  # genes of the matrix of counts that are read at once
_SYMBOL = re.compile(r"(\S+) \(\S+\)")
_GENE_SYMBOL = "gene_symbol"


def read_lines(counts: Path, facts: Path) -> EvaluationFile:
    """Read the counts of cell lines that DepMap's table of models knows.

    Args:
        counts: CCLE's `.gct` or `.gct.gz`: a table with the columns `Name` (Ensembl ids), `Description` (symbols), and
            one for each line, perhaps below two rows with a version and the size.
        facts: DepMap's `Model.csv` with the columns `ModelID`, `CCLEName` and `OncotreeLineage`.

    Returns:
        A set with a row for each line that is in both files, and the columns of the table of models in `obs`.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file has another layout, or no line is in both.
    """
    for path, option in ((counts, "--cells"), (facts, "--lines")):
        if not path.is_file():
            raise FileNotFoundError(f"{option} {path} does not exist.")
    table = read_table(facts)
    if missing := [name for name in (MODEL, LINE, TISSUE) if name not in table]:
        raise ValueError(f"--lines {facts} lacks the columns {', '.join(missing)}, which DepMap's Model.csv has.")
    table = table[table[LINE].notna()].drop_duplicates(LINE).set_index(LINE)
    with reading(counts):
        adata = _read_gct(counts)
    known = adata.obs_names.isin(table.index)
    if not known.any():
        raise ValueError(
            f"--lines {facts}: its column {LINE} has none of the lines of {counts} ({adata.obs_names[0]})."
        )
    adata = adata[known].copy()
    adata.obs = table.loc[adata.obs_names]
    return checked_cells(counts, adata)


def _read_gct(path: Path) -> "AnnData":
    """Read lines x genes from a `.gct` file, some genes at a time, so that no dense matrix is made."""
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix, vstack

    head = pd.read_csv(path, sep="\t", nrows=1, header=None, dtype=str).iloc[0, 0]
    skipped = 2 if str(head).startswith("#1.") else 0
    parts, names, symbols = [], [], []
    for part in pd.read_csv(path, sep="\t", skiprows=skipped, chunksize=_ROWS):
        if list(part.columns[:2]) != ["Name", "Description"]:
            raise ValueError(f"{path}: the first columns must be Name and Description, as in CCLE's .gct files.")
        names += [plain_id(name) or name for name in part["Name"].astype(str)]
        symbols += part["Description"].astype(str).tolist()
        parts.append(csr_matrix(part.iloc[:, 2:].to_numpy(dtype=np.float32)))
        lines = part.columns[2:].astype(str)
    if not parts:
        raise ValueError(f"{path} has no genes.")
    # The two copies of a gene on X and Y are one gene.
    kept, first, place = np.unique(names, return_index=True, return_inverse=True)
    adds = csr_matrix((np.ones(len(names), dtype=np.float32), (np.arange(len(names)), place)))
    adata = AnnData((vstack(parts).T @ adds).tocsr())
    adata.obs_names, adata.var_names = lines, kept
    adata.var[_GENE_SYMBOL] = np.array(symbols, dtype=object)[first]
    return adata


@dataclass(frozen=True, eq=False)
class Dependencies:
    """Probabilities that cell lines depend on genes.

    Attributes:
        path: Path of the table.
        values: Probabilities, NaN where unknown, shape `(lines, genes)`.
        genes: Ensembl ids of the genes, shape `(genes,)`.
        means: Share of all lines of the table that depend on a gene by more than 0.5, shape `(genes,)`.
        left_out: Reason -> number of genes that are left out.
    """

    path: Path
    values: np.ndarray
    genes: np.ndarray
    means: np.ndarray
    left_out: dict[str, int]

    @property
    def names(self) -> np.ndarray:
        """Ensembl ids of the genes."""
        return self.genes

    def some(self, kept: np.ndarray, reason: str) -> "Dependencies":
        """Return the genes for which `kept`, shape `(genes,)`, is true; the others are counted under a reason.

        Raises:
            ValueError: If no gene is left.
        """
        left_out = self.left_out | {reason: int((~kept).sum())}
        if not kept.any():
            raise ValueError(f"--dependencies {self.path}: no gene is left ({left_out}).")
        return Dependencies(self.path, self.values[:, kept], self.genes[kept], self.means[kept], left_out)

    def fingerprint(self) -> str:
        """Return a text that changes with the content of the file."""
        return content_fingerprint(self.path)


_FEWEST_KNOWN = 0.9  # share of the lines in which a gene's dependency is known, as in the original


def read_dependencies(path: Path, lines: EvaluationFile) -> tuple[Dependencies, EvaluationFile]:
    """Read dependencies of cell lines on genes.

    Args:
        path: DepMap's `CRISPRGeneDependency.csv`: ids of models in the first column, then a column for each gene with
            a name as `SYMBOL (number)`. Symbols that stand for several genes of the counts are left out.
        lines: Cell lines with counts.

    Returns:
        Dependencies of the lines that are in both, in the order of the second: these lines with their counts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another layout, or shares no line or gene with the counts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--dependencies {path} does not exist.")
    table = read_table(path)
    table = table.set_index(table.columns[0])
    table.index = table.index.astype(str)
    named = [_SYMBOL.fullmatch(str(name)) for name in table.columns]
    symbols = [name and name[1] for name in named]
    if not any(symbols) or table.index.has_duplicates:
        raise ValueError(
            f"--dependencies {path} must have ids of models, each once, in the first column, and genes "
            "as SYMBOL (number)."
        )
    models = lines.adata.obs[MODEL].astype(str)
    known = models.isin(table.index).to_numpy()
    if not known.any():
        raise ValueError(f"--dependencies {path}: its first column has none of the lines ({models.iloc[0]}).")
    ids = _ids_of(lines.adata)
    columns = [number for number, symbol in enumerate(symbols) if symbol in ids]
    values = table.iloc[:, columns].to_numpy(dtype=np.float32)
    genes = np.array([ids[symbols[number]] for number in columns], dtype=str)
    means = (values > 0.5).mean(axis=0)  # an unknown dependency counts as none, as in the original
    rows = table.index.get_indexer(models[known])
    found = Dependencies(path, values[rows], genes, means, {"without counts": len(symbols) - len(columns)})
    found = found.some(np.isfinite(values).mean(axis=0) > _FEWEST_KNOWN, "of unknown dependency in 10 % of the lines")
    return found, EvaluationFile(lines.path, lines.adata[known].copy())


def _ids_of(adata: "AnnData") -> dict[Any, str]:
    """Return symbol -> Ensembl id of the symbols that stand for one gene only."""
    symbols: pd.Series = adata.var[_GENE_SYMBOL]
    once = symbols[~symbols.duplicated(keep=False)]
    return dict(zip(once, once.index.astype(str), strict=True))
