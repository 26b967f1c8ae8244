# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of genes as files have them: what is an Ensembl id, whatever was put around it, and what is a symbol."""

import re
from typing import Any

_BYTES = re.compile(r"""^b(['"])(.*)\1$""")
# An id, behind a genome or a symbol (GRCh38_ENSG..., TSPAN6|ENSG...), in front of whatever `_BEHIND` takes.
_ID = re.compile(r"(?:(?P<before>[a-z][\w.-]*?)[_|:;-]+)?(?P<id>ENS[A-Z]{0,4}G\d{11})(?P<behind>\D.*)?", re.IGNORECASE)
# A version (.12, with the number of a lift-over, _3), the copy of a gene on Y, numbers of make_unique, a symbol.
_BEHIND = re.compile(
    r"(?:\.\d+)?(?:_\d+)?(?:[_-]PAR[_-]Y)?(?:\.\d+)?(?:-\d+)*(?:[_|:;\s-]+(?P<symbol>[a-z][\w.-]*))?", re.IGNORECASE
)
# What stands beside an id where a column is only a part of the gene.
_PART = re.compile(
    r"(?:pre[_-]?m?rna|introns?|intronic|exons?|exonic|unspliced|spliced|nascent|ambiguous|antisense|utr[35]?|i|u|as)",
    re.IGNORECASE,
)
# Genomes that references of several species put before the names of genes, with one underscore or several; Seurat
# makes hyphens of them.
_GENOME = re.compile(r"(?P<genome>(?:GRCh|hg|GRCm|mm|rn|mRatBN)\d+)(?:\.p\d+)?[_-]+(?P<symbol>\S.*)")
_HUMAN_GENOME = ("GRCh", "hg")


def text_of(name: Any) -> str:
    """Return a name as text without blanks and quotation marks around it; bytes are decoded."""
    if type(name) is str and name.isalnum():  # the usual case, of tens of thousands
        return name
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    found = _BYTES.match(text)  # bytes that were printed into a table
    return (text if found is None else found[2]).strip().strip('"')


def plain_id(name: str) -> str | None:
    """Return the Ensembl gene id in a name, upper case and without version; None where there is none.

    Names of parts of a gene (`ENSG00000000003-intron`) have none.
    """
    found = _ID.fullmatch(name)
    if found is None:
        return None
    behind = _BEHIND.fullmatch(found["behind"] or "")
    if behind is None or any(part and _PART.fullmatch(part) for part in (found["before"], behind["symbol"])):
        return None
    return found["id"].upper()


def plain_symbol(name: str) -> str | None:
    """Return a symbol without the genome before it; None where that is not human."""
    found = _GENOME.fullmatch(name)
    if found is None:
        return name
    return found["symbol"] if found["genome"].startswith(_HUMAN_GENOME) else None


def looks_like_mouse(names: list[str]) -> bool:
    """Return whether names look like symbols of mouse or rat genes: Xkr4, mt-Nd1, where human ones are capitals."""
    symbols = [name for name in names if plain_id(name) is None and name[:1].isalpha()]
    titles = sum(bool(re.match(r"(?:[A-Z][a-z0-9]*[a-z][a-z0-9]*(?:-|$)|mt-[A-Z])", name)) for name in symbols)
    return 2 * titles > len(symbols) > 0
