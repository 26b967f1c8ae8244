"""Reading a table of gene symbols."""

import csv
import re
from pathlib import Path

_ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{11}")


def read_gene_symbols(path: str | Path | None) -> dict[str, str] | None:
    """Read a CSV whose first two columns are gene symbol and Ensembl id, in either order; a header is skipped.

    None gives None.
    """
    if path is None:
        return None
    pairs = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        for first, second, *_ in (row for row in csv.reader(file) if len(row) >= 2):
            if _ENSEMBL_ID.match(second):
                pairs[first] = second
            elif _ENSEMBL_ID.match(first):
                pairs[second] = first
    if not pairs:
        raise ValueError(
            f"{path} has no line with a gene symbol and an Ensembl id (ENSG...) in its first two columns."
        )
    return pairs
