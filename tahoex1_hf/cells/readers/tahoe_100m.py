# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Parquet and Arrow files in the format of the Hub dataset `tahoebio/Tahoe-100M`, local or remote.

Each row is a cell. Its columns are `genes` (numbers from the dataset's gene table), `expressions` (their counts), both
of which start with `<cls>`, and metadata.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tahoex1_hf.cells.genes import GeneOptions, matched_genes
from tahoex1_hf.cells.readers.base import CHUNK_ELEMENTS, INDEX, BadInput, CellInput, token_dtype
from tahoex1_hf.cells.readers.tables import SUFFIXES, find_files, open_table, table_fingerprint
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch, GeneRows, as_counts, count_problem, merge_repeats

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

GENES, COUNTS, BARCODE = "genes", "expressions", "BARCODE_SUB_LIB_ID"

_CLS_TOKEN, _CLS_VALUE = 1, -2


def find_tables(path: str) -> list[str]:
    """Return the paths or URLs (`hf://`, `s3://`) of the files that a path stands for, the same online and offline.

    Raises:
        BadInput: If there are no such files.
    """
    found = find_files(path)
    if not found:
        raise BadInput(f"{path} has no file that ends in {' or '.join(SUFFIXES)}: check the path.")
    return sorted(found)


class Tahoe100MInput(CellInput):
    """A Parquet or Arrow file with the columns of Tahoe-100M. The name of a cell is its `BARCODE_SUB_LIB_ID`.

    Args:
        path: Path or URL of the file.
        tokenizer: Tokenizer whose vocabulary decides which genes are known.
        options: Options with the gene table, `gene_metadata`.
        spool: Folder for copies of remote Arrow files; None if there is none.
    """

    genes: GeneMatch

    def __init__(
        self,
        path: str,
        tokenizer: "TahoeX1Tokenizer",
        options: GeneOptions,
        spool: Path | None,
    ):
        self.path, self.tokenizer, self.options, self._spool = path, tokenizer, options, spool
        self.table = read_gene_table(tokenizer, options.gene_metadata, options.min_known_genes, spool)
        self.genes = self.table.match
        with open_table(path, spool) as reader:
            _check_schema(reader.schema)
            self.num_cells, self._columns = reader.num_cells, list(reader.schema.names)
        if not self.num_cells:
            raise BadInput("it has no cells: leave the file out.")
        self.fingerprint = table_fingerprint(path)

    def fingerprint_now(self) -> str:
        """Return the fingerprint of the present file."""
        return table_fingerprint(self.path)

    @property
    def obs_columns(self) -> list[str]:
        """Columns of the file other than genes and counts."""
        return [name for name in self._columns if name not in (GENES, COUNTS)]

    def column(self, name: str) -> "pd.Series":
        """Read a column of metadata."""
        import pandas as pd

        wanted = self._wanted([name])
        with open_table(self.path, self._spool) as reader:
            parts = [_metadata(batch, [name])[name] for batch in reader.batches(0, self.num_cells, wanted)]
        return pd.concat(parts, ignore_index=True)

    def _wanted(self, columns: Sequence[str]) -> list[str]:
        wanted = list(dict.fromkeys(BARCODE if name == INDEX else name for name in columns))
        missing = [name for name in wanted if name not in self._columns]
        if missing:
            raise BadInput(f"it has no columns {missing}, only {self._columns}.")
        return wanted

    def rows(
        self, start: int, stop: int, columns: Sequence[str] = (), elements: int | None = None
    ) -> Iterator[GeneRows]:
        """Read cells; only the necessary row groups and columns are read."""
        most = CHUNK_ELEMENTS if elements is None else elements
        if not 0 <= start <= stop <= self.num_cells:
            raise ValueError(f"cells {start} to {stop} of a file with {self.num_cells}.")
        wanted = list(dict.fromkeys([GENES, COUNTS, *self._wanted(columns)]))
        first = start
        with open_table(self.path, self._spool) as reader:
            for batch in reader.batches(start, stop, wanted, most):
                for piece in _bounded(batch, most):
                    yield self._rows_of(piece, first, columns)
                    first += piece.num_rows
        if first < stop:
            raise BadInput(f"it ends after {first} cells: it has changed, or it is damaged.")

    def _rows_of(self, batch: "pa.RecordBatch", first_cell: int, columns: Sequence[str]) -> GeneRows:
        tokens, counts, offsets = _without_cls(batch, first_cell)
        ours = self.table.translate(tokens, offsets, first_cell)
        problem, _ = count_problem(GeneRows(tokens, counts, offsets), first_cell, self.table.names)
        if problem is not None:
            raise BadInput(problem)
        known = ours >= 0
        unknown = float(counts[~known].sum(dtype=np.float64))
        rows = GeneRows(ours, counts, offsets).select(known & (counts > 0))
        rows = merge_repeats(rows) if _may_repeat(rows) else rows
        tokens = rows.tokens.astype(token_dtype(self.tokenizer))
        return GeneRows(tokens, rows.counts, rows.offsets, first_cell, _metadata(batch, columns), unknown)


# The gene table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneTable:
    """The genes of a dataset: number in the dataset -> token of the vocabulary.

    Attributes:
        names: Number -> Ensembl id.
        tokens: Number -> token; -1 if the gene is not in the vocabulary, -2 if the number is not in the table.
        match: Result of the look-up of the table's genes.
    """

    names: dict[int, str]
    tokens: np.ndarray
    match: GeneMatch

    @classmethod
    def make(cls, numbers: list[int], names: list[str], match: GeneMatch) -> "GeneTable":
        """Make a table from numbers, their Ensembl ids, and the tokens of these ids."""
        tokens = np.full(max(numbers) + 1, -2, dtype=np.int64)
        tokens[numbers] = match.token_ids
        return cls(dict(zip(numbers, names, strict=True)), tokens, match)

    def translate(self, numbers: np.ndarray, offsets: np.ndarray, first_cell: int) -> np.ndarray:
        """Return the tokens of gene numbers; -1 for genes that are not in the vocabulary."""
        inside = (numbers >= 0) & (numbers < len(self.tokens))
        tokens = np.where(inside, self.tokens[np.where(inside, numbers, 0)], -2)
        wrong = np.flatnonzero(tokens == -2)
        if len(wrong):
            cell = first_cell + int(np.searchsorted(offsets, wrong[0], side="right")) - 1
            some = np.unique(numbers[wrong])[:5].tolist()
            raise BadInput(
                f"{GENES}: cell {cell} has the number {numbers[wrong[0]]}, which is not in gene_metadata (missing "
                f"numbers: {some}). Name the gene table that belongs to the file."
            )
        return tokens


@lru_cache(maxsize=4)
def read_gene_table(
    tokenizer: "TahoeX1Tokenizer", gene_metadata: str, min_known_genes: float | None, spool: Path | None
) -> GeneTable:
    """Read the gene table of a dataset and match it with the vocabulary, once for thousands of files of the dataset.

    Raises:
        BadInput: If the file is not a gene table, or its genes are not in the vocabulary.
    """
    try:
        with open_table(gene_metadata, spool) as reader:
            lacks = [name for name in ("token_id", "ensembl_id") if name not in reader.schema.names]
            if lacks:
                raise BadInput(f"it has no columns {lacks}, only {reader.schema.names}.")
            batches = list(reader.batches(0, reader.num_cells, ["token_id", "ensembl_id"]))
    except BadInput as error:
        raise BadInput(f"gene_metadata={gene_metadata!r}: {error}") from None
    numbers = [number for batch in batches for number in batch["token_id"].to_pylist()]
    names = [name for batch in batches for name in batch["ensembl_id"].to_pylist()]
    whole = all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers)
    named = all(isinstance(name, str) for name in names)
    if not numbers or not whole or not named or len(set(numbers)) < len(numbers):
        raise BadInput(
            f"gene_metadata={gene_metadata!r} needs an ensembl_id for each token_id, a whole number that occurs once."
        )
    return GeneTable.make(
        numbers, names, matched_genes(tokenizer, names, GeneOptions(min_known_genes=min_known_genes))
    )


