# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Annotate cells by the cells of a saved index: their labels are columns of the index, their embeddings are there.

An index holds no counts, so PCA and logistic regression on counts are not there to compare with.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tahoex1_hf.annotation.annotating import KEY, Annotation, check_files, doubts, sample, slots_of
from tahoex1_hf.annotation.labels import (
    UNKNOWN_NAME,
    check_classes,
    check_label_map,
    joined_names,
    read_label_map,
    shared_origins,
)
from tahoex1_hf.annotation.methods import Features
from tahoex1_hf.annotation.output import check_column, write_copy
from tahoex1_hf.annotation.report import make_report, write_report
from tahoex1_hf.annotation.sides import read_obs
from tahoex1_hf.annotation.transfer import LabelledReference, ScoredQuery, TransferOptions, transfer
from tahoex1_hf.annotation.validation import check_folds
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import Source, open_cells, read_obs_column
from tahoex1_hf.cells.readers.base import said_once
from tahoex1_hf.cells.whole import read_stored
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.embedding.embedder import Embedder, embed_inputs, forget_embeddings
from tahoex1_hf.embedding.stored import check_alike
from tahoex1_hf.finetuning.cells.baselines import MOST_CELLS
from tahoex1_hf.indexing.querying import indexs_embedder
from tahoex1_hf.indexing.store import CELL, VECTOR, CellIndex, in_words
from tahoex1_hf.inference.encoder import Dtype
from tahoex1_hf.inference.provenance import provenance_key
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Reference:
    """Labelled cells of an index.

    Attributes:
        learnt: Cells to learn from.
        columns: Their labels, and their batches where these are named.
        notes: Sentences about them.
    """

    learnt: LabelledReference
    columns: "pd.DataFrame"
    notes: list[str]


def annotate_from_index(
    query: str | Path,
    index: str | Path,
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
    report: str | Path | None = None,
    size: str | None = None,
    revision: str | None = None,
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    restart: bool = False,
    progress: bool = True,
) -> Annotation:
    """Write a file's cells together with the labels that cells of a saved index near to them have.

    As `annotate_files`, with an index that `build_index` has made in the place of the reference. At most 50,000 of its
    labelled cells, a random sample, are learnt from. The query is embedded with the index's settings.

    Args:
        query: `.h5ad` file with raw counts.
        index: Folder of the index.
        output: `.h5ad` file to write, which may be the query.
        model: The model of the index's cells.
        label: Column of the index with the labels.
        tokenizer: Tokenizer of a loaded model.
        query_label: As in `annotate_files`, as all arguments that are not described here.
        label_map: Label -> joined name, or the path of a table.
        batch: Column of the index, and of the query's obs, with the batches.
        neighbours: Number of neighbours that vote.
        unknown_share: Share of the index's cells that may be called unknown.
        min_cells: Fewest cells of a class.
        drop_rare: Whether to leave out classes with fewer cells.
        key: Slot of obsm with the query's embeddings; by default the query is embedded.
        report: Folder for the report.
        size: Name of the size.
        revision: Branch, tag or commit.
        layer: Layer with the counts.
        gene_id_column: Column of var with Ensembl ids.
        gene_symbols: Gene symbol -> Ensembl id, or the path of a table.
        species: "human" or "mouse".
        orthologs: Mouse gene -> Ensembl ids of human orthologues, or the path of a table.
        seed: Seed of everything that is random but the samples of long cells, whose seed is the index's.
        batch_tokens: Most tokens of a batch.
        device: Device.
        dtype: Precision.
        restart: Whether to discard the files of an unfinished run with other settings.
        progress: Whether to show progress bars.

    Returns:
        The annotation's report.

    Raises:
        FileNotFoundError: If a file, the index or a model does not exist.
        ValueError: If files, index or arguments cannot be used; the message says what to do.
        OSError: If the index cannot be read.
    """
    query, output = Path(query), Path(output)
    options = TransferOptions(neighbours, unknown_share, seed)
    options.check()
    check_files(query, None, output)
    column, names = check_column(label), read_label_map(label_map)
    with in_words("index", index):
        opened = CellIndex.open(index)
        opened.check_complete()
    if query_label is not None:
        read_obs_column(str(query), query_label, "query_label")
    obs = read_obs(str(query), [name for name in (label, query_label, batch) if name is not None])
    truth = obs[query_label] if query_label is not None else obs.get(label)
    with in_words("index", index):
        reference = _read_reference(opened, label, batch, names, truth, min_cells, drop_rare, seed)
    genes = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
    embedder = indexs_embedder(opened, model, tokenizer, size, revision, genes, batch_tokens, device, dtype)
    folder = output.with_name(f"{output.name}.annotation") if report is None else Path(report)
    with ExitStack() as stack:
        stack.enter_context(said_once())
        stored = _stored(query, key, opened)
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunLock(folder / ".lock", folder, "output"))
        values = stored if stored is not None else _embed(query, embedder, folder, restart, progress)
        scored, named = _scored(truth, names, reference.learnt.classes, values, seed)
        found = transfer(reference.learnt, Features(values), scored, options, progress=progress)
        scores = make_report(found, query.stem)
        notes = [*reference.notes, *_warnings(reference.columns, obs, batch)]
        for each in doubts(found, options):
            logger.warning("%s", each)
            notes.append(f"**Warning**: {each}")
        made = embedder.record()
        facts = {"label": label, "batch": batch or "", "model": made["model"], **asdict(options)}
        of_truth = None if scored is None else (scored, named)
        text = write_report(folder, scores, found, reference.learnt, values, of_truth, options, notes, facts)
        new = (key or KEY, values, made) if stored is None else None
        write_copy(query, output, slots_of(found, reference.learnt.classes, column, facts, new))
        forget_embeddings(folder)
    logger.info("%s", text)
    return Annotation(column, scores, text, notes, found.threshold)


