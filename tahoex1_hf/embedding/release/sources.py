# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the public cells and embeddings, and bring some cells together with their public embeddings.

Both lie in Parquet files with a row per cell and the same key. Keys are read alone, file by file; genes and embeddings
are read only of the parts of files in which cells were chosen, and of these only the chosen rows are kept. Which cells
are chosen follows from the keys and the seed.
"""

import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.genes import TAHOE_100M_GENES
from tahoex1_hf.cells.readers.tables import SUFFIXES, find_files, open_table
from tahoex1_hf.cells.readers.tahoe_100m import BARCODE, COUNTS, GENES
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.common.reading import in_short, reading

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

logger = logging.getLogger(__name__)

MODEL = "tahoebio/Tahoe-x1"
CELLS, EMBEDDINGS = "tahoebio/Tahoe-100M", "tahoebio/Tahoe-x1-embeddings"
COLUMN = "mosaicfm-3b-prod-cont-MFMv2"
METADATA = ("cell_line_id", "cell_line", "sample", "plate")  # kept of the cells where it is there

_FILES_A_ROUND = 8  # files of cells whose keys are looked for at a time, evenly spaced over all
_ROW_GROUPS = 32  # least number of row groups of embeddings that cells are taken from, where there are as many


@dataclass(frozen=True)
class PublicData:
    """Where the public cells and embeddings are.

    Attributes:
        cells: Hub dataset in the form of Tahoe-100M, or a folder, file or address of its Parquet files.
        embeddings: The same of the embeddings.
        column: Column of the embeddings.
        key: Column that names the cell in both.
        gene_metadata: Gene table of the cells.
        drugs: Column of the cells that holds the drugs.
    """

    cells: str = CELLS
    embeddings: str = EMBEDDINGS
    column: str = COLUMN
    key: str = BARCODE
    gene_metadata: str = TAHOE_100M_GENES
    drugs: str = "drug"


@dataclass(frozen=True)
class Found:
    """The files of the public data.

    Attributes:
        cells: Files of cells.
        embeddings: Files of embeddings.
        width: Length of the embeddings; None where the column does not say.
    """

    cells: list[str]
    embeddings: list[str]
    width: int | None


def find_public_data(data: PublicData, spool: Path, problems: Sequence[str] = ()) -> Found:
    """Look whether all that is needed can be read, and return the files.

    Args:
        data: Where the public data are.
        spool: Folder for copies of remote files.
        problems: What is known to be missing already.

    Raises:
        FileNotFoundError: If something cannot be reached; the message says what to download.
        ValueError: If files lack needed columns; the message names those that there are.
    """
    problems = list(problems)
    cells = _files(data.cells, "data", "cells", problems)
    embeddings = _files(data.embeddings, "", "embeddings", problems)
    try:
        with reading(data.gene_metadata), open_table(data.gene_metadata, spool):
            pass
    except Exception as error:
        problems.append(f"the gene table ({data.gene_metadata}): {in_short(error)}")
    if problems:
        raise FileNotFoundError(
            f"What is needed is not here: {'; '.join(problems)}. On a machine with a network, fetch the model (`hf "
            f"download {MODEL} --include '3b-model/*'`), some files of cells (`hf download --repo-type dataset "
            f"{CELLS} --include 'data/train-0000*' 'metadata/*'`) and the embeddings of the same cells (`hf download "
            f"--repo-type dataset {EMBEDDINGS} --include '*0000*.parquet'`). Leave them in the Hub's cache, or name "
            "the folders with --model, --cells, --gene-metadata and --embeddings."
        )
    _check_columns(cells[0], [data.key, GENES, COUNTS, data.drugs], "cells", spool)
    schema = _check_columns(embeddings[0], [data.key, data.column], "embeddings", spool)
    return Found(cells, embeddings, _list_length(schema.field(data.column).type, embeddings[0], data.column, spool))


def _files(path: str, inner: str, what: str, problems: list[str]) -> list[str]:
    """Return the files of a source, or note why there are none."""
    if "://" not in path and not os.path.exists(path) and path.count("/") == 1 and not glob.has_magic(path):
        path = "/".join(part for part in ("hf://datasets", path, inner) if part)
    try:
        found = sorted(find_files(path))
    except Exception as error:
        problems.append(f"the {what} ({path}): {in_short(error)}")
        return []
    if not found:
        problems.append(f"the {what} ({path}): there is no file that ends in {' or '.join(SUFFIXES)}")
    return found


def _check_columns(path: str, columns: list[str], what: str, spool: Path) -> "pa.Schema":
    with reading(path), open_table(path, spool) as reader:
        schema = reader.schema
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise ValueError(
            f"{path}: the {what} have no column {missing[0]!r}, only {schema.names}: name the right one with "
            "--column, --key or --drugs, or check the files."
        )
    return schema


def _list_length(kind: "pa.DataType", path: str, column: str, spool: Path) -> int | None:
    """Return the length of a column's lists, by its type or its first row; None where there is no row."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
        raise ValueError(
            f"{path}: the column {column!r} is {kind}, not a list of numbers: name another with --column."
        )
    with reading(path), open_table(path, spool) as reader:
        for batch in reader.batches(0, min(1, reader.num_cells), [column]):
            return len(batch[column][0])
    return None


