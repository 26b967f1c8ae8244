# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Make a `vocab.json` (token -> id) from the genes of a reference file."""

import json
import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

from tahoex1_hf.cells.opening import read_var
from tahoex1_hf.common.bounded import BoundedGzip
from tahoex1_hf.common.files import WholeFile

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")
DRUG_TOKEN = "<drug>"
ID_COLUMN, TOKEN_COLUMN = "ensembl_id", "token_id"

_ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{11}")
_VERSION_SUFFIX = re.compile(r"\.\d+$")
_SPECIAL_TOKEN = re.compile(r"<\w+>")
_FILLER = re.compile(r"<junk\d+>")


def build_vocabulary(
    reference: Path,
    output: Path,
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    gene_id_column: str | None = None,
    pad_to_multiple_of: int = 64,
    drug_token: bool = False,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a vocabulary: the special tokens, then the genes, then fillers up to a round size.

    The same arguments give the same bytes. Only `var` of an `.h5ad` file is read.

    Args:
        reference: `.h5ad`, or a table of genes: `.csv`, `.tsv` (also `.gz`) or `.parquet`. The genes keep its order;
            if a table has a column `token_id`, they are in the order of these numbers.
        output: Path of the `vocab.json` to write.
        special_tokens: The first tokens, ids from 0.
        gene_id_column: Column with Ensembl ids; by default the `var_names` of an `.h5ad`, and `ensembl_id` of a table.
            A version (`.12`) is left out.
        pad_to_multiple_of: Number whose next multiple the size is filled up to with `<junk0>`, `<junk1>`, ..., since
            matrix products of round sizes are faster.
        drug_token: Whether to add `<drug>` after the special tokens, for models that take a drug.
        overwrite: Whether to replace a file that holds something else.

    Returns:
        Token -> id, as written.

    Raises:
        FileExistsError: If `output` holds something else and `overwrite` is not set.
        FileNotFoundError: If there is no `reference`.
        ValueError: If genes occur twice or are not Ensembl ids (the message names them), or for settings that cannot
            work.
    """
    tokens = _checked_special_tokens([*special_tokens, *([DRUG_TOKEN] if drug_token else [])])
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of}: pass a positive number; 1 adds no fillers.")
    tokens += _gene_ids(Path(reference), gene_id_column)
    tokens += [f"<junk{number}>" for number in range(-len(tokens) % pad_to_multiple_of)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    write_files({Path(output): json.dumps(vocabulary, indent=2).encode()}, overwrite)
    return vocabulary


def _checked_special_tokens(tokens: list[str]) -> list[str]:
    strange = [token for token in tokens if not _SPECIAL_TOKEN.fullmatch(token) or _FILLER.fullmatch(token)]
    if strange:
        raise ValueError(f"special tokens {strange}: they must look like <this>, and <junk0> and so on are fillers.")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"special tokens {tokens}: each may occur once.")
    missing = [token for token in ("<pad>", "<cls>") if token not in tokens]
    if missing:
        raise ValueError(f"special tokens {tokens} lack {missing}, which every model needs.")
    return tokens


def _gene_ids(reference: Path, column: str | None) -> list[str]:
    """Return the genes in their order, without versions, after checking them."""
    is_h5ad = reference.name.endswith(".h5ad")
    table = read_var(reference) if is_h5ad else read_table(reference)
    if is_h5ad and column is None:
        where, names = "var_names", table.index
    else:
        column = column or ID_COLUMN
        if column not in table.columns:
            raise ValueError(f"{reference} has no column {column!r}.{_id_columns_hint(table, is_h5ad)}")
        where, names = f"column {column!r}", table[column]
    if not is_h5ad and TOKEN_COLUMN in table.columns:
        names = names.iloc[_order_of_tokens(table[TOKEN_COLUMN], reference)]
    if not len(names):
        raise ValueError(f"{reference} has no genes.")
    ids = [_VERSION_SUFFIX.sub("", str(name)) for name in names]
    strange = [name for name in ids if not _ENSEMBL_ID.fullmatch(name)]
    if strange:
        raise ValueError(
            f"{reference}: {len(strange)} of {len(ids)} genes in {where} are not Ensembl ids: {_some(strange)}."
            f"{_id_columns_hint(table, is_h5ad)}"
        )
    repeated = sorted(_repeated(ids))
    if repeated:
        raise ValueError(
            f"{reference}: {len(repeated)} genes occur twice in {where} (versions left out): {_some(repeated)}. "
            "Take the repeated rows out."
        )
    return ids


def _order_of_tokens(numbers: "pd.Series", reference: Path) -> np.ndarray:
    if numbers.isna().any() or numbers.dtype.kind not in "iu" or numbers.duplicated().any():
        raise ValueError(
            f"{reference}: {TOKEN_COLUMN}, which orders the genes, must hold whole numbers, each once. Mend it, or "
            "take the column out to keep the order of the rows."
        )
    return np.argsort(numbers.to_numpy(), kind="stable")


def _id_columns_hint(table: "pd.DataFrame", is_h5ad: bool) -> str:
    """Return advice on the columns that hold Ensembl ids, judged by the first thousand rows."""
    columns = {str(name): table[name] for name in table.columns} | ({"var_names": table.index} if is_h5ad else {})
    good = []
    for name, values in columns.items():
        first = [_VERSION_SUFFIX.sub("", str(value)) for value in values[:1000]]
        if first and 2 * sum(bool(_ENSEMBL_ID.fullmatch(value)) for value in first) > len(first):
            good.append(name)
    if not good:
        return f" None of its columns {list(columns)} holds Ensembl ids (ENSG...): add one."
    if good == ["var_names"]:
        return " Ensembl ids are in var_names: leave gene_id_column out."
    return f" Ensembl ids are in {', '.join(good)}: name the column as gene_id_column, and drop genes without an id."


def read_table(path: Path) -> "pd.DataFrame":
    """Read `.csv`, `.tsv` (also `.gz`) or `.parquet`; text stays text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a table.
    """
    import pandas as pd
    import pyarrow as pa

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file.")
    name = path.name.removesuffix(".gz")
    try:
        if path.name.endswith(".parquet"):
            return pd.read_parquet(path)
        if name.endswith((".csv", ".tsv")):
            # "NA" and "None" may be names; only an empty field is a missing value.
            separator = "\t" if name.endswith(".tsv") else ","
            with BoundedGzip(path) if path.name.endswith(".gz") else path.open("rb") as file:
                return pd.read_csv(file, sep=separator, keep_default_na=False, na_values=[""])
    except (pa.ArrowException, ValueError, OSError, EOFError, zlib.error) as error:  # pandas' own are ValueErrors
        raise ValueError(f"{path} could not be read as a table: {error}") from None
    raise ValueError(f"{path}: a table is .csv, .tsv (also .gz) or .parquet, cells are .h5ad.")


def write_files(contents: dict[Path, bytes], overwrite: bool) -> None:
    """Write files, each whole or not at all; existing files with the same content are left alone.

    Raises:
        FileExistsError: If a file holds something else and `overwrite` is not set; nothing is written then.
    """
    changed = {path: data for path, data in contents.items() if not (path.is_file() and path.read_bytes() == data)}
    for path in changed:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists and holds something else: take another name, or set overwrite.")
    for path, data in changed.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with WholeFile(path) as partial:
            partial.write_bytes(data)
        logger.info("Wrote %s", path)


def _repeated(names: Sequence[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
