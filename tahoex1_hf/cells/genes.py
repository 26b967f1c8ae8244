# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Where an input has its genes and counts, and how many of the genes must be known."""

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
    """Where an input has its genes and counts.

    Attributes:
        gene_id_column: column of `var` with Ensembl ids, for 10x files "id" or "name"; by default they are looked for
            in `var_names` and in all columns.
        gene_symbols: gene symbol -> Ensembl id (or several, of which the vocabulary knows one), or the path of a table
            with both, for genes named by symbol; by default the package's table.
        layer: layer with the counts. "raw" is a layer of that name, or else `.raw` with its genes; "X" is `X` in any
            case. By default `X`, and where it holds no counts, see `other_counts`.
        gene_metadata: gene table of files in the form of Tahoe-100M, that dataset's own by default.
        min_known_genes: least fraction of the genes that must be in the vocabulary (half of it for those of a mouse,
            of which many have no orthologue); files in which gene symbols are mixed with ids are then refused, too.
            By default one in a hundred is enough.
        species: species of the cells, "human" or "mouse"; genes of a mouse need `orthologs`.
        orthologs: mouse gene (Ensembl id or symbol) -> Ensembl ids of human orthologues, or the path of a table.
        other_counts: what to do where `X` holds no counts, and the layer `counts` or `raw_counts`, or `raw`, does:
            "take" them, "refuse" the input, or "leave" them and take `X`.
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
        """Return symbol -> Ensembl id, read from its file where a file is named."""
        if self.gene_symbols is None or isinstance(self.gene_symbols, Mapping):
            return self.gene_symbols
        return read_gene_symbols(self.gene_symbols)

    def human_genes(self) -> Mapping[str, Sequence[str]] | None:
        """Return mouse gene -> Ensembl ids of human genes, read from its file where a file is named."""
        if self.orthologs is None or isinstance(self.orthologs, Mapping):
            return self.orthologs
        return read_orthologs(self.orthologs)


def known_symbols(tokenizer: "TahoeX1Tokenizer", options: GeneOptions) -> dict[str, str] | None:
    """Return the user's symbols with one Ensembl id each, the one that the vocabulary knows; None without a table."""
    table = options.symbols()
    if table is None:
        return None
    several = {symbol: [genes] if isinstance(genes, str) else list(genes) for symbol, genes in table.items()}
    known = {symbol: [gene for gene in genes if tokenizer.gene_token(gene) >= 0] for symbol, genes in several.items()}
    return {symbol: (known[symbol] or genes)[-1] for symbol, genes in several.items()}


def matched_genes(tokenizer: "TahoeX1Tokenizer", names: Sequence[str], options: GeneOptions) -> GeneMatch:
    """Look up the Ensembl ids of a dataset that has its own table of genes.

    Raises:
        BadInput: where too few of them are in the vocabulary, or ids are mixed with symbols.
    """
    try:
        match = tokenizer.match_genes(names)
    except ValueError as error:
        raise BadInput(str(error)) from None
    check_known(match.token_ids, names, options, mixed=True)
    return match


def check_known(tokens: np.ndarray, names: Sequence[str], options: GeneOptions, mixed: bool) -> None:
    """Raise BadInput where fewer than `options.min_known_genes` are known, or ids and symbols are mixed."""
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
