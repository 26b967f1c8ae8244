# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the cells of an index that are nearest to others, which are embeddings already or are embedded first."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.common.names import short_names
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.embedding.embedder import Embedder
from tahoex1_hf.embedding.files import embed_files
from tahoex1_hf.embedding.stored import DECISIVE, Piece, StoredEmbeddings, check_alike, differences, open_embeddings
from tahoex1_hf.embedding.streams import WholeStream
from tahoex1_hf.hub.models import model_and_tokenizer
from tahoex1_hf.indexing.building import NEIGHBOURS, RECALL
from tahoex1_hf.indexing.searching import MANY, QUERIES, Search
from tahoex1_hf.indexing.store import CELL, FILE, ROW, CellIndex, in_words
from tahoex1_hf.indexing.summary import Summary
from tahoex1_hf.inference.chunks import with_settings
from tahoex1_hf.inference.encoder import Dtype
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

_BACKGROUND = 20_000  # cells of the index with which the neighbours are compared
_TWIN = 1e-5  # embeddings have length 1: cells nearer than this hold the same counts


@dataclass(frozen=True)
class Queried:
    """What came of a query.

    Attributes:
        num_cells: Number of cells that were looked for.
        passing: Number of the index's cells that pass the filter.
        recall: Share of the true neighbours that a search finds.
        text: Summary of the neighbours, in Markdown.
    """

    num_cells: int
    passing: int
    recall: float
    text: str


def query_index(
    cells: str | Path,
    index: str | Path,
    output: str | Path,
    *,
    k: int = NEIGHBOURS,
    where: str | None = None,
    exact: bool = False,
    key: str | None = None,
    model: TahoeX1PreTrainedModel | str | Path | None = None,
    tokenizer: TahoeX1Tokenizer | None = None,
    size: str | None = None,
    revision: str | None = None,
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    progress: bool = True,
) -> Queried:
    """Find the cells of an index that are nearest to others.

    The output is a Parquet table with a row for each cell and neighbour: `query` (name of the cell), `rank` (from 1),
    `distance` (Euclidean, between embeddings of length 1), `neighbour` (name), `file` and `row` (where the neighbour
    is), and the columns of the index. Beside it, `OUTPUT.md` holds the summary.

    Args:
        cells: `.parquet`, `.h5ad` or `.zarr` with embeddings, or cells with raw counts where `model` is given.
        index: Folder of the index.
        output: Path of the table, which ends in `.parquet`.
        k: Number of neighbours.
        where: Filter of the index's cells, in SQL: `tissue = 'lung' AND n_genes > 500`.
        exact: Whether to compare every cell.
        key: Slot of `obsm`, or name of the column of embeddings; by default that of the index.
        model: Model with which the index's cells were embedded, for cells that are not embedded yet.
        tokenizer: As in `embed_anndata`, as all arguments below.
        size: Name of the size.
        revision: Branch, tag or commit.
        layer: Layer with the counts.
        gene_id_column: Column of var with Ensembl ids.
        gene_symbols: Gene symbol -> Ensembl id.
        species: "human" or "mouse".
        orthologs: Mouse gene -> Ensembl ids of human orthologues.
        batch_tokens: Most tokens of a batch.
        device: Device.
        dtype: Precision.
        progress: Whether to show a progress bar.

    Returns:
        Numbers of cells, recall and summary.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the index is unfinished, or the cells cannot be compared with it.
        OSError: If the index cannot be read, or a search takes too long.
    """
    output = Path(output)
    if output.suffix != ".parquet" or not output.parent.is_dir():
        raise ValueError(f"output={output} must end in .parquet, in a folder that exists.")
    if k < 1:
        raise ValueError(f"k={k}: pass at least 1.")
    if not Path(cells).exists():
        raise FileNotFoundError(f"{cells} does not exist.")
    made = output.with_name(f"{output.name}.embeddings.parquet")
    with ExitStack() as stack:
        stack.enter_context(in_words("index", index))
        opened = CellIndex.open(index)
        opened.check_complete()
        search = Search(opened, k, where, exact, RECALL)
        if model is None:
            stored = _open_stored(cells, key or opened.manifest.key)
        else:
            genes = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
            embedder = indexs_embedder(opened, model, tokenizer, size, revision, genes, batch_tokens, device, dtype)
            stack.callback(made.unlink, missing_ok=True)
            # Its shards, with which a stopped run goes on, lie beside it.
            embed_files(cells, made, embedder.loaded, embedder.tokenizer, **embedder.arguments(), progress=progress)
            stored = open_embeddings(made, "X_tahoe_x1")
        _check(stored, opened)
        search.expect(stored.num_cells)
        return _carry_out(stored, opened, search, output, progress)


