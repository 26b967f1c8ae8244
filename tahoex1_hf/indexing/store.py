# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""An index on disk: a LanceDB table with a row for each cell, and a manifest that says what is in it."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from tahoex1_hf.cells.fingerprint import agrees
from tahoex1_hf.common.files import write_json
from tahoex1_hf.embedding.obs_columns import free_name
from tahoex1_hf.embedding.stored import StoredEmbeddings, check_alike

logger = logging.getLogger(__name__)

MANIFEST, TABLE, FORMAT = "index.json", "cells", 1
VECTOR, CELL, FILE, ROW, ROW_ID = "vector", "cell", "index_file", "index_row", "_rowid"
# Names that a column of cells cannot have: those of the table, and of what a query writes.
TAKEN = frozenset(
    {
        VECTOR,
        CELL,
        FILE,
        ROW,
        ROW_ID,
        "_distance",
        "query",
        "query_index",
        "rank",
        "distance",
        "neighbour",
        "file",
        "row",
    }
)


@contextmanager
def in_words(argument: str, folder: str | Path) -> Iterator[None]:
    """Turn the errors that LanceDB raises in the block into sentences.

    Args:
        argument: Argument that named the index: `index`, or `output` where it is built.
        folder: Folder of the index.

    Raises:
        OSError: For whatever LanceDB could not do: read or write files, or end in time.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        if not _is_lancedbs(error):
            raise
        way = "Look whether its disk can be read"
        if argument == "output":
            way = "Look whether its disk is full; the same command goes on with what is there"
        way += ". If files of the index are missing or damaged, remove the folder, and build it anew."
        if "timeout" in str(error).lower():
            way = "The disk or the machine is too busy: run the same command again, or with exact=True (--exact)."
        raise OSError(f"{argument}={folder} (--{argument}): LanceDB failed: {_told(error)}. {way}") from error


def _is_lancedbs(error: BaseException) -> bool:
    """Return whether LanceDB has raised an error, and not what it calls."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__")).startswith("lancedb.")


def _told(error: BaseException) -> str:
    """Return the first line of LanceDB's error, without the places in its sources."""
    return re.sub(r",? /\S+:\d+:\d+", "", (str(error).splitlines() or [""])[0]).rstrip(". ")


@dataclass
class IndexedFile:
    """A file whose cells are in the index.

    Attributes:
        path: Path, as it was given.
        fingerprint: Fingerprint of its content.
        num_cells: Number of its cells.
    """

    path: str
    fingerprint: str
    num_cells: int


@dataclass
class Manifest:
    """What is in an index.

    Attributes:
        key: Slot of `obsm`, or name of the column of embeddings.
        record: Record of how the embeddings were made.
        width: Number of dimensions.
        columns: Column of the cells -> its name in the table.
        files: Files, in the order of their numbers.
        complete: Whether all cells of all files are in the table, and in its search index.
        partitions: Number of parts of the search index; 0 where there is none, and every cell is compared.
        probes: Number of parts that a search reads.
        recall: Share of the true neighbours that a search finds, measured on a sample; None before it is complete.
    """

    key: str
    record: dict[str, Any]
    width: int
    columns: dict[str, str]
    files: list[IndexedFile] = field(default_factory=list)
    complete: bool = False
    partitions: int = 0
    probes: int = 0
    recall: float | None = None

    @property
    def num_cells(self) -> int:
        """Number of cells of all files."""
        return sum(each.num_cells for each in self.files)

    def place(self, source: StoredEmbeddings, fingerprint: str) -> int:
        """Return the number of a file, which is added if it is new.

        Raises:
            ValueError: If a file of that path is there with other content.
        """
        for number, each in enumerate(self.files):
            if agrees(each.fingerprint, fingerprint):
                return number
            if Path(each.path).resolve() == Path(source.path).resolve():
                raise ValueError(
                    f"{source.path} has changed since its cells went into the index, which would hold them twice: "
                    "build a new index."
                )
        self.files.append(IndexedFile(source.path, fingerprint, source.num_cells))
        return len(self.files) - 1


