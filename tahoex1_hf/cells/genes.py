# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Options that say where an input has its genes and counts, and how many of the genes must be known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tahoex1_hf.cells.errors import BadInput
from tahoex1_hf.cells.gene_names import plain_id
from tahoex1_hf.cells.gene_symbols import Table, read_gene_symbols, read_orthologs
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

if TYPE_CHECKING:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

TAHOE_100M_GENES = "hf://datasets/tahoebio/Tahoe-100M/metadata/gene_metadata.parquet"


@dataclass(frozen=True)
class GeneOptions:
    """Options that say where an input has its genes and counts.

    Attributes:
        gene_id_column: Column of `var` with Ensembl ids; "id" or "name" for 10x files. By default `var_names` and all
            columns are searched for ids.
        gene_symbols: Gene symbol -> Ensembl id (or several ids, one of which is in the vocabulary), or the path of a
            table with both, for genes that are named by symbol; by default the package's table.
        layer: Layer with the counts. "raw" is the layer of that name, or `.raw` with its genes if there is no such
            layer; "X" is always `X`. By default `X`; if it does not hold counts, see `other_counts`.
        gene_metadata: Gene table of files in the format of Tahoe-100M, by default that of Tahoe-100M itself.
        min_known_genes: Smallest fraction of the genes that must be in the vocabulary. For mouse genes half of it is
            enough, since many of them have no orthologue. If it is given, files that mix gene symbols with ids are
            refused, too. By default one gene in a hundred is enough.
        species: Species of the cells, "human" or "mouse"; mouse genes need `orthologs`.
        orthologs: Mouse gene (Ensembl id or symbol) -> Ensembl ids of human orthologues, or the path of a table.
        other_counts: Action if `X` does not hold counts, but the layer `counts` or `raw_counts`, or `raw`, does:
            "take" uses these counts, "refuse" raises an error, and "leave" uses `X`.
    """

    gene_id_column: str | None = None
    gene_symbols: Table | str | Path | None = None
    layer: str | None = None
    gene_metadata: str = TAHOE_100M_GENES
    min_known_genes: float | None = None
    species: str = "human"
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None
    other_counts: Literal["take", "refuse", "leave"] = "take"

    def __post_init__(self) -> None:
        if self.species not in ("human", "mouse"):
            raise ValueError(f'species={self.species!r}: pass "human" or "mouse".')
        if (self.species == "mouse") != (self.orthologs is not None):
            raise ValueError(
                f"species={self.species!r} and orthologs={'a table' if self.orthologs else None}: cells of a mouse "
                'need both, species="mouse" (--species mouse) and orthologs= (--orthologs), a table of mouse genes '
                "and their human orthologues."
            )

    def symbols(self) -> Table | None:
        """Return symbol -> Ensembl id, and read it from a file if `gene_symbols` is a path; None without a table."""
        if self.gene_symbols is None or isinstance(self.gene_symbols, Mapping):
            return self.gene_symbols
        return read_gene_symbols(self.gene_symbols)

    def human_genes(self) -> Mapping[str, Sequence[str]] | None:
        """Return mouse gene -> Ensembl ids of human genes, and read it from a file if `orthologs` is a path."""
        if self.orthologs is None or isinstance(self.orthologs, Mapping):
            return self.orthologs
        return read_orthologs(self.orthologs)


def known_symbols(tokenizer: "TahoeX1Tokenizer", options: GeneOptions) -> dict[str, str] | None:
    """Return the user's symbols, each with the one Ensembl id that is in the vocabulary; None without a table."""
    table = options.symbols()
    if table is None:
        return None
    several = {symbol: [genes] if isinstance(genes, str) else list(genes) for symbol, genes in table.items()}
    known = {symbol: [gene for gene in genes if tokenizer.gene_token(gene) >= 0] for symbol, genes in several.items()}
    return {symbol: (known[symbol] or genes)[-1] for symbol, genes in several.items()}


def matched_genes(tokenizer: "TahoeX1Tokenizer", names: Sequence[str], options: GeneOptions) -> GeneMatch:
    """Look up the Ensembl ids of a dataset that has its own table of genes.

    Raises:
        BadInput: If too few ids are in the vocabulary, or ids are mixed with symbols.
    """
    try:
        match = tokenizer.match_genes(names)
    except ValueError as error:
        raise BadInput(str(error)) from None
    check_known(match.token_ids, names, options, mixed=True)
    return match


def check_known(tokens: np.ndarray, names: Sequence[str], options: GeneOptions, mixed: bool) -> None:
    """Raise BadInput if a smaller share than `options.min_known_genes` is known, or ids and symbols are mixed.

    Args:
        tokens: `(genes,)` token of each gene; -1 for unknown genes.
        names: Names of the genes.
        options: Options with `min_known_genes`.
        mixed: Whether to look for symbols among the ids.
    """
    if options.min_known_genes is None:
        return
    known = tokens >= 0
    least = options.min_known_genes * (0.5 if options.species == "mouse" else 1)
    if known.mean() < least:
        unknown = [str(name) for name, k in zip(names, known, strict=True) if not k]
        raise BadInput(
            f"{known.sum()} of {len(known)} genes are in the vocabulary, less than min_known_genes="
            f"{least}; unknown are, for example, {unknown[:5]}. Map the genes "
            "to the ids of the vocabulary, or lower min_known_genes."
        )
    strange = [str(name) for name, k in zip(names, known, strict=True) if not k and plain_id(str(name)) is None]
    if mixed and len(strange) > 0.05 * len(known):
        raise BadInput(
            f"the gene ids are mixed: {known.sum()} are in the vocabulary, and {len(strange)} of {len(known)} are not "
            f"Ensembl ids, for example {strange[:5]}. Give gene_symbols, a table symbol -> Ensembl id, or "
            "gene_id_column, a column with Ensembl ids."
        )
