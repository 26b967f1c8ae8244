# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Make the page: read a sample of the cells, compute, and write one HTML file."""

import inspect
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tahoex1_hf.annotation.annotating import annotate_anndata
from tahoex1_hf.annotation.output import check_column
from tahoex1_hf.annotation.sides import read_values
from tahoex1_hf.benchmarking.clusters import leiden
from tahoex1_hf.cells.encoding import CHUNK_CELLS
from tahoex1_hf.cells.gene_names import shown_names
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions, known_symbols
from tahoex1_hf.cells.opening import open_cells, read_obs_column
from tahoex1_hf.cells.whole import read_sample
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.plots import umap_places
from tahoex1_hf.embedding.in_memory import embed_anndata
from tahoex1_hf.finetuning.cells.baselines import sparse_pca
from tahoex1_hf.hub.models import expression_decoder, model_and_tokenizer, without_peft
from tahoex1_hf.inference.chunks import with_settings
from tahoex1_hf.inference.encoder import Dtype
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.reporting import sections
from tahoex1_hf.reporting.markers import find_markers
from tahoex1_hf.reporting.page import Section, render
from tahoex1_hf.reporting.sections import Places, Shown
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

FEWEST, MOST_CLASSES = 20, 40
_KEY, _RECORD = "X_tahoe_x1", "tahoe_x1"
_PACKAGES = ("tahoex1_hf", "torch", "transformers", "scanpy", "scikit-learn", "umap-learn")


@dataclass(frozen=True)
class Request:
    """What a page is asked for, checked before anything is computed.

    Attributes:
        cells: File of the cells.
        output: HTML file.
        reference: File of annotated cells; None for no annotation.
        label: Column of the reference with the labels.
        color: Column of obs by which the cells are shown, too.
        max_cells: Most cells of the page, and of the reference.
        markers: Most marker genes of a cluster.
    """

    cells: Path
    output: Path
    reference: Path | None = None
    label: str | None = None
    color: str | None = None
    max_cells: int = 5000
    markers: int = 8

    def check(self) -> None:
        """Raise an error if files, columns or numbers cannot be used.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: For anything else; the message says what to do.
        """
        for name, path in (("cells", self.cells), ("reference", self.reference)):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{path} does not exist.")
            if path is not None and path.suffix != ".h5ad":
                raise ValueError(f"The {name} must be an .h5ad file, got {path.name!r}.")
        if self.output.suffix not in (".html", ".htm"):
            raise ValueError(f"The output must end in .html, got {self.output.name!r}.")
        if not self.output.parent.is_dir():
            raise ValueError(f"The output's folder {self.output.parent} does not exist.")
        if (self.reference is None) != (self.label is None):
            raise ValueError("reference (--reference) and label (--label) go together: pass both, or leave both out.")
        if self.max_cells < FEWEST or self.markers < 1:
            raise ValueError(
                f"max_cells={self.max_cells}, markers={self.markers}: pass at least {FEWEST} cells and 1 marker gene."
            )
        if self.reference is not None and self.label is not None:
            if self.reference.resolve() == self.cells.resolve():
                raise ValueError(f"{self.cells} is its own reference: every cell would find itself.")
            check_column(self.label)
            read_obs_column(str(self.reference), self.label, "label")
        if self.color is not None:
            values = read_obs_column(str(self.cells), self.color, "color").dropna().astype(str)
            if values.nunique() > MOST_CLASSES:
                raise ValueError(
                    f"color={self.color} (--color) has {values.nunique()} different values in {self.cells}, and a "
                    f"picture tells at most {MOST_CLASSES} apart: name another column."
                )


