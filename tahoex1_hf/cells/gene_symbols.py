# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables of gene symbols and of orthologues: the user's, and the package's, which was made from Tahoe-100M's."""

import csv
import gzip
import io
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from tahoex1_hf.cells.gene_names import looks_like_mouse, plain_id
from tahoex1_hf.common.bounded import BoundedGzip
from tahoex1_hf.common.reading import reading

Table = Mapping[str, str | Sequence[str]]
"""Name -> Ensembl id, or several ids, one of which is in the vocabulary."""

# The file made by conversion/make_gene_symbols.py. A line is a symbol, a tab and the number of its human Ensembl id.
RELEASED = Path(__file__).with_name("gene_symbols.tsv.gz")

_IDS = re.compile(r"(?:ENS[A-Z]{0,4}G\d{11}(?:\.\d+)?[\s,;|/]*)+", re.IGNORECASE)
# Names of symbol columns in files from 10x, CELLxGENE, Ensembl BioMart and HGNC.
_SYMBOL_COLUMNS = ("symbol", "gene_symbol", "gene symbol", "approved symbol", "gene_name", "gene name", "feature_name")


@lru_cache(maxsize=1)
def released_symbols() -> dict[str, str]:
    """Return symbol -> Ensembl id of the released vocabulary's genes, with old symbols that mean only one gene."""
    with gzip.open(RELEASED, "rt", encoding="utf-8") as file:
        pairs = (line.rstrip("\n").split("\t") for line in file if not line.startswith("#"))
        return {symbol: f"ENSG{int(number):011d}" for symbol, number in pairs}


def read_gene_symbols(path: str | Path | None) -> dict[str, str | tuple[str, ...]] | None:
    """Read a table with a gene symbol and an Ensembl id in each line, separated by commas, tabs or semicolons.

    The Ensembl id may be in any column, since it is recognised by its form. The symbol is in the column with a known
    name in the header (`symbol`, `gene_symbol`, `gene_name`, `feature_name` ...), or, without such a name, in the
    first column that has no Ensembl id.

    Args:
        path: CSV or TSV file, which may be gzipped, or None.

    Returns:
        Symbol -> Ensembl id, or a tuple of ids if the table has several; None if `path` is None.

    Raises:
        ValueError: If no line holds both.
    """
    if path is None:
        return None
    found: dict[str, dict[str, None]] = {}
    symbol_column = None
    for number, row in enumerate(_read_rows(path)):
        columns = [column for column, value in enumerate(row) if _ids_in(value)]
        if number == 0 and not columns:
            names = [name.strip().lower() for name in row]
            symbol_column = next((names.index(name) for name in _SYMBOL_COLUMNS if name in names), None)
        if not columns or len(row) < 2:
            continue
        human = [column for column in columns if _ids_in(row[column])[0].startswith("ENSG")]
        other = int(columns[0] == 0) if symbol_column is None or symbol_column in columns else symbol_column
        if other < len(row) and other not in columns and row[other].strip():
            for gene in _ids_in(row[(human or columns)[0]]):
                found.setdefault(row[other].strip(), {})[gene] = None
    if not found:
        raise ValueError(f"{path} has no line with a gene symbol and an Ensembl id (ENSG...).")
    return {symbol: next(iter(genes)) if len(genes) == 1 else tuple(genes) for symbol, genes in found.items()}


def read_orthologs(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read a table of mouse genes and their human orthologues, as Ensembl BioMart, HCOP and MGI offer them.

    Columns are recognised by their content: Ensembl ids of either species (ENSMUSG..., ENSG...), and symbols, which
    are in capitals for human genes. Ids are preferred to symbols.

    Args:
        path: CSV or TSV file, which may be gzipped.

    Returns:
        Ensembl id or symbol of a mouse gene -> Ensembl ids of its human orthologues.

    Raises:
        ValueError: If the file has no column of mouse genes or none of human genes.
    """
    rows = [row for row in _read_rows(path) if row]
    width = max((len(row) for row in rows), default=0)
    columns = [[row[column].strip() if column < len(row) else "" for row in rows] for column in range(width)]
    kinds = [_kind_of(values) for values in columns]
    mouse = [number for number, kind in enumerate(kinds) if kind in ("mouse id", "mouse symbol")]
    human = [number for kind in ("human id", "human symbol") for number in range(width) if kinds[number] == kind]
    if not mouse or not human:
        raise ValueError(
            f"orthologs={path}: its columns look like {[kind or 'other' for kind in kinds]}. It needs one column with "
            "mouse genes (ENSMUSG... or symbols) and one with human genes (ENSG... or symbols)."
        )
    symbols = released_symbols()
    found: dict[str, dict[str, None]] = {}
    for row in range(len(rows)):
        text = columns[human[0]][row]
        genes = _ids_in(text) if kinds[human[0]] == "human id" else [symbols[text]] if text in symbols else []
        for number in mouse:
            names = _ids_in(columns[number][row]) if kinds[number] == "mouse id" else [columns[number][row]]
            for name in names:
                if name:
                    found.setdefault(name, {}).update(dict.fromkeys(genes))
    return {name: tuple(genes) for name, genes in found.items() if genes}


def _kind_of(values: Sequence[str]) -> str:
    """Return whether a column of a table of orthologues holds mouse or human ids or symbols; "" if it has neither."""
    filled = [value for value in values[1:2001] if value]
    ids = [gene for value in filled for gene in _ids_in(value)[:1]]
    if 2 * len(ids) > len(filled) > 0:
        kinds = {"ENSMUSG": "mouse id", "ENSG": "human id"}
        return next((kind for start, kind in kinds.items() if ids[0].startswith(start)), "")
    if looks_like_mouse(filled):
        return "mouse symbol"
    return "human symbol" if 2 * sum(value in released_symbols() for value in filled) > len(filled) > 0 else ""


def _ids_in(value: str) -> list[str]:
    """Return the Ensembl ids in a field, without versions; an empty list if it also holds other text."""
    if _IDS.fullmatch(value.strip()) is None:
        return []
    return [gene for part in re.split(r"[\s,;|/]+", value.strip()) if (gene := plain_id(part)) is not None]


def _read_rows(path: str | Path) -> list[list[str]]:
    """Read the rows of a table; files with a byte order mark and Excel's "Unicode text" are read, too."""
    with reading(path):
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            with BoundedGzip(path) as file:
                data = file.read()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    first = text.partition("\n")[0]
    delimiter = max((",", "\t", ";"), key=first.count)
    with reading(path):
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
