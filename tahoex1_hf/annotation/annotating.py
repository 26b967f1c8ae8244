# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Annotate cells by an annotated reference: neighbours among embeddings vote, and nothing is trained."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tahoex1_hf.annotation.classifier import Classifier, read_classifier
from tahoex1_hf.annotation.labels import (
    UNKNOWN_NAME,
    check_classes,
    check_label_map,
    joined_names,
    read_label_map,
    shared_origins,
)
from tahoex1_hf.annotation.methods import Features, Votes
from tahoex1_hf.annotation.output import Slots, add_to_anndata, check_column, make_slots, write_copy
from tahoex1_hf.annotation.report import make_report, write_report
from tahoex1_hf.annotation.sides import Side, check_sides, read_obs, read_values
from tahoex1_hf.annotation.transfer import (
    LabelledReference,
    ScoredQuery,
    TransferOptions,
    Transferred,
    transfer,
)
from tahoex1_hf.annotation.validation import check_folds
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import Source, check_writable, open_cells, read_obs_column
from tahoex1_hf.cells.readers.base import said_once
from tahoex1_hf.cells.whole import read_stored
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.embedding.embedder import Embedder, check_record, embed_inputs, forget_embeddings
from tahoex1_hf.embedding.in_memory import embed_anndata
from tahoex1_hf.finetuning.cells.baselines import MOST_CELLS
from tahoex1_hf.hub.models import model_and_tokenizer
from tahoex1_hf.inference.chunks import with_settings
from tahoex1_hf.inference.encoder import Dtype
from tahoex1_hf.inference.provenance import check_key, provenance_key
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.runs.report import Report
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

KEY = "X_tahoe_x1"
_MUCH = 4  # times the stated share of unknown cells that call for a warning


@dataclass(frozen=True, eq=False)
class Annotation:
    """What came of an annotation.

    Attributes:
        column: Name of the column of obs with the labels.
        report: Scores of all methods.
        text: The report as text; empty where none was written.
        notes: Sentences about the data, warnings among them.
        threshold: Distance beyond which a cell is unknown.
    """

    column: str
    report: Report
    text: str
    notes: list[str]
    threshold: float


@dataclass(frozen=True)
class Labelling:
    """The columns that are read, and which classes are taken.

    Attributes:
        label: Column of the reference with the labels.
        query_label: Column of the query with labels; None for that of `label`, if there is one.
        label_map: Label -> joined name.
        batch: Column with the batches; None for none.
        min_cells: Fewest cells of a class.
        drop_rare: Whether classes with fewer cells are left out; otherwise they are an error.
        classifier: Fine-tuned classifier; None for none.
    """

    label: str
    query_label: str | None = None
    label_map: dict[str, str] = field(default_factory=dict)
    batch: str | None = None
    min_cells: int = 5
    drop_rare: bool = False
    classifier: Classifier | None = None

    def columns(self) -> list[str]:
        """Return the columns that are named."""
        return [name for name in (self.label, self.query_label, self.batch) if name is not None]


