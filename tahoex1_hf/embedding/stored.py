# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embeddings that `tahoex1 embed` has written, read piece by piece, with the cells' columns and their record.

They are in a `.parquet` table (one column of lists, or a column for each dimension), an `.h5ad` file or a `.zarr`
store.
"""

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tahoex1_hf.cells.fingerprint import content_fingerprint
from tahoex1_hf.cells.opening import local_kind
from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.cells.stored_slot import open_slot
from tahoex1_hf.common.reading import reading
from tahoex1_hf.embedding.obs_columns import as_arrow, conformed
from tahoex1_hf.inference.provenance import provenance_key

logger = logging.getLogger(__name__)

PIECE_VALUES = 2**22  # values of a piece, 16 MB
_LOOKED_AT = 1000  # cells by which the types of columns of obs are told
# Settings that decide where a cell lies; embeddings with others cannot be compared.
DECISIVE = ("model", "revision", "value_encoding", "max_length", "overflow", "hidden_layer", "normalized")
# Settings that move it a little.
_SLIGHT = ("dtype", "draws", "seed")


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive cells.

    Attributes:
        names: Names of the cells, `(cells,)`.
        embeddings: Embeddings, `(cells, width)` float32.
        columns: Columns of the cells.
    """

    names: pa.Array
    embeddings: np.ndarray
    columns: pa.Table


