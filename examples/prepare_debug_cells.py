"""Prepare real cells for the debug recipe: scanpy's 700 PBMCs, which need no download, or your own .h5ad file.

python examples/prepare_debug_cells.py data/debug [--h5ad CELLS.h5ad --vocab vocab.json]
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from demo_cells import SYMBOLS_CSV, load_cells, load_gene_symbols

from tahoex1_hf.data.config import parse_config
from tahoex1_hf.data.preparation import prepare


def main(
    output: Annotated[Path, typer.Argument(help="Folder of the dataset.")],
    h5ad: Annotated[Path | None, typer.Option(help="Cells with raw counts, genes by Ensembl id.")] = None,
    vocab: Annotated[Path | None, typer.Option(help="vocab.json for --h5ad.")] = None,
    validation: Annotated[float, typer.Option(help="Share of the cells to keep for validation.")] = 0.15,
) -> None:
    """Prepare the dataset of the debug recipe."""
    if (h5ad is None) != (vocab is None):
        raise typer.BadParameter("--h5ad and --vocab go together.")
    with tempfile.TemporaryDirectory() as folder:
        source = {"kind": "anndata", "paths": [str(h5ad)]}
        if h5ad is None:
            load_cells().write_h5ad(Path(folder) / "pbmc68k_reduced.h5ad")
            source = {"kind": "anndata", "paths": [str(Path(folder) / "pbmc68k_reduced.h5ad")]}
            source["gene_symbols"] = str(SYMBOLS_CSV)
            tokens = ["<pad>", "<cls>", "<eoc>", *sorted(load_gene_symbols().values())]
            tokens += [f"<junk{i}>" for i in range(-len(tokens) % 64)]
            vocab = Path(folder) / "vocab.json"
            vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        settings = {"sources": [source], "output": str(output), "vocab": str(vocab)}
        prepare(parse_config({**settings, "validation": {"fraction": validation}}, "the debug cells"))


if __name__ == "__main__":
    typer.run(main)
