"""Embed real cells with a Tahoe-x1 model, draw them, and compare the embeddings with PCA and an untrained model.

It needs no network: the cells come with scanpy, and the default model is the small one beside this file.
"""

import json
import math
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import scanpy as sc
import torch
import typer
from anndata import AnnData
from demo_cells import LABELS, load_cells, load_gene_symbols
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.utils import logging

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer, embed_anndata
from tahoex1_hf.common.plots import class_marks, import_umap
from tahoex1_hf.hub.loading import load_model_and_tokenizer
from tahoex1_hf.inference.encoder import DtypeName

CHECKPOINT = Path(__file__).resolve().with_name("demo_checkpoint")
KEY = "X_tahoe_x1"
COMPONENTS = 50
FOLDS = 5
NEIGHBOURS = 15
# The scores of one method in each fold, by classifier and metric.
Scores = dict[tuple[str, str], np.ndarray]


def untrained_embeddings(
    model: TahoeX1Model, tokenizer: TahoeX1Tokenizer, cells: AnnData, dtype: DtypeName
) -> np.ndarray:
    """Return the cells' embeddings from a model of the same shape with random weights."""
    torch.manual_seed(0)
    twin = type(model)(model.config)
    copy = AnnData(cells.X, obs=cells.obs[[]], var=cells.var[[]])
    embed_anndata(copy, twin, tokenizer, key_added=KEY, gene_symbols=load_gene_symbols(), dtype=dtype)
    return copy.obsm[KEY]


def log_normalised(cells: AnnData, tokenizer: TahoeX1Tokenizer) -> np.ndarray:
    """Return the input of PCA: log1p of counts per 10,000 over the genes that the model knows."""
    _, genes = tokenizer.read_anndata(cells, gene_symbols=load_gene_symbols())
    counts = cells.X[:, genes.token_ids >= 0].toarray().astype(np.float64)
    return np.log1p(counts / counts.sum(axis=1, keepdims=True).clip(min=1) * 1e4)


def cross_validated(features: np.ndarray, labels: np.ndarray, reduce: bool) -> Scores:
    """Classify the cells by their features, in the same folds every time.

    Args:
        features: Features, shape `(cells, features)`.
        labels: Labels, shape `(cells,)`.
        reduce: Whether to apply PCA first, fitted in each fold on its training cells alone.
    """
    classifiers = {
        "kNN": [KNeighborsClassifier(NEIGHBOURS)],
        "LogReg": [StandardScaler(), LogisticRegression(max_iter=2000)],
    }
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    scores: Scores = {}
    for name, steps in classifiers.items():
        pca = [PCA(COMPONENTS, random_state=0)] if reduce else []
        results = cross_validate(
            make_pipeline(*pca, *steps), features, labels, cv=folds, scoring=("accuracy", "f1_macro")
        )
        for metric, title in (("accuracy", "accuracy"), ("f1_macro", "macro-F1")):
            scores[name, title] = results[f"test_{metric}"]
    return scores


def format_table(scores: dict[str, Scores]) -> str:
    """Return the scores as a table with one row per method."""
    columns = list(next(iter(scores.values())))
    width = max(map(len, scores))
    headings = [f"{classifier} {metric}" for classifier, metric in columns]
    lines = ["  ".join([" " * width, *headings])]
    for method, row in scores.items():
        entries = (f"{row[column].mean():.3f} ± {row[column].std():.3f}" for column in columns)
        padded = (entry.rjust(len(heading)) for entry, heading in zip(entries, headings, strict=True))
        lines.append("  ".join([method.ljust(width), *padded]))
    return "\n".join(lines)


def comparison(ours: Scores, other: Scores, name: str) -> str:
    """Say where the model is ahead of another method and where it is behind.

    The folds are the same, so the scores are compared fold by fold. A mean difference within two standard errors
    counts as none; with five folds that is a rough measure.
    """
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "level": []}
    for (classifier, metric), scores in ours.items():
        differences = scores - other[classifier, metric]
        mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(FOLDS)
        side = "level" if abs(mean) <= 2 * error else "ahead" if mean > 0 else "behind"
        groups[side].append(f"{classifier} {metric} ({mean:+.3f})")
    texts = {"ahead": "is ahead in", "behind": "is behind in", "level": "differs by no more than chance may do in"}
    parts = [f"{texts[side]} {', '.join(columns)}" for side, columns in groups.items() if columns]
    return f"Against {name}, the model {'; '.join(parts)}."


def caveats(shipped: bool, num_cells: int) -> str:
    """Say which conclusions the numbers do not allow."""
    if shipped:
        log = json.loads((CHECKPOINT / "training_log.json").read_text(encoding="utf-8"))
        seen = (
            f"This checkpoint was trained on {log['training_cells']} of these same {num_cells} cells (without their "
            "labels), on a laptop's scale, so that the demo runs offline. It is not the released Tahoe-x1, and these "
            "results say nothing about cells that it has not seen."
        )
    else:
        seen = "These cells are public: the model may have seen them in training."
    return (
        f"{seen} The file has only 765 variable genes, about 20 % of each cell's molecules; and the labels were given "
        "by similarity to sorted populations, some of which (T cells) overlap."
    )