def _read_reference(
    index: CellIndex,
    label: str,
    batch: str | None,
    label_map: dict[str, str],
    truth: "pd.Series | None",
    min_cells: int,
    drop_rare: bool,
    seed: int,
) -> _Reference:
    """Read labelled cells of an index, a random sample of very many."""
    columns = index.manifest.columns
    for argument, name in (("label", label), ("batch", batch)):
        if name is not None and name not in columns:
            raise ValueError(
                f"{argument}={name} (--{argument}) is no column of {index.folder}; there are {', '.join(columns)}."
            )
    where = f"`{columns[label]}` IS NOT NULL"
    labelled = index.count(where)
    wanted = {name: columns[name] for name in (label, batch) if name is not None}
    rows = index.rows(index.sample_ids(where, MOST_CELLS, seed), [VECTOR, CELL, *wanted.values()])
    # In the order of their names, so that the folds do not depend on the order of the index.
    rows = rows.take(np.argsort(np.array(rows[CELL].to_pylist(), dtype=str), kind="stable"))
    frame = rows.select(list(wanted.values())).rename_columns(list(wanted)).to_pandas()
    check_label_map(label_map, frame[label], truth)
    names = joined_names(frame[label], label_map)
    classes = check_classes(names, label, str(index.folder), min_cells, drop_rare)
    kept = np.flatnonzero(np.isin(names, classes))
    vectors = rows[VECTOR].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)[kept]
    labels = np.searchsorted(classes, names[kept].astype(str))
    batches = None
    if batch is not None:
        batches = frame[batch].astype(object).fillna("missing").astype(str).to_numpy(dtype=str)[kept]
        batches = batches if len(np.unique(batches)) > 1 else None
    check_folds(labels, batches, classes, str(index.folder), batch, seed)
    note = (
        f"Reference: {len(kept)} of {labelled} labelled cells of the index {index.folder.name}, {len(classes)} "
        "classes. An index holds no counts, so there is no comparison with PCA or with logistic regression on counts: "
        "a reference file (--reference) would show it."
    )
    return _Reference(LabelledReference(Features(vectors), labels, classes, batches), frame.iloc[kept], [note])


def _stored(query: Path, key: str | None, index: CellIndex) -> np.ndarray | None:
    found = None if key is None else read_stored(query, key, provenance_key(key))
    if found is None:
        return None
    values, record = found
    check_alike(str(query), record or {}, values.shape[1], index.manifest.record, index.manifest.width)
    return values


def _embed(query: Path, embedder: Embedder, folder: Path, restart: bool, progress: bool) -> np.ndarray:
    cells = open_cells(Source(str(query), "anndata"), embedder.tokenizer, embedder.genes, spool=folder / "by_cell")
    return np.asarray(embed_inputs(embedder, [cells], folder, restart, progress)[0])


def _scored(
    truth: "pd.Series | None", label_map: dict[str, str], classes: list[str], values: np.ndarray, seed: int
) -> tuple[ScoredQuery | None, list[str]]:
    """Return the query's cells that have a label, and their labels."""
    if truth is None:
        return None, []
    given = joined_names(truth, label_map)
    rows = sample(np.flatnonzero((given != "") & (given != UNKNOWN_NAME)), MOST_CELLS, seed)
    if not len(rows):
        return None, []
    number_of = {name: number for number, name in enumerate(classes)}
    numbers = np.array([number_of.get(name, -1) for name in given[rows].tolist()])
    return ScoredQuery(rows, Features(np.array(values[rows])), numbers), given[rows].astype(str).tolist()


def _warnings(reference: "pd.DataFrame", query: "pd.DataFrame", batch: str | None) -> list[str]:
    found = shared_origins(reference, query, batch)
    for each in found:
        logger.warning("%s", each)
    return [f"**Warning**: {each}" for each in found]