class Plan:
    """Everything that is known before any computing: classes, cells to learn from, cells to score by.

    Args:
        reference: Cells with labels.
        query: Cells to annotate.
        labelling: Columns and classes.
        seed: Seed of the samples of very many cells.

    Raises:
        ValueError: If something is missing or does not go together.
    """

    def __init__(self, reference: Side, query: Side, labelling: Labelling, seed: int):
        column = reference.column(labelling.label, "label")
        of_query = labelling.query_label or (labelling.label if labelling.label in query.obs else None)
        truth = None if of_query is None else query.column(of_query, "query_label")
        self.classifier = labelling.classifier
        check_label_map(labelling.label_map, column, truth, others=self.classifier.labels if self.classifier else ())
        names = joined_names(column, labelling.label_map)
        self.classes = check_classes(names, labelling.label, reference.where, labelling.min_cells, labelling.drop_rare)
        self.tokens, doubt = check_sides(reference, query)
        kept = np.flatnonzero(np.isin(names, self.classes))
        self.rows = sample(kept, MOST_CELLS, seed)
        # In the order of their names, so that the folds do not depend on the order of the file.
        self.rows = self.rows[np.argsort(reference.obs.index.to_numpy(dtype=str)[self.rows], kind="stable")]
        self.labels = np.searchsorted(self.classes, names[self.rows].astype(str))
        self.reference, self.query = reference, query
        self.batches = self._batches(labelling.batch)
        check_folds(self.labels, self.batches, self.classes, reference.where, labelling.batch, seed)
        self.truth: np.ndarray | None = None
        if truth is not None:
            given = joined_names(truth, labelling.label_map)
            self.scored = sample(np.flatnonzero((given != "") & (given != UNKNOWN_NAME)), MOST_CELLS, seed)
            self.truth = given[self.scored].astype(str) if len(self.scored) else None
        if self.classifier is not None:
            self.classifier.check([*self.classes, *([] if self.truth is None else np.unique(self.truth).tolist())])
        self.notes = self._notes(labelling, len(kept), doubt)

    def _batches(self, batch: str | None) -> np.ndarray | None:
        if batch is None:
            return None
        column = self.reference.column(batch, "batch")
        if batch not in self.query.obs:
            logger.info("%s has no column %s: batches of the two are not compared.", self.query.where, batch)
        names = np.asarray(column.iloc[self.rows].astype(object).fillna("missing").astype(str).to_numpy(dtype=str))
        return names if len(np.unique(names)) > 1 else None

    def _notes(self, labelling: Labelling, labelled: int, doubt: list[str]) -> list[str]:
        notes = [
            f"Reference: {len(self.rows)} of {labelled} labelled cells, {len(self.classes)} classes; query: "
            f"{self.query.cells.num_cells} cells. PCA and logistic regression of counts read the "
            f"{len(self.tokens)} genes that the model knows and that both have."
        ]
        if self.batches is None:
            notes.append(
                "Batches of the reference are not known, or there is one: the cross-validation leaves out random "
                "cells, whose neighbours of the same batch remain, so what to expect of another study is less."
            )
        warnings = [*doubt, *shared_origins(self.reference.obs, self.query.obs, labelling.batch)]
        for each in warnings:
            logger.warning("%s", each)
        return [*notes, *(f"**Warning**: {each}" for each in warnings)]

    def classify(self, source: Any, embedder: Embedder, progress: bool, spool: Path | None = None) -> Votes | None:
        """Return what the fine-tuned classifier says of the query; None where there is none.

        Args:
            source: Query, as `open_cells` takes it.
            embedder: Settings with which models run, and where genes and counts are.
            progress: Whether to show a progress bar.
            spool: Folder for counts that are stored by gene.
        """
        if self.classifier is None:
            return None
        cells = open_cells(source, self.classifier.predictor.tokenizer, embedder.genes, spool=spool)
        return self.classifier.votes(cells, self.classes, embedder, progress)

    def finish(
        self,
        embeddings: tuple[np.ndarray, np.ndarray],
        classified: Votes | None,
        options: TransferOptions,
        folder: Path | None,
        facts: dict[str, Any],
        progress: bool,
    ) -> tuple[Transferred, Report, str]:
        """Transfer the labels, and write the report into a folder, if there is one."""
        ours, theirs = embeddings
        features = Features(np.array(ours[self.rows]), read_values(self.reference.cells, self.rows, self.tokens))
        reference = LabelledReference(features, self.labels, self.classes, self.batches)
        scored = None
        if self.truth is not None:
            values = read_values(self.query.cells, self.scored, self.tokens)
            number_of = {name: number for number, name in enumerate(self.classes)}
            truth = np.array([number_of.get(name, -1) for name in self.truth.tolist()])
            scored = ScoredQuery(self.scored, Features(np.array(theirs[self.scored]), values), truth)
        found = transfer(reference, Features(theirs), scored, options, classified, progress)
        report = make_report(found, Path(self.query.where).stem)
        for each in doubts(found, options):
            logger.warning("%s", each)
            self.notes.append(f"**Warning**: {each}")
        text = ""
        if folder is not None:
            truth_of = None if scored is None or self.truth is None else (scored, self.truth.tolist())
            text = write_report(
                folder, report, found, reference, theirs, truth_of, options, self.notes, {**facts, **asdict(options)}
            )
        return found, report, text

    def slots(
        self,
        found: Transferred,
        column: str,
        facts: dict[str, Any],
        embeddings: tuple[str, np.ndarray, dict[str, Any]] | None,
    ) -> Slots:
        """Return what is added to the query; the embeddings, with slot and record, only if it does not have them."""
        names = None if self.classifier is None else self.classifier.columns(self.classes)
        return slots_of(found, self.classes, column, facts, embeddings, names)


