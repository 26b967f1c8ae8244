# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The commands `tahoex1 index build` and `tahoex1 index query`."""

from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.options import Dtype
from tahoex1_hf.cli.running import NOTHING_WRITTEN, command, quick_imports

index = typer.Typer(
    help="Index embeddings on disk, and find the cells that are nearest to others.", no_args_is_help=True
)


@index.command("build")
@command(extra="data,index")
def build(
    embeddings: Annotated[
        list[Path],
        typer.Argument(
            metavar="EMBEDDINGS...", help="What tahoex1 embed has written: .parquet, also wide, .h5ad or .zarr."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the index; cells are added to one that is there.")
    ],
    key: Annotated[str, typer.Option(help="Slot of obsm, or column of embeddings.")] = "X_tahoe_x1",
    recall: Annotated[
        float, typer.Option(help="Least share of the true 50 nearest cells that a search must find, on a sample.")
    ] = 0.98,
) -> str:
    """Build an index of embeddings, or add embeddings to it; the same command resumes a run that was stopped.

    The index is a LanceDB table with the cells' columns. Embeddings of another model, other settings or another number
    of dimensions are refused.
    """
    with quick_imports():
        from tahoex1_hf.indexing.building import build_index

    return f"{output}: {build_index(list(embeddings), output, key=key, recall=recall)}"


@index.command("query")
@command(extra="data,index", interrupted=NOTHING_WRITTEN)
def query(
    cells: Annotated[
        Path,
        typer.Argument(
            metavar="CELLS", help=".parquet, .h5ad or .zarr with embeddings; or raw counts, if --model is given."
        ),
    ],
    index: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the index.")],
    output: Annotated[Path, typer.Option(metavar="OUT.parquet", help="Table with a row for each cell and neighbour.")],
    neighbours: Annotated[int, typer.Option("--neighbours", "-k", min=1, help="Number of neighbours.")] = 50,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL", help="Filter of the index's cells, as in \"tissue = 'lung' AND `n genes` > 500\"."
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare every cell of the index.")] = False,
    key: Annotated[
        str | None, typer.Option(help="Slot of obsm, or column of embeddings.", show_default="that of the index")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model of the index's cells, for cells that are not embedded yet.",
            show_default="the cells have embeddings",
        ),
    ] = None,
    size: options.Size = None,
    revision: options.Revision = None,
    gene_id_column: options.GeneIdColumn = None,
    gene_symbols: options.GeneSymbols = None,
    species: options.CellSpecies = options.Species.human,
    orthologs: options.Orthologs = None,
    layer: options.Layer = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 where the hardware is faster at it. int8: weights of 8 bits.")
    ] = Dtype.auto,
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
) -> str:
    """Find the cells of an index that are nearest to others.

    Writes a table (query cell, rank, distance, neighbour, the index's columns) and OUT.parquet.md, a summary of each
    column.
    """
    with quick_imports():
        from tahoex1_hf.indexing.querying import query_index

    found = query_index(
        cells,
        index,
        output,
        k=neighbours,
        where=where,
        exact=exact,
        key=key,
        model=model,
        size=size,
        revision=revision,
        layer=layer,
        gene_id_column=gene_id_column,
        gene_symbols=gene_symbols,
        species=species.value,
        orthologs=orthologs,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype.value,
    )
    return f"{found.text}\n\nWrote {output}"
