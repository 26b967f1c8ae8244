# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The sections of the page, each made of what was computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tahoex1_hf.annotation.labels import UNKNOWN_NAME
from tahoex1_hf.annotation.report import TITLES
from tahoex1_hf.cells.looking import MUCH
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.reporting.figures import histogram_figure, places_figure
from tahoex1_hf.reporting.markers import FEWEST, Marker
from tahoex1_hf.reporting.page import Section, Table
from tahoex1_hf.runs.report import format_value

OTHER = "other labels"
_MOST_CLASSES = 40  # classes that a picture tells apart


@dataclass(frozen=True, eq=False)
class Shown:
    """The cells of the page.

    Attributes:
        file: Name of the file.
        cells: Its opened sample of cells.
        total: Number of cells of the file.
        num_genes: `(cells,)` known genes that each cell expresses.
        num_counts: `(cells,)` counts of these genes.
        room: Most genes of a cell that the model sees; None for no limit.
        names: Name of a gene in the file -> the name by which people know it, where that is another.
    """

    file: str
    cells: CellInput
    total: int
    num_genes: np.ndarray
    num_counts: np.ndarray
    room: int | None
    names: Mapping[str, str]

    @property
    def number(self) -> int:
        """Number of cells of the page."""
        return len(self.num_genes)


@dataclass(frozen=True, eq=False)
class Places:
    """Two maps of the same cells, and the clusters of each.

    Attributes:
        embedding: `(cells, 2)` UMAP of the embeddings.
        pca: `(cells, 2)` UMAP of the principal components.
        clusters: `(cells,)` clusters by the embeddings, the largest first.
        pca_clusters: `(cells,)` clusters by the principal components.
    """

    embedding: np.ndarray
    pca: np.ndarray
    clusters: np.ndarray
    pca_clusters: np.ndarray

    def panels(self) -> list[tuple[str, np.ndarray]]:
        """Return the maps with their headings."""
        return [("Tahoe-x1 embedding", self.embedding), ("PCA of the counts", self.pca)]


def input_section(shown: Shown) -> Section:
    """Say what went in, and what was lost."""
    section, seen, match = Section("What went in"), shown.cells.seen, shown.cells.genes
    rows = [
        ["File", shown.file],
        ["Cells in the file", f"{shown.total:,}"],
        ["Cells on this page", f"{shown.number:,}"],
    ]
    if match is not None:
        rows += [
            ["Genes (columns) in the file", f"{match.num_genes:,}"],
            ["Genes that the model knows", f"{match.num_matched:,}"],
            ["Genes left out", f"{match.num_unknown:,}"],
        ]
    if seen is not None:
        rows.append(["Counts lost with them", f"{seen.lost:.1%} (of {seen.cells:,} cells)"])
    found = shown.cells.found
    rows += [
        ["Genes were recognised by", "-" if found is None else found.source],
        ["Counts were read from", shown.cells.counts_from],
        ["Known genes of a cell (median)", f"{np.median(shown.num_genes):,.0f}"],
        ["Counts of a cell in known genes (median)", f"{np.median(shown.num_counts):,.0f}"],
        ["Cells without any known gene", f"{int((shown.num_genes == 0).sum()):,}"],
    ]
    if shown.number < shown.total:
        section.add(
            f"The page shows a random sample of {shown.number:,} of the file's {shown.total:,} cells. All numbers "
            "below are of the sample."
        )
    section.add(Table("The cells and their genes.", [], rows))
    if seen is not None and seen.doubt is not None:
        section.add(f"{seen.doubt} Everything below may then be wrong.", "warning")
    if seen is not None and seen.lost > MUCH:
        section.add(
            f"{seen.lost:.1%} of the counts are in genes that the model does not know, and were not seen.", "warning"
        )
    if seen is not None and seen.most:
        lost = [[shown.names.get(name, name), f"{share:.2%}"] for name, share in seen.most]
        section.add(Table("Genes left out that have most counts.", ["Gene", "Share of all counts"], lost, (1,)))
    return section