def write_page(
    cells: str | Path,
    output: str | Path,
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    reference: str | Path | None = None,
    label: str | None = None,
    color: str | None = None,
    max_cells: int = 5000,
    markers: int = 8,
    draws: int = 2,
    score: bool = False,
    size: str | None = None,
    revision: str | None = None,
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    max_length: int | None = None,
    overflow: str | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    progress: bool = True,
) -> None:
    """Write one HTML page about the cells of a file and their embeddings, which can be handed on as it is.

    It says what went in and what was lost, shows the cells by embedding and by PCA side by side, lists clusters with
    their marker genes, the labels of a reference if there is one, the sampling noise, and what made the page. Pictures
    are part of the file; it loads nothing, and has no scripts.

    Args:
        cells: `.h5ad` file with raw counts.
        output: `.html` file to write.
        model: As in `embed_anndata`.
        tokenizer: As in `embed_anndata`.
        reference: `.h5ad` file of annotated cells with raw counts, whose labels are transferred as in
            `annotate_anndata`.
        label: Column of the reference's obs with the labels.
        color: Column of obs with at most 40 different values, by which the maps are drawn, too.
        max_cells: Most cells of the page, a random sample of the file's; also of the reference's.
        markers: Most marker genes of a cluster.
        draws: As in `embed_anndata`; with 1, the sampling noise is not measured.
        score: Whether to score the cells, as in `embed_anndata`.
        size: As in `embed_anndata`.
        revision: As in `embed_anndata`.
        layer: As in `embed_anndata`.
        gene_id_column: As in `embed_anndata`.
        gene_symbols: As in `embed_anndata`.
        species: As in `embed_anndata`.
        orthologs: As in `embed_anndata`.
        max_length: As in `embed_anndata`.
        overflow: As in `embed_anndata`.
        seed: Seed of everything that is random.
        batch_tokens: As in `embed_anndata`.
        device: As in `embed_anndata`.
        dtype: As in `embed_anndata`.
        progress: Whether to show progress bars.

    Raises:
        FileNotFoundError: If a file or a model does not exist.
        ValueError: If files, columns or arguments cannot be used; the message says what to do.
    """
    command = _command(dict(locals()))
    wanted = Request(
        Path(cells),
        Path(output),
        None if reference is None else Path(reference),
        label,
        color,
        max_cells,
        markers,
    )
    wanted.check()
    import jinja2  # noqa: F401  - missing packages are told before any work
    import scanpy  # noqa: F401
    import umap  # noqa: F401

    loaded, tokenizer = model_and_tokenizer(model, tokenizer, size=size, revision=revision, expression=score)
    if score:
        expression_decoder(without_peft(loaded))
    tokenizer = with_settings(tokenizer, max_length, overflow)
    genes = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
    own: dict[str, Any] = {
        "layer": layer,
        "gene_id_column": gene_id_column,
        "gene_symbols": gene_symbols,
        "species": species,
        "orthologs": orthologs,
        "seed": seed,
        "batch_tokens": batch_tokens,
        "device": device,
        "dtype": dtype,
        "progress": progress,
    }
    page = _Page(wanted, loaded, tokenizer, genes, own)
    html = page.html(draws, score, command)
    with WholeFile(wanted.output) as partial:
        partial.write_text(html, encoding="utf-8")


