# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Make the page: read a sample of the cells, compute, and write one HTML file."""

import inspect
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.annotation.annotating import Annotation, Labelling, Plan
from tahoex1_hf.annotation.labels import ORIGINS
from tahoex1_hf.annotation.output import check_column
from tahoex1_hf.annotation.sides import Side, read_values
from tahoex1_hf.annotation.transfer import TransferOptions
from tahoex1_hf.benchmarking.clusters import leiden
from tahoex1_hf.cells.encoding import CHUNK_CELLS
from tahoex1_hf.cells.gene_names import shown_names
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions, known_symbols
from tahoex1_hf.cells.opening import Source, open_cells, read_obs_column
from tahoex1_hf.cells.readers.base import CellInput, said_once
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.common.plots import import_umap, umap_places
from tahoex1_hf.common.reading import reading
from tahoex1_hf.embedding.embedder import Embedder, embed_once
from tahoex1_hf.embedding.stored import open_embeddings
from tahoex1_hf.finetuning.cells.baselines import sparse_pca
from tahoex1_hf.hub.models import expression_decoder, model_and_tokenizer, without_peft
from tahoex1_hf.inference.chunks import with_settings
from tahoex1_hf.inference.encoder import Dtype
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.reporting import sections
from tahoex1_hf.reporting.markers import find_markers
from tahoex1_hf.reporting.page import Section, render
from tahoex1_hf.reporting.sample import run_folder, sampled
from tahoex1_hf.reporting.sections import Places, Shown
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