# Rows of the files ------------------------------------------------------------------------------------


def _check_schema(schema: "pa.Schema") -> None:
    import pyarrow as pa

    for name, wanted in ((GENES, pa.types.is_integer), (COUNTS, _is_number)):
        if name not in schema.names:
            raise BadInput(f"it has no column {name!r}, only {schema.names}: it is not in the layout of Tahoe-100M.")
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not wanted(kind.value_type):
            items = "integers" if name == GENES else "numbers"
            raise BadInput(f"its column {name!r} is {kind}, not a list of {items}.")


def _is_number(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _bounded(batch: "pa.RecordBatch", most: int) -> Iterator["pa.RecordBatch"]:
    """Cut a batch into pieces of at most `most` genes, or of a single cell with more genes."""
    import pyarrow.compute as pc

    ends = np.cumsum(
        pc.fill_null(pc.list_value_length(batch[GENES]), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    first = 0
    while first < batch.num_rows:
        before = int(ends[first - 1]) if first else 0
        upto = int(np.searchsorted(ends, before + most, side="right"))
        upto = max(upto, first + 1)
        yield batch.slice(first, upto - first)
        first = upto


def _without_cls(batch: "pa.RecordBatch", first_cell: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gene numbers, counts and offsets of all cells, without the pair of `<cls>` at the start of each."""
    import pyarrow.compute as pc

    lengths, flat = {}, {}
    for name in (GENES, COUNTS):
        values = batch[name].flatten()
        if batch[name].null_count or values.null_count:
            raise BadInput(f"{name}: cells {first_cell} to {first_cell + batch.num_rows - 1} have missing values.")
        lengths[name] = pc.list_value_length(batch[name]).to_numpy(zero_copy_only=False).astype(np.int64)
        flat[name] = values.to_numpy(zero_copy_only=False)
    sizes = lengths[GENES]
    uneven = np.flatnonzero(sizes != lengths[COUNTS])
    if len(uneven):
        cell = uneven[0]
        raise BadInput(f"cell {first_cell + cell} has {sizes[cell]} {GENES}, but {lengths[COUNTS][cell]} {COUNTS}.")
    starts = np.cumsum(sizes) - sizes
    wrong = sizes == 0
    places = starts[~wrong]
    wrong[~wrong] = (flat[GENES][places] != _CLS_TOKEN) | (flat[COUNTS][places] != _CLS_VALUE)
    if wrong.any():
        cell = int(np.flatnonzero(wrong)[0])
        pair = [flat[name][starts[cell]].item() for name in (GENES, COUNTS)] if sizes[cell] else "nothing"
        raise BadInput(
            f"cell {first_cell + cell} starts with {pair}, not with <cls> ({_CLS_TOKEN}, {_CLS_VALUE}): it is not "
            "in the layout of Tahoe-100M."
        )
    keep = np.ones(len(flat[GENES]), dtype=bool)
    keep[starts] = False
    offsets = np.concatenate([[0], np.cumsum(sizes - 1)])
    return flat[GENES][keep].astype(np.int64), as_counts(flat[COUNTS][keep]), offsets


def _may_repeat(rows: GeneRows) -> bool:
    """Return False if the tokens of every cell are in rising order, so that none occurs twice; this saves a sort."""
    falls = np.flatnonzero(np.diff(rows.tokens) <= 0) + 1
    return not np.isin(falls, rows.offsets).all()


def _metadata(batch: "pa.RecordBatch", columns: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    values = {name: batch[BARCODE if name == INDEX else name].to_pandas() for name in columns}
    return pd.DataFrame(values, index=pd.RangeIndex(batch.num_rows), columns=list(columns))
