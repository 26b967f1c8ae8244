# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Build an index from embeddings, or add more of them to it; a run that was stopped is taken up where it was.

What has been done is read from the table itself: cells are added in the order of their file, and the table either has
all cells of an addition or none. So no kill can lose a cell or add one twice.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.embedding.obs_columns import common_types, conformed
from tahoex1_hf.embedding.stored import Piece, StoredEmbeddings, open_embeddings
from tahoex1_hf.indexing.searching import SAMPLE, find_probes
from tahoex1_hf.indexing.store import (
    CELL,
    FILE,
    MANIFEST,
    ROW,
    VECTOR,
    CellIndex,
    Manifest,
    check_sources,
    in_words,
    table_names,
)
from tahoex1_hf.inference.provenance import check_key

logger = logging.getLogger(__name__)

NEIGHBOURS = 50  # for which recall is measured, and which a query asks for by default
RECALL = 0.98
_ADDED = 2**18  # cells of an addition, after which a run that is stopped goes on
_LEAST = 20_000  # cells from which on there is a search index; fewer are compared one by one in no time
_PART = 4096  # cells of a part of the search index
_MOST_PARTS = 2**14
_GROWN = 1.5  # times its cells from which on a search index is made anew
_ITERATIONS, _PER_PART = 15, 64  # of k-means, by which the parts are found, and the cells of each part that it reads


@dataclass(frozen=True)
class Built:
    """What came of building an index.

    Attributes:
        num_cells: Number of cells of the index.
        added: Number of cells that this run has added.
        recall: Share of the true 50 nearest cells that a search finds, measured on a sample of the index's cells.
        partitions: Number of parts of the search index; 0 where every cell is compared.
        probes: Number of parts that a search reads.
    """

    num_cells: int
    added: int
    recall: float
    partitions: int
    probes: int

    def __str__(self) -> str:
        how = "every cell is compared"
        if self.partitions:
            how = f"{self.probes} of {self.partitions} parts read; measured against exact search on {SAMPLE} cells"
        recall = f"Recall of {NEIGHBOURS} neighbours: {self.recall:.4f} ({how})."
        return f"{self.num_cells} cells, {self.added} of them new. {recall}"


def build_index(
    embeddings: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    key: str = "X_tahoe_x1",
    recall: float = RECALL,
    progress: bool = True,
) -> Built:
    """Build an index of embeddings on disk, or add embeddings to one.

    The same call resumes a run that was stopped in any way. Files that are in the index already are skipped.

    Args:
        embeddings: `.parquet` tables, `.h5ad` files and `.zarr` stores that `embed_files` has written; their columns
            of obs can be shown and filtered by. An index takes the columns of the files with which it is made.
        output: Folder of the index.
        key: Slot of `obsm`, or name of the column of embeddings.
        recall: Least share of the true neighbours that a search must find; the number of parts of the search index
            that a search reads is doubled until it does.
        progress: Whether to show a progress bar.

    Returns:
        Number of cells, and the recall.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If embeddings cannot be read or compared with one another or with the index.
        OSError: If the index cannot be read or written.
    """
    check_key(key)
    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall} (--recall): pass a share above 0 and at most 1, such as {RECALL}.")
    output = Path(output)
    if not output.parent.is_dir():
        raise ValueError(f"The output's folder {output.parent} does not exist.")
    paths = [embeddings] if isinstance(embeddings, (str, Path)) else list(embeddings)
    sources = [open_embeddings(path, key) for path in paths]
    if not sum(each.num_cells for each in sources):
        raise ValueError(f"{', '.join(map(str, paths))} holds no cells.")
    if output.exists() and not (output / MANIFEST).exists() and any(path.name != ".lock" for path in output.iterdir()):
        raise ValueError(f"output={output} is a folder that holds other files: name a new one.")
    with in_words("output", output):
        old = CellIndex.open(output).manifest if (output / MANIFEST).exists() else None
        if old is not None and old.key != key:
            raise ValueError(f"key={key} (--key): {output} was built from {old.key}.")
        check_sources(sources, old)
        output.mkdir(exist_ok=True)
        with RunLock(output / ".lock", output, "output"):
            return _carry_out(output, sources, key, recall, progress)


