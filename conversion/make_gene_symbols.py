"""Make the table of gene symbols that the package carries, `tahoex1_hf/cells/gene_symbols.tsv.gz`.

python conversion/make_gene_symbols.py GENE_METADATA.parquet [ALIASES.csv ...]

The first table is Tahoe-100M's `metadata/gene_metadata.parquet` (CC0), the genes of the released vocabulary. Further
tables (a symbol and an Ensembl id in each line) add other symbols of these genes, where they mean one gene only and
are no symbol of another. For the table in the repository: examples/pbmc68k_symbol_to_ensembl.csv, which has 43 old
symbols, and GENCODE 44's genes (`Gene_id2name.csv` in the wheel of celltypist 1.7.1), which has 599 newer ones. HGNC's
lists of aliases and previous symbols would be the third: no package that can be installed carries them.
"""

import gzip
import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from tahoex1_hf.cells.gene_symbols import RELEASED, read_gene_symbols

HEADER = (
    "# Gene symbols of Tahoe-100M's gene metadata (CC0), and of GENCODE 44 and some old ones where they mean one "
    "gene; conversion/make_gene_symbols.py\n"
)


def make(
    metadata: Path,
    aliases: Annotated[list[Path] | None, typer.Argument()] = None,
    output: Annotated[Path, typer.Option()] = RELEASED,
) -> None:
    """Write the table."""
    genes = pd.read_parquet(metadata, columns=["gene_symbol", "ensembl_id"])
    known = set(genes["ensembl_id"])
    named = genes[genes["gene_symbol"] != genes["ensembl_id"]]  # genes without a symbol
    table = dict(zip(named["gene_symbol"], named["ensembl_id"], strict=True))
    added = {}
    for path in aliases or ():
        for symbol, gene in (read_gene_symbols(path) or {}).items():
            if isinstance(gene, str) and gene in known and symbol not in table:
                added[symbol] = gene if added.get(symbol, gene) == gene else ""
    table |= {symbol: gene for symbol, gene in added.items() if gene}
    lines = [f"{symbol}\t{int(gene[4:])}\n" for symbol, gene in sorted(table.items())]
    output.write_bytes(gzip.compress((HEADER + "".join(lines)).encode(), 9, mtime=0))
    logging.info("Wrote %s: %d symbols, %d of them from %s", output, len(table), len(added), aliases)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    typer.run(make)