class _Page:
    """A page in the making.

    Args:
        wanted: What is asked for.
        model: Loaded model.
        tokenizer: Its tokenizer.
        genes: How genes and counts are found.
        options: Further arguments of `embed_anndata` and `annotate_anndata`.

    Raises:
        ValueError: If the cells cannot be used.
    """

    def __init__(
        self,
        wanted: Request,
        model: TahoeX1PreTrainedModel,
        tokenizer: TahoeX1Tokenizer,
        genes: GeneOptions,
        options: dict[str, Any],
    ):
        self.wanted, self.model, self.tokenizer, self.options = wanted, model, tokenizer, options
        self.adata, self.total = read_sample(wanted.cells, wanted.max_cells, options["seed"])
        if self.adata.n_obs < FEWEST:
            raise ValueError(f"{wanted.cells} has {self.adata.n_obs} cells: a page needs at least {FEWEST}.")
        self.cells = open_cells(self.adata, tokenizer, genes)
        self.symbols = known_symbols(tokenizer, genes)
        self.reference: AnnData | None = None
        if wanted.reference is not None:
            self.reference, _ = read_sample(wanted.reference, wanted.max_cells, options["seed"])
            open_cells(self.reference, tokenizer, genes)

    def html(self, draws: int, score: bool, command: str) -> str:
        """Compute everything, and return the page."""
        wanted, seed = self.wanted, self.options["seed"]
        shown = self._shown()
        options = {"draws": draws, "score": score, **self.options}
        copy = self.adata.copy()
        embed_anndata(copy, self.model, self.tokenizer, **options)
        logger.info("Making maps, clusters and markers of %d cells.", shown.number)
        tokens, names = self._genes()
        values = read_values(self.cells, np.arange(shown.number), tokens)
        places = self._places(copy.obsm[_KEY], values, seed)
        from sklearn.metrics import adjusted_rand_score

        agreement = float(adjusted_rand_score(places.clusters, places.pca_clusters))
        column = None
        if wanted.color is not None:
            text = self.adata.obs[wanted.color].astype(object).fillna("missing").astype(str).to_numpy()
            column = (wanted.color, text)
        parts: list[Section] = [
            sections.input_section(shown),
            sections.map_section(places, agreement, column),
            sections.cluster_section(places.clusters, find_markers(values, names, places.clusters, wanted.markers)),
        ]
        if self.reference is not None:
            parts.append(self._annotation(places))
        deviations = copy.obs[f"{_RECORD}_sd"].to_numpy() if draws > 1 else None
        parts.append(sections.noise_section(shown, deviations, draws))
        if score:
            parts.append(sections.score_section(copy.obs[f"{_RECORD}_score"].to_numpy(), places.clusters))
        when = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        parts.append(sections.origin_section(copy.uns[_RECORD], _versions(), command, when))
        lead = (
            f"{shown.number:,} cells of {shown.file}, as the model {copy.uns[_RECORD]['model'] or 'given'} sees them."
        )
        return render(f"Cells of {wanted.cells.stem}", lead, parts)

    def _shown(self) -> Shown:
        lengths, sums = [], []
        for rows in self.cells.chunks(0, self.cells.num_cells, CHUNK_CELLS):
            lengths.append(np.diff(rows.offsets))
            sums.append(np.bincount(rows.cells(), weights=rows.counts, minlength=rows.num_cells))
        names: dict[str, str] = {}
        if self.cells.found is not None:
            given = map(str, self.cells.found.names)
            names = {name: each for name, each in zip(given, self._all_names(), strict=True) if name != each}
        context = self.tokenizer.context_length
        room = None if context is None else context - 1
        return Shown(
            self.wanted.cells.name, self.cells, self.total, np.concatenate(lengths), np.concatenate(sums), room, names
        )

    def _genes(self) -> tuple[np.ndarray, list[str]]:
        """Return the tokens of the genes, rising, and the names by which people know them."""
        match = self.cells.genes
        assert match is not None  # an AnnData has a table of genes
        tokens, first = np.unique(match.token_ids, return_index=True)
        known = tokens >= 0
        shown = self._all_names()
        return tokens[known], [shown[place] for place in first[known]]

    def _all_names(self) -> list[str]:
        """Return the names by which people know the columns of the counts."""
        var = self.cells.var if self.cells.own_genes else self.adata.raw.var
        return [str(name) for name in shown_names(var, self.symbols)]

    def _places(self, embeddings: np.ndarray, values: Any, seed: int) -> Places:
        expressed = values[:, np.flatnonzero(values.getnnz(axis=0))]
        pca = sparse_pca(expressed, seed)
        if pca is None:
            raise ValueError(f"{self.wanted.cells}: too few known genes are expressed for principal components.")
        components = pca.fit_transform(expressed)
        clusters, others = (_by_size(leiden(each, seed)) for each in (embeddings, components))
        return Places(umap_places(embeddings, seed), umap_places(components, seed), clusters, others)

    def _annotation(self, places: Places) -> Section:
        wanted = self.wanted
        assert wanted.label is not None
        assert wanted.reference is not None
        assert self.reference is not None
        query = self.adata.copy()
        found = annotate_anndata(
            query, self.reference, self.model, wanted.label, self.tokenizer, drop_rare=True, **self.options
        )
        labels = query.obs[found.column].astype(str).to_numpy()
        nearest = query.obs[f"{found.column}_nearest"].astype(str).to_numpy()
        probability = query.obs[f"{found.column}_probability"].to_numpy()
        return sections.annotation_section(
            places, wanted.reference.name, wanted.label, labels, nearest, probability, found
        )


def _by_size(clusters: np.ndarray) -> np.ndarray:
    """Number clusters by their sizes, the largest first."""
    order = np.argsort(-np.bincount(clusters), kind="stable")
    return np.argsort(order)[clusters]


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            from tahoex1_hf import __version__

            found[name] = __version__ if name == "tahoex1_hf" else "-"
    return found


def _command(arguments: dict[str, Any]) -> str:
    """Return the command that makes the same page, with the options that are not the usual ones."""
    model = arguments["model"]
    words = ["tahoex1", "report", str(arguments["cells"]), "--output", str(arguments["output"])]
    words += ["--model", str(model) if isinstance(model, (str, Path)) else str(model.name_or_path or "MODEL")]
    for name, parameter in inspect.signature(write_page).parameters.items():
        value = arguments[name]
        if parameter.kind is not parameter.KEYWORD_ONLY or name == "progress" or value == parameter.default:
            continue
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [_word(value)])]
    return shlex.join(words)


def _word(value: Any) -> str:
    return "TABLE" if isinstance(value, Mapping) else str(value)
