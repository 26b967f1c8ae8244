# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Columns of obs of several sources in one output; a column may have different types, or be missing in a source."""

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tahoex1_hf.cells.readers.base import BadInput, CellInput

logger = logging.getLogger(__name__)


def split_columns(names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of columns, which may be given as one text with commas between them; None for None."""
    if names is None:
        return None
    return tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))


def choose_columns(inputs: Sequence[CellInput], asked: Sequence[str] | None) -> list[str]:
    """Return the columns of obs of the output.

    Args:
        inputs: Sources.
        asked: Requested columns; None for all columns of all sources.

    Raises:
        ValueError: If no source has a requested column.
    """
    there = list(dict.fromkeys(name for cells in inputs for name in cells.obs_columns))
    if asked is None:
        return there
    missing = [name for name in asked if name not in there]
    if missing:
        raise ValueError(
            f"obs={','.join(asked)}: no source has the column {missing[0]!r}; there are {', '.join(there) or 'none'}."
        )
    for name in asked:
        lacking = [cells.path for cells in inputs if name not in cells.obs_columns]
        if lacking:
            logger.warning("%s has no column %s of obs: its cells get missing values.", ", ".join(lacking), name)
    return list(dict.fromkeys(asked))


def free_name(name: str, taken: Collection[str]) -> str:
    """Return the name of a column in the output, which is changed if the output has another column of this name."""
    free = name
    while free in taken:
        free = f"obs_{free}"
    if free != name:
        logger.warning("The column %s of obs is named %s in the output, which has its own %s.", name, free, name)
    return free


# For tables -------------------------------------------------------------------------------------------


def as_arrow(frame: pd.DataFrame) -> pa.Table:
    """Return a frame as a table with plain values instead of categories, which every reader of Parquet understands.

    Raises:
        ValueError: If the values of a column have types that cannot be combined.
    """
    columns = {}
    for name in frame.columns:
        try:
            values = pa.array(frame[name], from_pandas=True)
        except pa.ArrowException as error:
            raise ValueError(f"The column {name!r} of obs cannot be written to a table: {error}") from error
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        columns[name] = values.cast(pa.string()) if pa.types.is_large_string(values.type) else values
    return pa.table(columns)


def common_types(schemas: Iterable[pa.Schema], names: Sequence[str]) -> dict[str, pa.DataType]:
    """Return a type for each column that holds the values of all tables; text if there is no other."""
    seen: dict[str, list[pa.DataType]] = {name: [] for name in names}
    for schema in schemas:
        for field in schema:
            if field.name in seen and field.type not in (pa.null(), *seen[field.name]):
                seen[field.name].append(field.type)
    return {name: _common(types) for name, types in seen.items()}


def _common(types: list[pa.DataType]) -> pa.DataType:
    if not types:
        return pa.string()
    try:
        schemas = [pa.schema([("column", each)]) for each in types]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def conformed(table: pa.Table | None, types: dict[str, pa.DataType], number: int) -> list[pa.Array]:
    """Return columns of a table, converted to the given types.

    Args:
        table: Table; None for one without columns.
        types: Column -> type.
        number: Number of values; a column that the table does not have gets this many missing values.
    """
    return [
        pc.cast(table[name].combine_chunks(), kind, safe=False)
        if table is not None and name in table.column_names
        else pa.nulls(number, kind)
        for name, kind in types.items()
    ]


# For AnnDatas -----------------------------------------------------------------------------------------


def joined_column(inputs: Sequence[CellInput], name: str) -> Any:
    """Return a column of obs of all sources, one source after the other, as an array that an AnnData can hold.

    Numbers and booleans keep their kind, and cells of a source without the column get missing values. All other
    columns become text or categories.

    Raises:
        BadInput: If a column cannot be read.
    """
    parts = [_column(cells, name) if name in cells.obs_columns else None for cells in inputs]
    there = [part for part in parts if part is not None]
    sizes = [cells.num_cells for cells in inputs]
    if all(isinstance(part.dtype, pd.CategoricalDtype) for part in there):
        if len(parts) == 1:
            return there[0].array
        if len({part.cat.categories.dtype.kind for part in there}) == 1:
            empty = pd.Categorical([], categories=there[0].cat.categories[:0])
            filled = [
                pd.Categorical.from_codes([-1] * size, dtype=empty.dtype) if part is None else part.array
                for part, size in zip(parts, sizes, strict=True)
            ]
            return pd.api.types.union_categoricals(filled, ignore_order=True)
    kinds = {_kind(part) for part in there}
    if "?" not in kinds and len(there) == len(parts) and len({part.dtype for part in there}) == 1:
        return pd.concat(there, ignore_index=True).values
    missing = len(there) < len(parts) or any(part.isna().any() for part in there)
    for known, plain, nullable in (("b", "bool", "boolean"), ("i", "int64", "Int64"), ("if", "float64", "float64")):
        if kinds <= set(known):
            kind = nullable if missing else plain
            return pd.concat(
                [
                    pd.Series([None] * size, dtype=kind) if part is None else part.astype(kind)
                    for part, size in zip(parts, sizes, strict=True)
                ],
                ignore_index=True,
            ).values
    return _text(parts, sizes)


def _column(cells: CellInput, name: str) -> pd.Series:
    try:
        return cells.column(name).reset_index(drop=True)
    except BadInput as error:
        raise BadInput(f"{cells.path}: {error}") from error


def _kind(part: pd.Series) -> str:
    """Return "b" for booleans, "i" for integers, "f" for other numbers, and "?" for anything else."""
    if pd.api.types.is_bool_dtype(part.dtype):
        return "b"
    if pd.api.types.is_integer_dtype(part.dtype):
        return "i"
    return "f" if pd.api.types.is_float_dtype(part.dtype) else "?"


def _text(parts: Sequence[pd.Series | None], sizes: Sequence[int]) -> Any:
    texts: list[str | None] = []
    for part, size in zip(parts, sizes, strict=True):
        values = [None] * size if part is None else part.astype(object)
        texts.extend(None if value is None or value is pd.NA or value != value else str(value) for value in values)
    categories = pd.Categorical(texts)
    several = len(categories.categories) < len(texts)  # anndata stores text in the same way
    return categories if several else pd.Series(texts, dtype=object).to_numpy()
