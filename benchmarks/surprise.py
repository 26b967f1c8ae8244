"""Measure whether `--score` tells spoilt cells from real ones, beside simple measures.

    python -m benchmarks.surprise CELLS.h5ad... --model FOLDER

Real cells are spoilt in five ways: a share of a cell's counts change places among its genes; all genes bear the ids of
others, as where ids of another species are joined by row; and two cells are added up, with all their counts or with
half of them. The table has the area under the ROC curve (AUROC) of spoilt against real cells: 0.5 is chance. Each
measure has the sign that one would expect: a high score, low counts, few genes, an unlikely profile; for doublets,
high counts and many genes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import anndata
import numpy as np
import typer
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from tahoex1_hf import embed_anndata
from tahoex1_hf.hub.models import model_and_tokenizer


def spoilt(counts: np.ndarray, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of a way to spoil cells, and the spoilt counts, `(cells, genes)`."""
    for share in (0.2, 0.5):
        changed = counts.copy()
        for cell in changed:
            there = np.flatnonzero(cell)
            some = random.choice(there, int(share * len(there)), replace=False)
            cell[some] = cell[random.permutation(some)]
        yield f"{share:.0%} of a cell's counts swapped", changed
    yield "genes bear the ids of others", counts[:, random.permutation(counts.shape[1])]
    both = counts + counts[random.permutation(len(counts))]
    yield "doublets", both
    yield "doublets with half the counts", random.binomial(both.astype(np.int64), 0.5).astype(np.float32)


def simple_measures(counts: np.ndarray, profile: np.ndarray, doublets: bool) -> dict[str, np.ndarray]:
    """Return measures that know no model.

    Args:
        counts: `(cells, genes)` counts.
        profile: `(genes,)` mean share of each gene in the real cells.
        doublets: Whether a large cell is the suspect one.
    """
    total, sign = np.maximum(counts.sum(1), 1), 1 if doublets else -1
    return {
        "total counts": sign * total,
        "number of genes": sign * (counts > 0).sum(1),
        "likelihood under the mean profile": -(counts @ np.log(profile)) / total,
    }


def main(
    files: Annotated[list[Path], typer.Argument(help="Raw counts, by Ensembl id.")],
    model: Annotated[str, typer.Option(help="Folder of a model with its pretraining head.")],
    cells: Annotated[int, typer.Option(help="Most cells of a file, chosen at random.")] = 200,
    masks: Annotated[int, typer.Option(help="Number of masks.")] = 4,
) -> None:
    """Print a table."""
    loaded, tokenizer = model_and_tokenizer(model, expression=True)

    def scores(counts: np.ndarray, names: np.ndarray) -> np.ndarray:
        adata = anndata.AnnData(csr_matrix(counts))
        adata.var_names = names
        embed_anndata(adata, loaded, tokenizer, score=masks, dtype="float32", progress=False)
        return np.nan_to_num(adata.obs["tahoe_x1_score"].to_numpy())

    for file in files:
        random = np.random.default_rng(0)
        adata = anndata.read_h5ad(file)
        adata = adata[:, tokenizer.match_genes(adata.var_names).token_ids >= 0]
        adata = adata[np.sort(random.permutation(adata.n_obs)[:cells])].to_memory()
        counts = csr_matrix(adata.X).toarray().astype(np.float32)
        counts = counts[counts.sum(1) > 20]
        profile = (counts / counts.sum(1, keepdims=True)).mean(0) + 1e-6
        real = scores(counts, adata.var_names)
        print(f"\n{file.stem}, {len(counts)} cells, median of {np.median((counts > 0).sum(1)):.0f} known genes")
        for name, changed in spoilt(counts, random):
            labels = np.repeat([0, 1], len(counts))
            found = {"score": roc_auc_score(labels, np.concatenate([real, scores(changed, adata.var_names)]))}
            before, after = (simple_measures(each, profile, "doublets" in name) for each in (counts, changed))
            for measure in before:
                found[measure] = roc_auc_score(labels, np.concatenate([before[measure], after[measure]]))
            print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in found.values()) + " |")
        total = {
            name: np.corrcoef(real, value)[0, 1] for name, value in simple_measures(counts, profile, True).items()
        }
        print(f"score: median {np.median(real):.2f}; correlations {total}")


if __name__ == "__main__":
    typer.run(main)