def _carry_out(output: Path, sources: Sequence[StoredEmbeddings], key: str, recall: float, progress: bool) -> Built:
    types = common_types([pa.schema(list(each.columns.items())) for each in sources], _names(sources))
    if (output / MANIFEST).exists():
        index = CellIndex.open(output)
    else:
        first = sources[0]
        index = CellIndex(output, Manifest(key, first.record, first.width, table_names(list(types))))
    manifest = index.manifest
    before, complete = len(manifest.files), manifest.complete
    numbers = {manifest.place(each, each.fingerprint()): each for each in sources}
    if index.table is not None:
        _check_unfinished(index, numbers, before)
    manifest.complete = complete and len(manifest.files) == before
    index.write_manifest()  # before the table: a folder with a manifest is ours
    if index.table is None:
        index.make_table({name: types.get(name, pa.string()) for name in manifest.columns})
    added = 0
    total = sum(each.num_cells for number, each in numbers.items() if number >= before or not complete)
    with progress_bar(progress, total=total, unit="cell", desc="Adding") as bar:
        for number, source in numbers.items():
            done = index.done(number)
            if done == source.num_cells:
                logger.info("%s: its %d cells are in the index already.", source.path, done)
                continue
            missing = sorted(set(source.columns) - set(manifest.columns))
            if missing:
                logger.warning("%s: the index has no column %s, which is left out.", source.path, ", ".join(missing))
            bar.update(done)
            _add(index, number, source, done, bar)
            added += source.num_cells - done
    if not manifest.complete:
        _make_searchable(index, recall)
        manifest.complete = True
        index.write_manifest()
    return Built(manifest.num_cells, added, manifest.recall or 0.0, manifest.partitions, manifest.probes)


def _names(sources: Sequence[StoredEmbeddings]) -> list[str]:
    return list(dict.fromkeys(name for each in sources for name in each.columns))


def _check_unfinished(index: CellIndex, numbers: dict[int, StoredEmbeddings], before: int) -> None:
    """Raise ValueError if a file that an earlier run has begun is not named."""
    for number, each in enumerate(index.manifest.files[:before]):
        if number not in numbers and (done := index.done(number)) < each.num_cells:
            raise ValueError(
                f"output={index.folder}: a run was stopped after {done} of the {each.num_cells} cells of {each.path}: "
                "name it as well."
            )


class _Batches:
    """Batches of rows of the table; an error while they are made is kept, since LanceDB does not hand it on."""

    def __init__(self, index: CellIndex, number: int, first: int, pieces: Iterator[Piece], bar: Any):
        self.index, self.number, self.next, self.pieces, self.bar = index, number, first, pieces, bar
        self.schema: pa.Schema = index.table.schema
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            for piece in self.pieces:
                yield self._batch(piece)
                self.bar.update(len(piece.names))
        except Exception as error:
            self.error = error
            raise

    def _batch(self, piece: Piece) -> pa.RecordBatch:
        number, names = len(piece.names), self.index.manifest.columns
        types = {name: self.schema.field(column).type for name, column in names.items()}
        values = {
            VECTOR: pa.FixedSizeListArray.from_arrays(pa.array(piece.embeddings.ravel()), self.index.manifest.width),
            CELL: piece.names,
            FILE: pa.array(np.full(number, self.number, dtype=np.int32)),
            ROW: pa.array(np.arange(self.next, self.next + number)),
            **dict(zip(names.values(), conformed(piece.columns, types, number), strict=True)),
        }
        self.next += number
        return pa.record_batch([values[name] for name in self.schema.names], schema=self.schema)


def _add(index: CellIndex, number: int, source: StoredEmbeddings, done: int, bar: Any) -> None:
    """Add the cells of a file from number `done` on."""
    pieces, at_a_time = source.pieces(done), max(1, _ADDED // source.piece_cells)
    while (first := next(pieces, None)) is not None:
        batches = _Batches(index, number, done, chain([first], islice(pieces, at_a_time - 1)), bar)
        try:
            index.table.add(pa.RecordBatchReader.from_batches(batches.schema, batches))
        except Exception as error:
            if batches.error is not None and batches.error is not error:
                raise batches.error from None
            raise
        done = batches.next


def _make_searchable(index: CellIndex, recall: float) -> None:
    """Make the search index or add new cells to it, and find how many of its parts a search must read."""
    from lancedb.index import IvfSq

    manifest, table = index.manifest, index.table
    stats = table.index_stats(f"{VECTOR}_idx") if table.list_indices() else None
    if manifest.num_cells < _LEAST:
        manifest.partitions, manifest.probes, manifest.recall = 0, 0, 1.0
        return
    if stats is None or not manifest.partitions or manifest.num_cells > _GROWN * stats.num_indexed_rows:
        manifest.partitions = max(1, min(manifest.num_cells // _PART, _MOST_PARTS))
        logger.info("Making the search index: %d cells, %d parts.", manifest.num_cells, manifest.partitions)
        table.create_index(
            VECTOR,
            config=IvfSq(
                distance_type="l2",
                num_partitions=manifest.partitions,
                max_iterations=_ITERATIONS,
                sample_rate=_PER_PART,
            ),
            replace=True,
        )
    elif stats.num_unindexed_rows:
        table.optimize()  # sorts new cells into the parts, of which it splits large ones and joins small ones
        manifest.partitions = max(manifest.partitions, manifest.num_cells // _PART)
    ids = index.sample_ids(None, SAMPLE, seed=0)
    vectors = index.rows(ids, [VECTOR])[VECTOR].combine_chunks()
    queries = np.array(vectors.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(ids), -1)
    # Each of these cells finds itself, which is no merit: it is one more neighbour than is asked for.
    manifest.probes, manifest.recall = find_probes(index, queries, NEIGHBOURS + 1, recall)