def slots_of(
    found: Transferred,
    classes: list[str],
    column: str,
    facts: dict[str, Any],
    embeddings: tuple[str, np.ndarray, dict[str, Any]] | None,
    classifier_columns: list[str] | None = None,
) -> Slots:
    """Return what is added to a query.

    Args:
        found: What came of the transfer.
        classes: Names of the classes.
        column: Name of the column of the labels.
        facts: Record of how the labels were made.
        embeddings: Slot of obsm, embeddings, and the record of how they were made; None if the query has them.
        classifier_columns: Names of the classes of a fine-tuned classifier; None where there is none.
    """
    none = (float("nan"),) * 3
    facts = {
        **facts,
        "threshold": found.threshold,
        "cross_validation": found.split,
        "expected_precision": np.array([(each.precision or none)[0] for each in found.expected]),
        "expected_recall": np.array([(each.recall or none)[0] for each in found.expected]),
    }
    votes = found.votes
    return make_slots(
        column,
        classes,
        found.called,
        votes.probabilities,
        votes.distance,
        facts,
        embeddings,
        classifier_columns,
        found.classified,
    )


def doubts(found: Transferred, options: TransferOptions) -> list[str]:
    """Return what in a result calls for a warning: cells that both sides have, and far too many unknown cells."""
    doubts = []
    if found.twins:
        doubts.append(
            f"{found.twins} cells of the query have the embedding of a cell of the reference: they seem to be the "
            "same cells, and prove nothing."
        )
    unknown = float((found.called < 0).mean())
    if unknown > _MUCH * options.unknown_share:
        doubts.append(
            f"{unknown:.1%} of the query is unknown, and {options.unknown_share:.1%} of the reference was when left "
            "out. The query has types that the reference lacks, or all its cells are shifted, as those of another "
            "study or with other genes are: then look at the column that ends in _nearest, and expect less than the "
            "cross-validation says."
        )
    return doubts


def sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return the rows, or a random sample of so many that the work stays bounded, rising."""
    if len(rows) <= most:
        return rows
    logger.info("%d of %d cells are taken, a random sample.", most, len(rows))
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def annotate_anndata(
    adata: "AnnData",
    reference: "AnnData",
    model: TahoeX1PreTrainedModel | str | Path,
    label: str,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    query_label: str | None = None,
    label_map: Mapping[str, str] | str | Path | None = None,
    batch: str | None = None,
    neighbours: int = 15,
    unknown_share: float = 0.05,
    min_cells: int = 5,
    drop_rare: bool = False,
    key: str | None = None,
    classifier: Any = None,
    report: str | Path | None = None,
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
) -> Annotation:
    """Write labels into `adata` that the cells of an annotated reference near to its cells have.

    Writes, with `L` for the label's name, `adata.obs["tahoex1_L"]` (the label, or "unknown"), `tahoex1_L_nearest` (the
    label without the verdict "unknown"), `tahoex1_L_probability` and `tahoex1_L_distance`;
    `adata.obsm["tahoex1_L_probabilities"]`, whose columns are in the order of `adata.uns["tahoex1_L"]["classes"]`; and
    the embeddings with their record, as `embed_anndata` does.

    Args:
        adata: Cells to annotate, with raw counts.
        reference: Cells with labels and raw counts.
        model: As in `embed_anndata`. The folder of an adapter is a model, too.
        label: Column of the reference's obs with the labels.
        tokenizer: As in `embed_anndata`.
        query_label: Column of `adata.obs` with labels by which the annotation is scored; by default that of `label`,
            if there is one. Cells of a label that the reference lacks should be unknown.
        label_map: Label -> joined name, or the path of a table with the columns `label` and `joined`, for labels of
            both; cells of a label with an empty joined name are left out. Other labels stay as they are.
        batch: Column of obs with the batches (studies, donors). Where the reference has several, the cross-validation
            leaves whole batches out; a warning says which ones the query has too.
        neighbours: Number of neighbours that vote.
        unknown_share: Share of the reference's cells that may be called unknown in the cross-validation.
        min_cells: Fewest cells of a class.
        drop_rare: Whether classes with fewer cells are left out; otherwise they are an error.
        key: Slot of obsm whose embeddings are used, of each side that has it, if the same model made them with the
            same settings; by default both sides are embedded.
        classifier: Folder or Hub name of a fine-tuned classifier of cells (an adapter, a probe or a whole model), or a
            loaded one. Its classes go into `adata.obs["tahoex1_L_classifier"]` and `_classifier_probability`. It is
            scored in the same table, on the query alone. `label_map` joins its names, too.
        report: Folder for the report, its tables and figures; by default none is written.
        size: As in `embed_anndata`, as all arguments below.
        revision: Branch, tag or commit.
        layer: Layer with the counts, of both sides.
        gene_id_column: Column of var with Ensembl ids.
        gene_symbols: Gene symbol -> Ensembl id.
        species: "human" or "mouse".
        orthologs: Mouse gene -> Ensembl ids of human orthologues.
        max_length: Largest number of tokens of a cell.
        overflow: Choice of the genes of longer cells.
        seed: Seed of everything that is random.
        batch_tokens: Most tokens of a batch.
        device: Device.
        dtype: Precision.
        progress: Whether to show progress bars.

    Returns:
        The annotation's report.

    Raises:
        ValueError: If columns, counts, genes or embeddings cannot be used; the message says what to do.
    """
    options = TransferOptions(neighbours, unknown_share, seed)
    options.check()
    column = check_column(label)
    check_writable(adata)
    names = read_label_map(label_map)
    tuned = read_classifier(classifier, names)
    labelling = Labelling(label, query_label, names, batch, min_cells, drop_rare, tuned)
    loaded, tokenizer = model_and_tokenizer(model, tokenizer, size=size, revision=revision)
    tokenizer = with_settings(tokenizer, max_length, overflow)
    genes = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
    embedder = Embedder(loaded, model, tokenizer, genes, seed, batch_tokens, device, dtype)
    sides = [
        Side(role, open_cells(cells, tokenizer, genes), cells.obs)
        for role, cells in (("reference", reference), ("query", adata))
    ]
    plan = Plan(sides[0], sides[1], labelling, seed)
    made = embedder.record()
    stored = []
    for role, cells in (("reference", reference), ("query", adata)):
        there = key is not None and key in cells.obsm
        if key is not None and there:
            check_record(cells.uns.get(provenance_key(key)), made, f"the {role}", key)
        stored.append(np.asarray(cells.obsm[key], dtype=np.float32) if there else None)
    embeddings = [
        embed_anndata(cells, loaded, tokenizer, **embedder.arguments(), return_array=True, progress=progress)
        if found is None
        else found
        for cells, found in zip((reference, adata), stored, strict=True)
    ]
    folder = None if report is None else Path(report)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    facts = {"label": label, "batch": batch or "", "model": made["model"], **asdict(options)}
    ours, theirs = (np.asarray(each) for each in embeddings)
    classified = plan.classify(adata, embedder, progress)
    found, scores, text = plan.finish((ours, theirs), classified, options, folder, facts, progress)
    new = (key or KEY, theirs, made) if stored[1] is None else None
    add_to_anndata(adata, plan.slots(found, column, facts, new))
    return Annotation(column, scores, text, plan.notes, found.threshold)


def annotate_files(
    query: str | Path,
    reference: str | Path,
    output: str | Path,
    model: TahoeX1PreTrainedModel | str | Path,
    label: str,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    query_label: str | None = None,
    label_map: Mapping[str, str] | str | Path | None = None,
    batch: str | None = None,
    neighbours: int = 15,
    unknown_share: float = 0.05,
    min_cells: int = 5,
    drop_rare: bool = False,
    key: str | None = None,
    classifier: Any = None,
    report: str | Path | None = None,
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
) -> Annotation:
    """Write a file's cells together with the labels that cells of an annotated reference near to them have.

    The output is the query plus the slots that `annotate_anndata` writes. A folder beside it holds the report, its
    tables and figures, and until the end the embeddings, from which the same call resumes after a stop.

    Args:
        query: `.h5ad` file with raw counts, which is left as it is.
        reference: `.h5ad` file with raw counts and labels.
        output: `.h5ad` file to write, which may be the query.
        model: As in `annotate_anndata`, as are all arguments that are not described here.
        label: Column of the reference's obs with the labels.
        tokenizer: Tokenizer of a loaded model.
        query_label: Column of the query's obs with labels.
        label_map: Label -> joined name, or the path of a table.
        batch: Column of obs with the batches.
        neighbours: Number of neighbours that vote.
        unknown_share: Share of the reference's cells that may be called unknown.
        min_cells: Fewest cells of a class.
        drop_rare: Whether to leave out classes with fewer cells.
        key: Slot of obsm whose embeddings are used.
        classifier: Fine-tuned classifier of cells.
        report: Folder for the report; by default the output's name followed by `.annotation`.
        size: Name of the size.
        revision: Branch, tag or commit.
        layer: Layer with the counts.
        gene_id_column: Column of var with Ensembl ids.
        gene_symbols: Gene symbol -> Ensembl id, or the path of a table.
        species: "human" or "mouse".
        orthologs: Mouse gene -> Ensembl ids of human orthologues, or the path of a table.
        max_length: Largest number of tokens of a cell.
        overflow: Choice of the genes of longer cells.
        seed: Seed of everything that is random.
        batch_tokens: Most tokens of a batch.
        device: Device.
        dtype: Precision.
        restart: Whether to discard the files of an unfinished run with other settings.
        progress: Whether to show progress bars.

    Returns:
        The annotation's report.

    Raises:
        FileNotFoundError: If a file or a model does not exist.
        ValueError: If files or arguments cannot be used; the message says what to do.
    """
    query, reference, output = Path(query), Path(reference), Path(output)
    options = TransferOptions(neighbours, unknown_share, seed)
    options.check()
    check_files(query, reference, output)
    column = check_column(label)
    if key is not None:
        check_key(key)
    names = read_label_map(label_map)
    tuned = read_classifier(classifier, names)
    labelling = Labelling(label, query_label, names, batch, min_cells, drop_rare, tuned)
    _check_columns(reference, query, labelling)
    loaded, tokenizer = model_and_tokenizer(model, tokenizer, size=size, revision=revision)
    tokenizer = with_settings(tokenizer, max_length, overflow)
    genes = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
    embedder = Embedder(loaded, model, tokenizer, genes, seed, batch_tokens, device, dtype)
    folder = output.with_name(f"{output.name}.annotation") if report is None else Path(report)
    with ExitStack() as stack:
        stack.enter_context(said_once())
        spool = folder / "by_cell"  # made where counts are stored by gene; what a killed run leaves is taken up
        sides = [
            Side(
                role,
                open_cells(Source(str(path), "anndata"), tokenizer, genes, spool=spool / role),
                read_obs(str(path), labelling.columns()),
            )
            for role, path in (("reference", reference), ("query", query))
        ]
        plan = Plan(sides[0], sides[1], labelling, seed)
        made = embedder.record()
        stored = [_stored(path, key, made) for path in (reference, query)]
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunLock(folder / ".lock", folder, "output"))
        stack.callback(shutil.rmtree, spool, ignore_errors=True)
        missing = [side.cells for side, there in zip(sides, stored, strict=True) if there is None]
        computed = iter(embed_inputs(embedder, missing, folder, restart, progress))
        ours, theirs = (next(computed) if there is None else there for there in stored)
        facts = {"label": label, "batch": batch or "", "model": made["model"], **asdict(options)}
        classified = plan.classify(Source(str(query), "anndata"), embedder, progress, spool / "classifier")
        found, scores, text = plan.finish((ours, theirs), classified, options, folder, facts, progress)
        for side in sides:
            side.cells.check_unchanged()
        new = (key or KEY, theirs, made) if stored[1] is None else None
        write_copy(query, output, plan.slots(found, column, facts, new))
        forget_embeddings(folder)
    logger.info("%s", text)
    return Annotation(column, scores, text, plan.notes, found.threshold)


def _stored(path: Path, key: str | None, made: Mapping[str, Any]) -> np.ndarray | None:
    """Return a file's own embeddings, where `key` names a slot that it has."""
    found = None if key is None else read_stored(Path(path), key, provenance_key(key))
    if found is None or key is None:
        return None
    check_record(found[1], made, str(path), key)
    return found[0]


