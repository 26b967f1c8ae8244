# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Finding the genes of an input: where their names stand, and how many of them must be known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tahoex1_hf.cells.gene_symbols import read_gene_symbols
from tahoex1_hf.cells.readers.base import BadInput
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

if TYPE_CHECKING:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

TAHOE_100M_GENES = "hf://datasets/tahoebio/Tahoe-100M/metadata/gene_metadata.parquet"


@dataclass(frozen=True)
class GeneOptions:
    """Where an input has its genes and counts.

    Attributes:
        gene_id_column: column of `var` with Ensembl ids, `var_names` by default; for 10x files "id" (the default) or
            "name".
        gene_symbols: gene symbol -> Ensembl id, or the path of a CSV file with both, for genes named by symbol.
        layer: layer with the counts, `X` by default. "raw" is a layer of that name, or else `.raw` with its genes.
        gene_metadata: gene table of files in the form of Tahoe-100M, that dataset's own by default.
        min_known_genes: least fraction of the genes that must be in the vocabulary; files in which gene symbols are
            mixed with ids are then refused, too. By default one in a hundred is enough.
    """

    gene_id_column: str | None = None
    gene_symbols: Mapping[str, str] | str | Path | None = None
    layer: str | None = None
    gene_metadata: str = TAHOE_100M_GENES
    min_known_genes: float | None = None

    def symbols(self) -> Mapping[str, str] | None:
        """Return gene symbol -> Ensembl id, read from its file where a file is named."""
        if self.gene_symbols is None or isinstance(self.gene_symbols, Mapping):
            return self.gene_symbols
        return read_gene_symbols(self.gene_symbols)


def matched_genes(tokenizer: "TahoeX1Tokenizer", names: Sequence[str], options: GeneOptions) -> GeneMatch:
    """Look up genes by name.

    Raises:
        BadInput: where too few of them are in the vocabulary, or ids are mixed with symbols.
    """
    try:
        match = tokenizer.match_genes(names, gene_symbols=options.symbols())
    except ValueError as error:
        raise BadInput(str(error)) from None
    check_known(match, names, options)
    return match


def check_known(match: GeneMatch, names: Sequence[str], options: GeneOptions) -> None:
    """Raise BadInput where fewer than `options.min_known_genes` are known, or ids and symbols are mixed."""
    if options.min_known_genes is None:
        return
    known = match.token_ids >= 0
    if known.mean() < options.min_known_genes:
        raise BadInput(
            f"{known.sum()} of {len(known)} genes are in the vocabulary, less than min_known_genes="
            f"{options.min_known_genes}; unknown are, for example, {list(match.unknown_examples)}. Map the genes "
            "to the ids of the vocabulary, or lower min_known_genes."
        )
    strange = [str(name) for name, k in zip(names, known, strict=True) if not k and not str(name).startswith("ENS")]
    if options.gene_symbols is None and len(strange) > 0.05 * len(known):
        raise BadInput(
            f"the gene ids are mixed: {known.sum()} are in the vocabulary, and {len(strange)} of {len(known)} are not "
            f"Ensembl ids, for example {strange[:5]}. Give gene_symbols, a table symbol -> Ensembl id, or "
            "gene_id_column, a column with Ensembl ids."
        )