def map_section(places: Places, agreement: float, column: tuple[str, np.ndarray] | None) -> Section:
    """Show the cells by embedding and by PCA, coloured by cluster and by a column of obs."""
    section, number = Section("Maps of the cells"), int(places.clusters.max()) + 1
    section.add(
        "Both maps are UMAPs of the same cells and the same genes: on the left of the model's embeddings, on the "
        "right of 50 principal components of log-normalised counts, which need no model. A UMAP shows which cells "
        "are neighbours; distances between groups, their sizes and their shapes mean nothing."
    )
    section.add(
        places_figure(
            places.panels(),
            places.clusters,
            [str(each) for each in range(number)],
            f"Two UMAPs side by side of {len(places.clusters)} cells, by embedding and by PCA, marked by the {number} "
            "clusters of the embeddings.",
            "Marked by the clusters of the embeddings (Leiden, resolution 1, 15 neighbours).",
        )
    )
    section.add(
        f"The clusters by embedding and the clusters by PCA ({int(places.pca_clusters.max()) + 1}) agree with an "
        f"adjusted Rand index of {agreement:.2f}: 1 is the same partition, 0 is chance."
    )
    if column is not None:
        name, values = column
        section.add(_named_map(places, values, f"the column {name} of obs", f"Marked by the column {name}."))
    return section


def _named_map(places: Places, values: np.ndarray, what: str, caption: str) -> Any:
    names, numbers = np.unique(values.astype(str), return_inverse=True)
    if len(names) > _MOST_CLASSES:
        largest = np.sort(np.argsort(-np.bincount(numbers), kind="stable")[: _MOST_CLASSES - 1])
        kept = np.isin(numbers, largest)
        names, numbers = np.unique(np.where(kept, values.astype(str), OTHER), return_inverse=True)
    listed = ", ".join(names[:12]) + (" and others" if len(names) > 12 else "")
    alt = f"Two UMAPs side by side, by embedding and by PCA, marked by {what}: {listed}."
    return places_figure(places.panels(), numbers, names.tolist(), alt, caption)


def cluster_section(clusters: np.ndarray, markers: Sequence[Sequence[Marker]]) -> Section:
    """List the clusters of the embeddings with their marker genes."""
    section, sizes = Section("Clusters and their marker genes"), np.bincount(clusters)
    if len(sizes) < 2:
        section.add("All cells are in one cluster, so that there is nothing to compare it with.")
        return section
    section.add(
        "Genes that are higher in a cluster than in the other cells, by Wilcoxon's rank sum test on log-normalised "
        "counts, the strongest first. In brackets: log2 of the ratio of the means, and the share of cells that "
        "express the gene in the cluster and outside. No p values are given: the clusters were made of these very "
        "cells."
    )
    rows = []
    for number, size in enumerate(sizes.tolist()):
        shown = ", ".join(f"{m.gene} ({m.fold:.1f}; {m.inside:.0%}, {m.outside:.0%})" for m in markers[number])
        none = f"fewer than {FEWEST} cells" if size < FEWEST else "none"
        rows.append([str(number), f"{size:,}", f"{size / len(clusters):.1%}", shown or none])
    section.add(Table("Clusters of the embeddings.", ["Cluster", "Cells", "Share", "Marker genes"], rows, (1, 2)))
    return section


def annotation_section(
    places: Places,
    reference: str,
    label: str,
    labels: np.ndarray,
    nearest: np.ndarray,
    probability: np.ndarray,
    found: Any,
) -> Section:
    """Show the labels that a reference gives.

    Args:
        places: Maps of the cells.
        reference: Name of the reference's file.
        label: Column of its labels.
        labels: `(cells,)` labels, "unknown" among them.
        nearest: `(cells,)` labels without that verdict.
        probability: `(cells,)` probability of the nearest label.
        found: The `Annotation`.
    """
    section = Section("Annotation by a reference")
    section.add(
        f"Labels of the nearest cells of {reference} (column {label}) by embedding; nothing was trained. A cell "
        f"farther from the reference than {found.threshold:.3g} is unknown."
    )
    for note in found.notes:
        warns = note.startswith("**Warning**: ")
        section.add(note.removeprefix("**Warning**: "), "warning" if warns else "text")
    section.add(_named_map(places, labels, "the labels of the reference", "Marked by the label of the reference."))
    names, numbers = np.unique(labels.astype(str), return_inverse=True)
    sizes = np.bincount(numbers)
    means = np.bincount(numbers, weights=probability) / sizes
    order = np.argsort(-sizes, kind="stable")
    rows = [[names[n], f"{sizes[n]:,}", f"{sizes[n] / len(labels):.1%}", f"{means[n]:.2f}"] for n in order.tolist()]
    header = ["Label", "Cells", "Share", "Mean probability of the nearest label"]
    section.add(Table("Labels of the cells.", header, rows, (1, 2, 3)))
    if UNKNOWN_NAME in names:
        kinds, numbers = np.unique(nearest[labels == UNKNOWN_NAME].astype(str), return_inverse=True)
        counts = np.bincount(numbers)
        rows = [[kinds[n], f"{counts[n]:,}"] for n in np.argsort(-counts, kind="stable").tolist()]
        section.add(Table("Nearest labels of the unknown cells.", ["Label", "Cells"], rows, (1,)))
    scores = [
        score for score in found.report.scores if score.fold is None and score.metric in ("accuracy", "macro_f1")
    ]
    section.add(
        Table(
            "How well each method did: on cells left out of the reference, and on these cells where they have labels "
            "(query). Intervals are over cells.",
            ["Method", "Scored on", "Metric", "Value"],
            [[s.method, s.split, TITLES[s.metric], format_value(s.value, s.lower, s.upper)] for s in scores],
        )
    )
    return section


