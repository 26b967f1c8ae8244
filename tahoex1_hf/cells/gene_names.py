# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Gene names as files spell them: recognise Ensembl ids and symbols, whatever was added to them."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.texts import as_text

if TYPE_CHECKING:
    import pandas as pd

_BYTES = re.compile(r"""^b(['"])(.*)\1$""")
# An id, after an optional genome or symbol (GRCh38_ENSG..., TSPAN6|ENSG...), and before anything `_BEHIND` matches.
_ID = re.compile(r"(?:(?P<before>[a-z][\w.-]*?)[_|:;-]+)?(?P<id>ENS[A-Z]{0,4}G\d{11})(?P<behind>\D.*)?", re.IGNORECASE)
# A version (.12, or .12_3 after a lift-over), the copy of a gene on Y, a number added by make_unique, a symbol.
_BEHIND = re.compile(
    r"(?:\.\d+)?(?:_\d+)?(?:[_-]PAR[_-]Y)?(?:\.\d+)?(?:-\d+)*(?:[_|:;\s-]+(?P<symbol>[a-z][\w.-]*))?", re.IGNORECASE
)
# Words beside an id that mark a column as only a part of the gene.
_PART = re.compile(
    r"(?:pre[_-]?m?rna|introns?|intronic|exons?|exonic|unspliced|spliced|nascent|ambiguous|antisense|utr[35]?|i|u|as)",
    re.IGNORECASE,
)
# Genomes that references of several species put before gene names, followed by one or more underscores. Seurat turns
# the underscores into hyphens.
_GENOME = re.compile(r"(?P<genome>(?:GRCh|hg|GRCm|mm|rn|mRatBN)\d+)(?:\.p\d+)?[_-]+(?P<symbol>\S.*)")
_HUMAN_GENOME = ("GRCh", "hg")
# Columns of `var` in which files usually keep symbols beside Ensembl ids.
_SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "feature_name", "gene_name", "gene_names", "symbol", "SYMBOL")


def shown_names(var: "pd.DataFrame", symbols: Mapping[str, str] | None) -> np.ndarray:
    """Return the names by which people know genes, `(genes,)`: symbols where ids are the names and symbols are known.

    Args:
        var: Table of the genes.
        symbols: Gene symbol -> Ensembl id, for tables without symbols; None for none.
    """
    shown = var.index.astype(str).to_numpy()
    if not all(name.startswith("ENS") for name in shown[:20]):
        return shown
    column = next((name for name in _SYMBOL_COLUMNS if name in var.columns), None)
    if column is not None:
        return as_text(var[column]).to_numpy()
    reverse = {gene: symbol for symbol, gene in (symbols or {}).items()}
    return np.array([reverse.get(name, name) for name in shown], dtype=object)


def text_of(name: Any) -> str:
    """Return a name as text, without surrounding blanks and quotation marks; bytes are decoded."""
    if type(name) is str and name.isalnum():  # a shortcut for most of tens of thousands of names
        return name
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    found = _BYTES.match(text)  # bytes that were printed into a table
    return (text if found is None else found[2]).strip().strip('"')


def plain_id(name: str) -> str | None:
    """Return the Ensembl gene id in a name, in upper case and without version; None if there is none.

    The name of a part of a gene (`ENSG00000000003-intron`) counts as a name without an id.
    """
    found = _ID.fullmatch(name)
    if found is None:
        return None
    behind = _BEHIND.fullmatch(found["behind"] or "")
    if behind is None or any(part and _PART.fullmatch(part) for part in (found["before"], behind["symbol"])):
        return None
    return found["id"].upper()


def plain_symbol(name: str) -> str | None:
    """Return a symbol without the genome before it; None if the genome is not human."""
    found = _GENOME.fullmatch(name)
    if found is None:
        return name
    return found["symbol"] if found["genome"].startswith(_HUMAN_GENOME) else None


def looks_like_mouse(names: list[str]) -> bool:
    """Return whether names look like mouse or rat symbols, such as Xkr4 or mt-Nd1; human symbols are in capitals."""
    symbols = [name for name in names if plain_id(name) is None and name[:1].isalpha()]
    titles = sum(bool(re.match(r"(?:[A-Z][a-z0-9]*[a-z][a-z0-9]*(?:-|$)|mt-[A-Z])", name)) for name in symbols)
    return 2 * titles > len(symbols) > 0