def _check_columns(reference: Path, query: Path, labelling: Labelling) -> None:
    """Check the names of the columns before a model is loaded."""
    read_obs_column(str(reference), labelling.label, "label")
    if labelling.batch is not None:
        read_obs_column(str(reference), labelling.batch, "batch")
    if labelling.query_label is not None:
        read_obs_column(str(query), labelling.query_label, "query_label")


def check_files(query: Path, reference: Path | None, output: Path) -> None:
    """Check that the files can be read and written, before any work is done; an index is no file.

    Raises:
        FileNotFoundError: If the query or the reference does not exist.
        ValueError: For files other than `.h5ad`, an output whose folder does not exist, and a query that is the
            reference.
    """
    given = [("query", query), *([] if reference is None else [("reference", reference)])]
    for _, path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
    for name, path in (*given, ("output", output)):
        if path.suffix != ".h5ad":
            raise ValueError(f"The {name} must be an .h5ad file, got {path.name!r}.")
    if not output.parent.is_dir():
        raise ValueError(f"The output's folder {output.parent} does not exist.")
    if reference is None:
        return
    if output.resolve() == reference.resolve():
        raise ValueError(f"The output {output} is the reference, which would be lost: name another file.")
    if query.resolve() == reference.resolve():
        raise ValueError(f"{query} is query and reference: every cell would find itself.")