def noise_section(shown: Shown, deviations: np.ndarray | None, draws: int) -> Section:
    """Say how far the embeddings vary with the sample of genes."""
    section = Section("Sampling noise")
    long = np.zeros(shown.number, dtype=bool) if shown.room is None else shown.num_genes > shown.room
    if not long.any():
        section.add(
            "Every cell fits into the model's context, so that no embedding depends on a random sample of genes."
        )
        return section
    section.add(
        f"{long.mean():.1%} of the cells express more genes than the {shown.room:,} that the model sees. Of these "
        "it sees a random sample, which follows from the cell and the seed."
    )
    if deviations is None:
        section.add("How much that changes their embeddings was not measured: make the page with --draws 2 or more.")
        return section
    values = deviations[long]
    middle = float(np.median(values))
    section.add(
        histogram_figure(
            values,
            "distance of one sample's embedding from the mean",
            f"Histogram of the sampling noise of {len(values)} cells, with a median of {middle:.3g}.",
            f"Noise of the embeddings of these cells over {draws} samples, in units of the embedding's length, "
            f"which is 1. Distances between cells below about {2 * middle:.2g} may be noise.",
        )
    )
    return section


def score_section(scores: np.ndarray, clusters: np.ndarray) -> Section:
    """Show how surprising the cells are to the model."""
    section, known = Section("How surprising the cells are"), np.isfinite(scores)
    if not known.any():
        section.add("No cell could be scored.")
        return section
    section.add(
        "The error at genes that were hidden from the model, as a share of the variance of the cell's values: 0 is "
        "a perfect prediction, 1 what the cell's mean alone gives. High scores are of scrambled cells, or of cells "
        "of a kind that the model hardly knows. Doublets do not stand out."
    )
    middle = float(np.median(scores[known]))
    section.add(
        histogram_figure(
            scores[known],
            "score",
            f"Histogram of the scores of {int(known.sum())} cells, with a median of {middle:.3g}.",
            "Scores of the cells.",
        )
    )
    rows = []
    for number in range(int(clusters.max()) + 1):
        mine = scores[known & (clusters == number)]
        rows.append([str(number), f"{len(mine):,}", f"{np.median(mine):.2f}" if len(mine) else "-"])
    section.add(Table("Scores by cluster.", ["Cluster", "Cells", "Median score"], rows, (1, 2)))
    return section


def origin_section(record: dict[str, Any], versions: dict[str, str], command: str, when: str) -> Section:
    """Say what made the page, and how to repeat it."""
    section = Section("What made this page, and how to repeat it")
    section.add(f"Made on {when} by")
    section.add(command, "code")
    section.add(
        "The same command with the same files and versions gives the same numbers on the same kind of machine. On "
        "another kind, last digits differ, and with them single cells at the borders of clusters."
    )
    rows = [[name, _text(value)] for name, value in sorted(record.items())]
    section.add(Table("How the embeddings were made.", ["Setting", "Value"], rows))
    section.add(Table("Versions.", ["Package", "Version"], [list(each) for each in versions.items()]))
    return section


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple, np.ndarray)) else str(value)