def _open_stored(cells: str | Path, key: str) -> StoredEmbeddings:
    try:
        return open_embeddings(cells, key)
    except ValueError as error:
        raise ValueError(f"{error} To embed raw cells first, name the index's own model (--model).") from error


def _check(stored: StoredEmbeddings, index: CellIndex) -> None:
    manifest = index.manifest
    check_alike(stored.path, stored.record, stored.width, manifest.record, manifest.width)


def indexs_embedder(
    index: CellIndex,
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None,
    size: str | None,
    revision: str | None,
    genes: GeneOptions,
    batch_tokens: int | None,
    device: str | torch.device | None,
    dtype: Dtype,
) -> Embedder:
    """Load the index's model, with the settings by which the index's cells were embedded; check it before any work."""
    record = index.manifest.record
    loaded, tokenizer = model_and_tokenizer(model, tokenizer, size=size, revision=revision)
    used = with_settings(tokenizer, record.get("max_length") or None, record.get("overflow"))
    embedder = Embedder(loaded, model, used, genes, int(record.get("seed", 0)), batch_tokens, device, dtype)
    if other := differences(embedder.record(), record, DECISIVE, "the index has"):
        raise ValueError(
            f"model={model} (--model) is not that of {index.folder}: {'; '.join(other)}. Distances between embeddings "
            "of different models or settings mean nothing."
        )
    return embedder


def _carry_out(stored: StoredEmbeddings, index: CellIndex, search: Search, output: Path, progress: bool) -> Queried:
    ids = index.sample_ids(search.where, _BACKGROUND, seed=0)
    summary = Summary(index.rows(ids, index.metadata)) if index.metadata else None
    twins, names = 0, np.array(short_names([each.path for each in index.manifest.files]), dtype=object)
    schema = _schema(index)
    with (
        progress_bar(progress, total=stored.num_cells, unit="cell", desc="Searching") as bar,
        WholeStream(str(output)) as file,
        pq.ParquetWriter(file, schema) as writer,
    ):
        for piece in _parts(stored, QUERIES if search.probes else MANY):
            found = search(piece.embeddings)
            there = np.isfinite(found.distances)
            rows = index.rows(found.ids[there], [CELL, FILE, ROW, *index.metadata])
            per_cell = there.sum(axis=1)
            writer.write_table(_table(piece.names, found.distances, there, rows, names, schema))
            twins += int((found.distances[:, 0] < _TWIN).sum())
            if summary is not None:
                summary.add(rows, per_cell)
            bar.update(len(per_cell))
    how = "every cell was compared" if not search.probes else f"recall of the search {search.recall:.4f}"
    parts = [
        f"{stored.num_cells} cells, {search.k} neighbours each among the {search.passing} cells of {index.folder}"
        + (f" where {search.where}" if search.where is not None else "")
        + f"; {how}.",
        *(
            [f"{twins} of the cells are in the index themselves: their first neighbour has their embedding."]
            * (twins > 0)
        ),
        *([] if summary is None else [summary.text()]),
    ]
    text = "\n\n".join(parts)
    with WholeFile(output.with_name(f"{output.name}.md")) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return Queried(stored.num_cells, search.passing, search.recall, text)


def _parts(stored: StoredEmbeddings, number: int) -> Iterator[Piece]:
    """Yield the cells, at most `number` at a time."""
    for piece in stored.pieces():
        for low in range(0, len(piece.names), number):
            yield Piece(
                piece.names.slice(low, number), piece.embeddings[low : low + number], piece.columns.slice(low, number)
            )


def _schema(index: CellIndex) -> pa.Schema:
    own: list[tuple[str, Any]] = [
        ("query", pa.string()),
        ("rank", pa.int32()),
        ("distance", pa.float32()),
        ("neighbour", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
    ]
    return pa.schema([*own, *((name, index.table.schema.field(name).type) for name in index.metadata)])


def _table(
    queries: pa.Array, distances: np.ndarray, there: np.ndarray, rows: pa.Table, names: np.ndarray, schema: pa.Schema
) -> pa.Table:
    cells, ranks = np.nonzero(there)
    own = {
        "query": queries.take(pa.array(cells)),
        "rank": pa.array(ranks + 1),
        "distance": pa.array(distances[there]),
        "neighbour": rows[CELL],
        "file": pa.array(names[rows[FILE].to_numpy()], pa.string()),
        "row": rows[ROW],
    }
    return pa.table({name: own[name] if name in own else rows[name] for name in schema.names}).cast(schema)