class CellIndex:
    """An index on disk.

    Args:
        folder: Folder of the index.
        manifest: What is in it.

    Attributes:
        table: LanceDB table; None before any cell is in it.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        # On machines with one or two processors, its work and what waits for it would share a thread, and stand still
        # (github.com/lancedb/lancedb/issues/3568); the variable is read when LanceDB first computes.
        os.environ.setdefault("LANCE_CPU_THREADS", str(max(4, os.cpu_count() or 1)))
        import lancedb

        self.folder, self.manifest = folder, manifest
        self._database = lancedb.connect(str(folder))
        self.table: Any = self._database.open_table(TABLE) if (folder / f"{TABLE}.lance").exists() else None

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open an index.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If it holds no index.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"index={folder} does not exist: make it by tahoex1 index build.")
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"index={folder} holds no index of ours (no {MANIFEST}): make it by tahoex1 index build.")
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: its format is not {FORMAT}; another version of this package wrote it.")
        return cls(folder, Manifest(**{**found, "files": [IndexedFile(**each) for each in found["files"]]}))

    def write_manifest(self) -> None:
        """Write the manifest, which appears whole or not at all."""
        write_json(self.folder / MANIFEST, {"format": FORMAT, **asdict(self.manifest)})

    def check_complete(self) -> None:
        """Raise ValueError if a run that adds cells was stopped, or the table lacks cells."""
        there = 0 if self.table is None else self.table.count_rows()
        if not self.manifest.complete or there != self.manifest.num_cells:
            raise ValueError(
                f"index={self.folder} is unfinished, {there} of {self.manifest.num_cells} cells: run the tahoex1 "
                "index build that was stopped again."
            )

    def make_table(self, columns: Mapping[str, pa.DataType]) -> None:
        """Make the table, without cells."""
        fields = [
            pa.field(VECTOR, pa.list_(pa.float32(), self.manifest.width)),
            pa.field(CELL, pa.string()),
            pa.field(FILE, pa.int32()),
            pa.field(ROW, pa.int64()),
            *(pa.field(self.manifest.columns[name], kind) for name, kind in columns.items()),
        ]
        self.table = self._database.create_table(TABLE, schema=pa.schema(fields))

    @property
    def metadata(self) -> list[str]:
        """Names of the cells' columns in the table."""
        return list(self.manifest.columns.values())

    def done(self, number: int) -> int:
        """Return how many cells of a file are in the table."""
        return int(self.table.count_rows(f"{FILE} = {number}"))

    def count(self, where: str | None) -> int:
        """Return the number of cells that pass a filter.

        Raises:
            ValueError: If the filter cannot be read, or no cell passes it.
        """
        if where is None:
            return int(self.table.count_rows())
        try:
            number = int(self.table.count_rows(where))
        except (ValueError, RuntimeError) as error:
            self.table.count_rows(f"{ROW} IS NULL")  # fails if it is not the filter that cannot be read
            raise ValueError(
                f"where={where} (--where): {_told(error)}. The columns are {', '.join([CELL, *self.metadata])}; texts "
                "stand between single quotes, names with blanks between backticks."
            ) from error
        if not number:
            raise ValueError(f"where={where} (--where): no cell of {self.folder} passes it.")
        return number

    def rows(self, ids: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return columns of rows in the order of their ids, which may repeat."""
        unique, places = np.unique(ids, return_inverse=True)
        found = self.table.take_row_ids(unique.tolist()).select([*columns]).with_row_id().to_arrow()
        found = found.take(pa.array(np.argsort(found[ROW_ID].to_numpy(), kind="stable")))
        return found.select([*columns]).take(pa.array(places))

    def sample_ids(self, where: str | None, number: int, seed: int) -> np.ndarray:
        """Return the row ids of a random sample of the cells that pass a filter, rising."""
        query = self.table.search()
        if where is not None:
            query = query.where(where)
        random = np.random.default_rng(seed)
        ids, keys = np.zeros(0, dtype=np.uint64), np.zeros(0)
        for batch in query.select([ROW]).with_row_id(True).to_batches(2**18):
            ids = np.concatenate([ids, batch[ROW_ID].to_numpy()])
            keys = np.concatenate([keys, random.random(len(batch))])
            kept = np.argsort(keys, kind="stable")[:number]
            ids, keys = ids[kept], keys[kept]
        return np.sort(ids)


def table_names(columns: Sequence[str]) -> dict[str, str]:
    """Return the name in the table of each column of cells; LanceDB takes no dots, and some names are taken."""
    names: dict[str, str] = {}
    for name in columns:
        names[name] = free_name(name.replace(".", "_"), {*TAKEN, *names.values()})
    return names


def check_sources(sources: Sequence[StoredEmbeddings], manifest: Manifest | None) -> None:
    """Check that embeddings go together, and with the index, if there is one.

    Raises:
        ValueError: If another model, other settings or another number of dimensions made them.
    """
    first = sources[0]
    record, width = (first.record, first.width) if manifest is None else (manifest.record, manifest.width)
    for each in sources:
        check_alike(each.path, each.record, each.width, record, width)