# Choosing cells --------------------------------------------------------------------------------------


def choose_cells(
    found: Found, data: PublicData, num_cells: int, seed: int, spool: Path, progress: bool
) -> "pd.DataFrame":
    """Choose cells that are in both, spread over files and row groups.

    Args:
        found: Files of the public data.
        data: Names of the columns.
        num_cells: Number of cells.
        seed: Seed of the choice.
        spool: Folder for copies of remote files.
        progress: Whether to show progress bars.

    Returns:
        A row per cell: `key`; `file` and `row`, where the cell is; `shard` and `place`, where its embedding is.

    Raises:
        ValueError: If no cell is in both.
    """
    import pandas as pd

    rounds = -(-len(found.cells) // _FILES_A_ROUND)
    both: list[pd.DataFrame] = []
    for number in range(rounds):
        files = found.cells[number::rounds]
        keys = pd.concat([_keys(path, data.key, spool, "file", "row") for path in files], ignore_index=True)
        both += _look_up(keys, found.embeddings, data.key, spool, progress)
        if sum(map(len, both)) >= num_cells:
            break
    matched = pd.concat(both, ignore_index=True) if both else pd.DataFrame()
    twice = matched["key"].duplicated(keep=False) if len(matched) else np.zeros(0, dtype=bool)
    if np.any(twice):
        logger.warning("%d cells share their key with another and are left out.", int(np.sum(twice)))
        matched = matched[~twice]
    if not len(matched):
        raise ValueError(
            f"No cell is in both: the {data.key} of {len(found.cells)} files of cells ({found.cells[0]}, ...) are in "
            f"none of {len(found.embeddings)} files of embeddings ({found.embeddings[0]}, ...). Fetch further files, "
            "of which the embeddings and the cells are the same."
        )
    if len(matched) < num_cells:
        logger.warning("Only %d cells are in both; %d were asked for.", len(matched), num_cells)
    return _spread(matched, num_cells, seed)


def _keys(path: str, key: str, spool: Path, *names: str) -> "pd.DataFrame":
    """Read the keys of a file, with the file and the number of the row under these names."""
    import pandas as pd

    with reading(path), open_table(path, spool) as reader:
        parts = [batch[key].to_pandas() for batch in reader.batches(0, reader.num_cells, [key])]
    values = pd.concat(parts, ignore_index=True) if parts else pd.Series(dtype=object)
    return pd.DataFrame({"key": values.astype(str), names[0]: path, names[1]: np.arange(len(values))})


def _look_up(
    keys: "pd.DataFrame", shards: Sequence[str], key: str, spool: Path, progress: bool
) -> "list[pd.DataFrame]":
    """Look for keys in the shards of embeddings, until all are found."""
    found, missing = [], len(keys)
    with progress_bar(progress, total=len(shards), unit="shard", desc="Looking for the cells") as bar:
        for shard in shards:
            there = _keys(shard, key, spool, "shard", "place")
            there["group"] = _row_groups(shard, spool)[: len(there)] if len(there) else []
            both = keys.merge(there, on="key")
            missing -= len(both)
            if len(both):
                found.append(both)
            bar.update()
            if missing <= 0:
                break
    return found


def _row_groups(path: str, spool: Path) -> np.ndarray:
    """Return the row group of each row of a Parquet file; an Arrow file has one."""
    with reading(path), open_table(path, spool) as reader:
        metadata = getattr(getattr(reader, "file", None), "metadata", None)
        sizes = (
            [reader.num_cells]
            if metadata is None
            else [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        )
    return np.repeat(np.arange(len(sizes)), sizes)


def _spread(matched: "pd.DataFrame", num_cells: int, seed: int) -> "pd.DataFrame":
    """Choose cells at random from as few row groups as are needed, but not from fewer than `_ROW_GROUPS`."""
    matched = matched.assign(lot=[_lot(seed, key) for key in matched["key"]])
    sizes = matched.groupby(["shard", "group"]).agg(cells=("key", "size"), lot=("lot", "min")).sort_values("lot")
    before = sizes["cells"].cumsum() - sizes["cells"]
    taken = sizes[(np.arange(len(sizes)) < _ROW_GROUPS) | (before < num_cells)].index
    mine = matched.set_index(["shard", "group"]).index.isin(taken)
    chosen = matched[mine].sort_values("lot").head(num_cells)
    return chosen[["key", "file", "row", "shard", "place"]].reset_index(drop=True)


def _lot(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=7).digest(), "big")


# Reading the chosen cells ----------------------------------------------------------------------------


def read_chosen(
    chosen: "pd.DataFrame", data: PublicData, spool: Path, progress: bool
) -> tuple["pa.Table", np.ndarray]:
    """Read the cells that were chosen, and their public embeddings.

    Returns:
        The cells as in the files, with the columns that are needed; and `(cells, width)` float32, in the same order.

    Raises:
        ValueError: For embeddings that are missing, of different lengths or not finite.
    """
    import pyarrow as pa

    with progress_bar(progress, total=2 * len(chosen), unit="cell", desc="Reading the cells") as bar:
        pieces = list(_rows(chosen, "file", "row", [data.key, GENES, COUNTS, data.drugs], METADATA, spool, bar))
        numbers = np.concatenate([numbers for numbers, _ in pieces])
        cells = pa.concat_tables([table for _, table in pieces], promote_options="permissive").take(
            np.argsort(numbers)
        )
        embeddings: np.ndarray | None = None
        for numbers, table in _rows(chosen, "shard", "place", [data.column], (), spool, bar):
            values = as_matrix(table[data.column], data.column, str(chosen["shard"][numbers[0]]))
            if embeddings is None:
                embeddings = np.empty((len(chosen), values.shape[1]), dtype=np.float32)
            if values.shape[1] != embeddings.shape[1]:
                raise ValueError(
                    f"The column {data.column!r} has lists of {embeddings.shape[1]} and {values.shape[1]}."
                )
            embeddings[numbers] = values
    assert embeddings is not None  # at least one cell is chosen
    return cells, embeddings


def _rows(
    chosen: "pd.DataFrame",
    file: str,
    row: str,
    columns: list[str],
    more: Sequence[str],
    spool: Path,
    bar: Any,
) -> "Iterator[tuple[np.ndarray, pa.Table]]":
    """Yield the numbers of chosen cells with their rows, file by file; stretches without chosen rows are skipped."""
    import pyarrow as pa

    for path, mine in chosen.groupby(file):
        order = np.argsort(mine[row].to_numpy(), kind="stable")
        rows, numbers = mine[row].to_numpy()[order], mine.index.to_numpy()[order]
        groups = _row_groups(str(path), spool)[rows]
        with reading(str(path)), open_table(str(path), spool) as reader:
            wanted = [*columns, *(name for name in more if name in reader.schema.names)]
            for group in np.unique(groups):
                inside = np.flatnonzero(groups == group)
                at, stop = int(rows[inside[0]]), int(rows[inside[-1]]) + 1
                for batch in reader.batches(at, stop, wanted):
                    here = inside[(rows[inside] >= at) & (rows[inside] < at + batch.num_rows)]
                    if len(here):
                        taken = pa.Table.from_batches([batch]).select(wanted).take(rows[here] - at)
                        yield numbers[here], taken
                        bar.update(len(here))
                    at += batch.num_rows


def as_matrix(column: "pa.ChunkedArray", name: str, path: str) -> np.ndarray:
    """Return a column of lists of one length as a float32 matrix."""
    lists = column.combine_chunks()
    if lists.null_count:
        raise ValueError(f"{path}: the column {name!r} has no embedding for {lists.null_count} cells.")
    values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    if len(values) % max(len(lists), 1) or any(len(each) != len(values) // len(lists) for each in lists):
        raise ValueError(f"{path}: the column {name!r} has lists of different lengths.")
    matrix = values.reshape(len(lists), -1)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{path}: the column {name!r} has values that are not finite.")
    return matrix
