# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Metadata of cells: joined tables, filters, and the Arrow columns made from them."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import pandas as pd
import pyarrow as pa

from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.data.config import CommonSourceConfig, JoinConfig, filter_columns

# A column of strings with more distinct values than this (barcodes) is written as it is, not as a dictionary.
MAX_CATEGORIES = 65536


def source_columns(config: CommonSourceConfig) -> list[str]:
    """Return the columns that a source itself must have, for the output, the filter and the joins."""
    joined = {column for join in config.join for column in join.columns}
    needed = [*config.metadata.values(), *(filter_columns(config.filter) if config.filter else ())]
    needed += [join.key for join in config.join]
    return [name for name in dict.fromkeys(needed) if name not in joined]


def add_joined(metadata: pd.DataFrame, config: CommonSourceConfig) -> tuple[pd.DataFrame, int]:
    """Add the columns of the joined tables; also return the number of cells for which some table has no row."""
    missed = np.zeros(len(metadata), dtype=bool)
    for join in config.join:
        table = _join_table(join.file, join.key, tuple(join.columns))
        rows = table.index.get_indexer(metadata[join.key].astype(str))
        missed |= rows < 0
        for column in join.columns:
            metadata[column] = table[column].take(rows.clip(min=0)).where(rows >= 0).array
    return metadata, int(missed.sum())


@lru_cache(maxsize=8)
def _join_table(file: str, key: str, columns: tuple[str, ...]) -> pd.DataFrame:
    table = pd.read_parquet(file) if file.endswith(".parquet") else pd.read_csv(file, sep=None, engine="python")
    missing = [name for name in (key, *columns) if name not in table.columns]
    if missing:
        raise ValueError(f"join: {file} has no column {missing[0]!r}; there are {sorted(table.columns)}.")
    table.index = pd.Index(table[key].astype(str))
    repeated = table.index[table.index.duplicated()]
    if len(repeated):
        raise ValueError(f"join: {file} has several rows with {key}={repeated[0]!r}: one per key is needed.")
    return table[list(columns)]


def check_joins(joins: Iterable[JoinConfig]) -> None:
    """Read the tables, so that their faults are found before the cells are read."""
    for join in joins:
        _join_table(join.file, join.key, tuple(join.columns))


def filter_mask(metadata: pd.DataFrame, expression: str) -> np.ndarray:
    """Return which cells a filter keeps; a comparison with a missing value is false."""
    try:
        kept = metadata.eval(expression, engine="python")
    except (TypeError, ValueError, KeyError) as error:
        raise BadInput(f"filter={expression!r} does not fit its columns: {error}") from None
    if getattr(kept, "dtype", None) is None or (kept.dtype.kind != "b" and str(kept.dtype) != "boolean"):
        raise BadInput(f"filter={expression!r} does not give yes or no for each cell.")
    return pd.Series(kept).fillna(False).to_numpy(dtype=bool)


def output_columns(metadata: pd.DataFrame, config: CommonSourceConfig) -> pd.DataFrame:
    """Return the columns of the dataset, under their names there."""
    columns = {name: metadata[source].array for name, source in config.metadata.items()}
    constants = {
        name: pd.Categorical([value] * len(metadata), categories=[value]) for name, value in config.constants.items()
    }
    return pd.DataFrame({**columns, **constants}, index=metadata.index)


def to_arrow(values: pd.Series) -> pa.Array:
    """Convert numbers to int64 or float64, booleans to bool, and everything else to a dictionary of strings."""
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype) or not pd.api.types.is_numeric_dtype(dtype):
        texts = values.astype(object).where(values.notna(), None)
        return pa.array([None if text is None else str(text) for text in texts], pa.string()).dictionary_encode()
    if pd.api.types.is_bool_dtype(dtype):
        return pa.array(values, pa.bool_(), from_pandas=True)
    return pa.array(values, pa.int64() if pd.api.types.is_integer_dtype(dtype) else pa.float64(), from_pandas=True)


def common_type(types: Iterable[pa.DataType]) -> pa.DataType:
    """Return the common type of a column's pieces: their one type, float64 for numbers, else strings."""
    kinds = {kind for kind in types if not pa.types.is_null(kind)}
    if len(kinds) <= 1:
        return next(iter(kinds), pa.dictionary(pa.int32(), pa.string()))
    return pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.dictionary(pa.int32(), pa.string())


def unified(arrays: list[pa.Array], kind: pa.DataType, categories: list[str] | None) -> pa.Array:
    """Join the pieces of a column.

    Args:
        arrays: Pieces, of any of the types that `common_type` takes.
        kind: Common type of the pieces.
        categories: All values of the dictionary, in order; None to write plain strings.
    """
    if not pa.types.is_dictionary(kind):
        return pa.concat_arrays([array.cast(kind) for array in arrays])
    texts = [array.cast(pa.string()) for array in arrays]
    if categories is None:
        return pa.concat_arrays(texts)
    values = pa.array(categories, pa.string())
    codes = pa.concat_arrays([pa.compute.index_in(text, values) for text in texts])
    return pa.DictionaryArray.from_arrays(codes, values)