class StoredEmbeddings(ABC):
    """Embeddings in a file.

    Attributes:
        path: Path of the file.
        key: Slot of `obsm`, or name of the column of embeddings.
        record: Record of how they were made.
        num_cells: Number of cells.
        width: Number of dimensions.
        columns: Column -> type of its values.
    """

    path: str
    key: str
    record: dict[str, Any]
    num_cells: int
    width: int
    columns: dict[str, pa.DataType]

    def fingerprint(self) -> str:
        """Return a text that changes with the file's content."""
        return content_fingerprint(self.path)

    @property
    def piece_cells(self) -> int:
        """Number of cells of a piece."""
        return max(1, PIECE_VALUES // self.width)

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Yield the cells from number `start` on.

        Raises:
            ValueError: If a value is NaN or infinite, or the file is damaged.
        """
        with reading(self.path):
            for piece in self._pieces(start):
                finite = np.isfinite(piece.embeddings).all(axis=1)
                if not finite.all():
                    name = piece.names[int(np.argmin(finite))].as_py()
                    raise ValueError(f"{self.path}: {self.key} of cell {name!r} has NaN or infinite values.")
                yield piece

    @abstractmethod
    def _pieces(self, start: int) -> Iterator[Piece]:
        """Yield the cells from number `start` on, unchecked."""


class _Table(StoredEmbeddings):
    """A Parquet table."""

    def __init__(self, path: str, key: str):
        self.path, self.key = path, key
        with pq.ParquetFile(path) as file:
            schema, self.num_cells = file.schema_arrow, file.metadata.num_rows
            stored = (file.metadata.metadata or {}).get(provenance_key(key).encode())
        wide = [name for name in schema.names if re.fullmatch(re.escape(key) + r"_\d+", name)]
        if key in schema.names:
            kind = schema.field(key).type
            self.embedding = [key]
            if not pa.types.is_fixed_size_list(kind):
                raise BadInput(f"its column {key} holds {kind}, not lists of one length.")
            self.width = kind.list_size
        elif wide:
            self.embedding, self.width = [f"{key}_{number}" for number in range(len(wide))], len(wide)
            if set(wide) != set(self.embedding):
                raise BadInput(f"its columns {key}_0 to {key}_{len(wide) - 1} are not all there.")
        else:
            raise BadInput(f"it has no column {key} or {key}_0; there are {', '.join(schema.names[:20])}.")
        if "cell" not in schema.names:
            raise BadInput("it has no column cell with the names of the cells.")
        self.record = _checked_record(
            None if stored is None else json.loads(stored), f"metadata {provenance_key(key)}"
        )
        self.columns = {}
        for field in schema:
            if field.name not in ("cell", *self.embedding):
                kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
                if pa.types.is_nested(kind):
                    logger.warning("%s: the column %s, of lists, is left out.", path, field.name)
                else:
                    self.columns[field.name] = pa.string() if pa.types.is_large_string(kind) else kind

    def _pieces(self, start: int) -> Iterator[Piece]:
        names = ["cell", *self.columns, *self.embedding]
        with pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start >= rows:
                    start -= rows
                    continue
                for batch in file.iter_batches(self.piece_cells, row_groups=[group], columns=names):
                    skipped, start = min(start, len(batch)), max(0, start - len(batch))
                    if skipped < len(batch):
                        yield self._piece(pa.Table.from_batches([batch.slice(skipped)]))

    def _piece(self, table: pa.Table) -> Piece:
        if len(self.embedding) == 1 and self.embedding[0] == self.key:
            vectors = table[self.key].combine_chunks()
            if vectors.null_count:
                raise BadInput(f"{self.key} is missing for some cells.")
            embeddings = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.width)
        else:
            embeddings = np.column_stack([table[name].to_numpy() for name in self.embedding])
        columns = pa.table(dict(zip(self.columns, conformed(table, self.columns, len(table)), strict=True)))
        return Piece(
            table["cell"].combine_chunks().cast(pa.string()), np.ascontiguousarray(embeddings, np.float32), columns
        )


class _Store(StoredEmbeddings):
    """An `.h5ad` file or a `.zarr` store."""

    def __init__(self, path: str, key: str):
        record = provenance_key(key)
        self.path, self.key = path, key
        self.slot = open_slot(path, key, record)
        self.num_cells, self.width = self.slot.num_cells, self.slot.width
        self.record = _checked_record(self.slot.record, f'uns["{record}"]')
        ((_, _, seen),) = self.slot.pieces([(0, min(_LOOKED_AT, self.num_cells))])
        self.columns = {
            field.name: pa.string() if pa.types.is_null(field.type) else field.type for field in as_arrow(seen).schema
        }

    def _pieces(self, start: int) -> Iterator[Piece]:
        lows = range(start, self.num_cells, self.piece_cells)
        bounds = ((low, min(low + self.piece_cells, self.num_cells)) for low in lows)
        for names, values, read in self.slot.pieces(bounds):
            columns = conformed(as_arrow(read), self.columns, len(names))
            yield Piece(pa.array(names, pa.string()), values, pa.table(dict(zip(self.columns, columns, strict=True))))


def open_embeddings(path: str | Path, key: str) -> StoredEmbeddings:
    """Open embeddings that `tahoex1 embed` has written; only their record and the names of columns are read.

    Args:
        path: `.parquet` table, `.h5ad` file or `.zarr` store.
        key: Slot of `obsm`, or name of the column of embeddings.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it holds no such embeddings, or no record of how they were made.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    kind = "table" if path.suffix == ".parquet" else local_kind(path)
    if kind not in ("table", "anndata"):
        raise ValueError(f"{path}: embeddings are read from .parquet, .h5ad and .zarr, as tahoex1 embed writes them.")
    with reading(path):
        try:
            return (_Table if kind == "table" else _Store)(str(path), key)
        except BadInput as error:
            raise ValueError(f"{path}: {error}") from error


def _checked_record(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, Mapping) or "model" not in record:
        raise BadInput(
            f"it does not say in its {place} how its embeddings were made, so it cannot be known with what they can "
            "be compared: write them with tahoex1 embed or embed_anndata."
        )
    return {str(name): plain(value) for name, value in record.items()}


def plain(value: Any) -> Any:
    """Return a value of a record as JSON can hold it, whichever format it was read from."""
    if isinstance(value, np.ndarray):
        return [plain(each) for each in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    return value.decode() if isinstance(value, bytes) else value


def differences(
    record: Mapping[str, Any], wanted: Mapping[str, Any], names: tuple[str, ...], have: str = "the others have"
) -> list[str]:
    """Return what in a record is other than wanted, a phrase for each setting that is wanted."""
    return [
        f"{name} {record.get(name, 'not recorded')!s} where {have} {wanted[name]!s}"
        for name in names
        if name in wanted and str(plain(record.get(name))) != str(plain(wanted[name]))
    ]


def check_alike(where: str, record: Mapping[str, Any], width: int, like: Mapping[str, Any], like_width: int) -> None:
    """Check that embeddings can be compared with others.

    Args:
        where: Name of the embeddings, for messages.
        record: Record of how they were made.
        width: Number of their dimensions.
        like: Record of the others.
        like_width: Number of the others' dimensions.

    Raises:
        ValueError: If another model, other settings or another number of dimensions made them.
    """
    if other := differences(record, like, DECISIVE):
        raise ValueError(
            f"{where} was made otherwise ({'; '.join(other)}): distances between embeddings of different models or "
            "settings mean nothing."
        )
    if width != like_width:
        raise ValueError(f"{where} has {width} dimensions, and the others have {like_width}: they cannot be compared.")
    if slight := differences(record, like, _SLIGHT):
        logger.warning("%s was made a little otherwise, which moves cells slightly: %s.", where, "; ".join(slight))
