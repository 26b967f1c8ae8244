# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables of gene symbols."""

import csv
import re
from pathlib import Path

_ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{11}")
# Names of columns with symbols, as 10x, CELLxGENE, Ensembl BioMart and HGNC write them.
_SYMBOL_COLUMNS = ("symbol", "gene_symbol", "gene symbol", "approved symbol", "gene_name", "gene name", "feature_name")


def read_gene_symbols(path: str | Path | None) -> dict[str, str] | None:
    """Read a CSV file with a gene symbol and an Ensembl id in each line.

    The Ensembl id is recognised by its form, in whichever column it stands. The symbol stands in the column with such
    a name in the header (`symbol`, `gene_symbol`, `gene_name`, `feature_name` ...), or, without such a header, in the
    first other column.

    Args:
        path: CSV file, or None.

    Returns:
        Symbol -> Ensembl id; None where `path` is None.

    Raises:
        ValueError: for a file without a line that holds both.
    """
    if path is None:
        return None
    pairs = {}
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        symbol_column = None
        for number, row in enumerate(csv.reader(file)):
            ids = [column for column, value in enumerate(row) if _ENSEMBL_ID.match(value)]
            if number == 0 and not ids:
                names = [name.strip().lower() for name in row]
                symbol_column = next((names.index(name) for name in _SYMBOL_COLUMNS if name in names), None)
            if not ids or len(row) < 2:
                continue
            other = int(ids[0] == 0) if symbol_column is None or symbol_column in ids else symbol_column
            if other < len(row) and other not in ids:
                pairs[row[other]] = row[ids[0]]
    if not pairs:
        raise ValueError(f"{path} has no line with a gene symbol and an Ensembl id (ENSG...).")
    return pairs