def add_umaps(cells: AnnData, features: np.ndarray) -> None:
    """Write PCA and both UMAPs into `cells.obsm`: X_pca, X_umap_tahoe_x1, X_umap_pca."""
    import_umap()  # so that what UMAP compiles is kept for the next run
    cells.obsm["X_pca"] = PCA(COMPONENTS, random_state=0).fit_transform(features).astype(np.float32)
    for key, target in ((KEY, "X_umap_tahoe_x1"), ("X_pca", "X_umap_pca")):
        graph = AnnData(cells.obsm[key])  # a temporary AnnData, since the neighbour graphs are not kept
        sc.pp.neighbors(graph, use_rep="X", n_neighbors=NEIGHBOURS, random_state=0)
        sc.tl.umap(graph, random_state=0)
        cells.obsm[target] = graph.obsm["X_umap"]


def draw_umaps(cells: AnnData, path: Path, title: str, num_genes: int) -> None:
    """Draw both UMAPs side by side, coloured by cell type."""
    labels = cells.obs[LABELS].astype(str).to_numpy()
    types = cells.obs[LABELS].value_counts()  # the largest first, so that it does not hide the others
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, heading in (
        (panels[0], "X_umap_tahoe_x1", "UMAP of the model's cell embeddings"),
        (panels[1], "X_umap_pca", f"UMAP of the PCA baseline ({COMPONENTS} components)"),
    ):
        points = cells.obsm[key]
        for (name, count), (color, marker) in zip(types.items(), class_marks(len(types)), strict=True):
            chosen = points[labels == name].T
            axes.scatter(*chosen, s=14, color=color, marker=marker, label=f"{name} ({count})", linewidths=0)
        axes.set(title=heading, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}\n{cells.n_obs} human PBMCs, {num_genes} genes, coloured by published cell type")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=2, title="cell type (cells)")
    figure.savefig(path, dpi=160)


def main(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub repository; by default the small model here.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size to take from a model that holds several: 70m, 1b or 3b.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for the embeddings and the picture.")] = Path("demo_output"),
) -> None:
    """Embed 700 real PBMCs, draw them, and say how well cell types can be told apart."""
    started = time.perf_counter()
    shipped = model is None or Path(model).resolve() == CHECKPOINT
    if shipped:
        logging.set_verbosity_error()  # users would take the report about unused decoders for a fault
    try:
        loaded, tokenizer = load_model_and_tokenizer(CHECKPOINT if shipped else str(model), size=size)
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    cells = load_cells()
    name = "Tahoe-x1 demo checkpoint" if shipped else " ".join(filter(None, [str(model).rstrip("/"), size]))
    title = f"{name} ({loaded.num_parameters() / 1e6:.2f} M parameters)"
    print(f"{title}, on {cells.n_obs} human PBMCs (10x Genomics, by way of scanpy)", flush=True)
    dtype: DtypeName = "float32" if shipped else "auto"  # the small model gives the same numbers on all machines
    embed_anndata(cells, loaded, tokenizer, key_added=KEY, gene_symbols=load_gene_symbols(), dtype=dtype)
    embedded = time.perf_counter() - started
    num_genes = cells.uns["tahoe_x1"]["matched_genes"]
    print(f"{num_genes} of {cells.n_vars} genes matched the model's vocabulary; embedded after {embedded:.0f} s\n")

    features = log_normalised(cells, tokenizer)
    labels = cells.obs[LABELS].astype(str).to_numpy()
    scores = {
        "trained model": cross_validated(cells.obsm[KEY], labels, reduce=False),
        "same, untrained": cross_validated(
            untrained_embeddings(loaded, tokenizer, cells, dtype), labels, reduce=False
        ),
        f"PCA ({COMPONENTS})": cross_validated(features, labels, reduce=True),
    }
    kinds = len(set(labels))
    print(
        f"Telling {kinds} cell types apart by {NEIGHBOURS} nearest neighbours (kNN) or logistic regression (LogReg):\n"
        f"{FOLDS}-fold cross-validation, mean ± standard deviation over the folds\n"
    )
    print(format_table(scores) + "\n")
    trained, untrained, pca = scores.values()
    comparisons = [comparison(trained, untrained, "its untrained twin"), comparison(trained, pca, "PCA")]
    for paragraph in (*comparisons, caveats(shipped, cells.n_obs)):
        print(textwrap.fill(paragraph, 100))

    output_dir.mkdir(parents=True, exist_ok=True)
    add_umaps(cells, features)
    draw_umaps(cells, output_dir / "umap.png", title, num_genes)
    cells.write_h5ad(output_dir / "pbmc68k_tahoe_x1.h5ad")
    print(
        f"\nWrote {output_dir}/umap.png and {output_dir}/pbmc68k_tahoe_x1.h5ad; {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    typer.run(main)