FEWEST, MOST_CLASSES = 20, 40
_KEY, _RECORD = "X_tahoe_x1", "tahoe_x1"
_UNTOLD = ("progress", "restart")  # arguments that change nothing on the page
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
        import igraph  # noqa: F401  # scanpy would miss it once the cells are embedded

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
    restart: bool = False,
    progress: bool = True,
) -> None:
    """Write one HTML page about the cells of a file and their embeddings, which can be handed on as it is.

    It says what went in and what was lost, shows the cells by embedding and by PCA side by side, lists clusters with
    their marker genes, the labels of a reference if there is one, the sampling noise, and what made the page. Pictures
    are part of the file; it loads nothing, and has no scripts. Embeddings are kept in the folder `OUTPUT.parts` until
    the page is written; the same call resumes a run that was stopped in any way.

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
        restart: Whether to discard the files of an unfinished run with other settings.
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

    import_umap()

    loaded, tokenizer = model_and_tokenizer(model, tokenizer, size=size, revision=revision, expression=score)
    if score:
        expression_decoder(without_peft(loaded))
    tokenizer = with_settings(tokenizer, max_length, overflow)
    genes = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
    embedder = Embedder(loaded, model, tokenizer, genes, seed, batch_tokens, device, dtype)
    folder = wanted.output.with_name(f"{wanted.output.name}.parts")
    with ExitStack() as stack:
        stack.enter_context(said_once())
        stack.enter_context(RunLock(f"{folder}.lock", wanted.output, "output"))
        stack.enter_context(run_folder(folder, restart))
        html = _Page(wanted, embedder, draws, score, folder).html(command, progress)
        with WholeFile(wanted.output) as partial:
            partial.write_text(html, encoding="utf-8")


class _Page:
    """A page in the making.

    Args:
        wanted: What is asked for.
        embedder: Model and settings.
        draws: Number of samples of each long cell.
        score: Whether to score the cells.
        folder: Folder of the run, in which it keeps what is made of the cells.

    Raises:
        ValueError: If the cells cannot be used.
    """

    def __init__(self, wanted: Request, embedder: Embedder, draws: int, score: bool, folder: Path):
        self.wanted, self.embedder, self.draws, self.score, self.folder = wanted, embedder, draws, score, folder
        sample = sampled(wanted.cells, wanted.max_cells, embedder.seed, folder / "cells.h5ad")
        self.adata, self.total = sample.adata, sample.total
        if self.adata.n_obs < FEWEST:
            raise ValueError(f"{wanted.cells} has {self.adata.n_obs} cells: a page needs at least {FEWEST}.")
        self.cells = self._open(sample.path)
        self.symbols = known_symbols(embedder.tokenizer, embedder.genes)
        self.plan: Plan | None = None
        if wanted.reference is not None and wanted.label is not None:
            other = sampled(wanted.reference, wanted.max_cells, embedder.seed, folder / "reference.h5ad")
            columns = [wanted.label, *ORIGINS]
            sides = [
                Side(role, cells, adata.obs[[name for name in dict.fromkeys(columns) if name in adata.obs]])
                for role, cells, adata in (
                    ("reference", self._open(other.path), other.adata),
                    ("query", self.cells, self.adata),
                )
            ]
            self.plan = Plan(sides[0], sides[1], Labelling(wanted.label, drop_rare=True), embedder.seed)

    def _open(self, path: Path) -> CellInput:
        spool = self.folder / "by_cell"
        return open_cells(Source(str(path), "anndata"), self.embedder.tokenizer, self.embedder.genes, spool=spool)

    def _embed(
        self, cells: CellInput, name: str, score: bool, progress: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
        """Return the embeddings of cells, the numbers beside them, and the record of how they were made."""
        made = self.folder / f"{name}.parquet"
        embed_once(self.embedder, [cells], made, False, progress, draws=self.draws, score=score)
        stored = open_embeddings(made, _KEY)
        pieces = list(stored.pieces())
        numbers = {
            column: np.concatenate([piece.columns[column].to_numpy() for piece in pieces]) for column in stored.columns
        }
        return np.concatenate([piece.embeddings for piece in pieces]), numbers, stored.record

    def html(self, command: str, progress: bool) -> str:
        """Compute everything, and return the page."""
        wanted, seed = self.wanted, self.embedder.seed
        with reading(self.cells.path):
            self.cells.sort_by_cell()
        shown = self._shown()
        embeddings, numbers, record = self._embed(self.cells, "cells", self.score, progress)
        theirs = None if self.plan is None else self._embed(self.plan.reference.cells, "reference", False, progress)[0]
        logger.info("Making maps, clusters and markers of %d cells.", shown.number)
        tokens, names = self._genes()
        values = read_values(self.cells, np.arange(shown.number), tokens)
        places = self._places(embeddings, values, seed)
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
        if self.plan is not None and theirs is not None:
            parts.append(self._annotation(self.plan, places, (theirs, embeddings), progress))
        parts.append(sections.noise_section(shown, numbers.get(f"{_RECORD}_sd"), self.draws))
        if self.score:
            parts.append(sections.score_section(numbers[f"{_RECORD}_score"], places.clusters))
        when = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        parts.append(sections.origin_section(record, _versions(), command, when))
        lead = f"{shown.number:,} cells of {shown.file}, as the model {record['model'] or 'given'} sees them."
        for cells in (self.cells, *(() if self.plan is None else (self.plan.reference.cells,))):
            cells.check_unchanged()
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
        context = self.embedder.tokenizer.context_length
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

    def _annotation(
        self, plan: Plan, places: Places, embeddings: tuple[np.ndarray, np.ndarray], progress: bool
    ) -> Section:
        options = TransferOptions(seed=self.embedder.seed)
        found, scores, text = plan.finish(embeddings, None, options, None, {}, progress)
        label, column = str(self.wanted.label), check_column(str(self.wanted.label))
        obs = plan.slots(found, column, {}, None).obs
        labels, nearest = (np.asarray(obs[name], dtype=str) for name in (column, f"{column}_nearest"))
        result = Annotation(column, scores, text, plan.notes, found.threshold)
        reference = Path(str(self.wanted.reference)).name
        return sections.annotation_section(
            places, reference, label, labels, nearest, obs[f"{column}_probability"], result
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
        if parameter.kind is not parameter.KEYWORD_ONLY or name in _UNTOLD or value == parameter.default:
            continue
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [_word(value)])]
    return shlex.join(words)


def _word(value: Any) -> str:
    return "TABLE" if isinstance(value, Mapping) else str(value)
