# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 verify-release`."""

from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import command, quick_imports


@command(extra="data,train")
def verify_release(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the report.")],
    model: Annotated[
        str, typer.Option(help="Folder or Hub repository of the model, converted or in the original layout.")
    ] = "tahoebio/Tahoe-x1",
    size: Annotated[
        str | None, typer.Option(help="Size to take from a model that holds several.", show_default="3b of the Hub's")
    ] = None,
    revision: options.Revision = None,
    cells: Annotated[
        str, typer.Option(help="Cells in the form of Tahoe-100M: Hub dataset, folder, file or glob of Parquet files.")
    ] = "tahoebio/Tahoe-100M",
    embeddings: Annotated[
        str, typer.Option(help="Public embeddings of these cells: Hub dataset, folder, file or glob of Parquet files.")
    ] = "tahoebio/Tahoe-x1-embeddings",
    column: Annotated[
        str, typer.Option(help="Column of the embeddings; it must be of the model's size.")
    ] = "mosaicfm-3b-prod-cont-MFMv2",
    key: Annotated[str, typer.Option(help="Column that names the cell in both.")] = "BARCODE_SUB_LIB_ID",
    drugs: Annotated[str, typer.Option(help="Column of the cells that holds the drugs.")] = "drug",
    gene_metadata: Annotated[
        str | None, typer.Option(help="Gene table of the cells.", show_default="Tahoe-100M's own")
    ] = None,
    num_cells: Annotated[int, typer.Option(min=2, help="Number of cells to compare.")] = 2000,
    samples: Annotated[
        int, typer.Option(min=2, help="Samples of each cell longer than the context, by which our floor is measured.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the choice of cells and of the first sample.")] = 0,
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
    restart: options.Restart = False,
) -> str:
    """Judge released weights: compare our embeddings of public cells with public ones.

    Measures how far two runs of ours lie apart, and says whether the public embeddings are as near as that, as near as
    the best known reproduction, or farther; then it tries causes and ranks them. The same command resumes a run that
    was stopped. Without a network, it works on what is in the Hub's cache, or in folders.
    """
    with quick_imports():
        from tahoex1_hf.cells.genes import TAHOE_100M_GENES
        from tahoex1_hf.embedding.release.running import verify_release as verify
        from tahoex1_hf.embedding.release.sources import PublicData

    data = PublicData(cells, embeddings, column, key, gene_metadata or TAHOE_100M_GENES, drugs)
    verdict = verify(
        output,
        model=model,
        size=size,
        revision=revision,
        data=data,
        num_cells=num_cells,
        samples=samples,
        seed=seed,
        batch_tokens=batch_tokens,
        device=device,
        restart=restart,
    )
    return f"{verdict}\nThe report is in {output}."
