# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 report`."""

from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.options import Dtype
from tahoex1_hf.cli.running import command, quick_imports


@command(extra="data,report")
def report(
    cells: Annotated[Path, typer.Argument(metavar="CELLS.h5ad", help="Cells with raw counts.")],
    output: Annotated[Path, typer.Option(metavar="PAGE.html", help="The page.")],
    model: options.Model,
    reference: Annotated[
        Path | None, typer.Option(metavar="REF.h5ad", help="Annotated cells of the same tissue, with raw counts.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column of the reference's obs with the labels.")] = None,
    color: Annotated[
        str | None, typer.Option(help="Column of obs by which the maps are drawn, too; at most 40 different values.")
    ] = None,
    max_cells: Annotated[
        int, typer.Option(help="Most cells of the page, a random sample; also of the reference.")
    ] = 5000,
    markers: Annotated[int, typer.Option(help="Most marker genes of a cluster.")] = 8,
    draws: Annotated[
        int,
        typer.Option(
            min=1, help="Samples of each cell longer than the context, by which the sampling noise is measured."
        ),
    ] = 2,
    score: Annotated[
        bool, typer.Option("--score", help="Score how surprising the cells are; needs the pretraining head.")
    ] = False,
    size: options.Size = None,
    revision: options.Revision = None,
    gene_id_column: options.GeneIdColumn = None,
    gene_symbols: options.GeneSymbols = None,
    species: options.CellSpecies = options.Species.human,
    orthologs: options.Orthologs = None,
    layer: options.Layer = None,
    max_length: options.MaxLength = None,
    overflow: options.Overflow = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 where the hardware is faster at it. int8: weights of 8 bits.")
    ] = Dtype.auto,
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
    seed: options.Seed = 0,
    restart: options.Restart = False,
) -> str:
    """Write one HTML page about cells and their embeddings, to be handed on as it is.

    What went in and what was lost, maps by embedding and by PCA, clusters with marker genes, labels of a reference,
    sampling noise, and how to repeat it. The page has no scripts and loads nothing. The same command resumes a run
    that was stopped.
    """
    with quick_imports():
        from tahoex1_hf.inference.encoder import choose_device
        from tahoex1_hf.reporting.making import Request, write_page

    Request(cells, output, reference, label, color, max_cells, markers).check()
    choose_device(device)
    write_page(
        cells,
        output,
        model,
        reference=reference,
        label=label,
        color=color,
        max_cells=max_cells,
        markers=markers,
        draws=draws,
        score=score,
        size=size,
        revision=revision,
        layer=layer,
        gene_id_column=gene_id_column,
        gene_symbols=gene_symbols,
        species=species.value,
        orthologs=orthologs,
        max_length=max_length,
        overflow=overflow and overflow.value,
        seed=seed,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype.value,
        restart=restart,
    )
    return f"Wrote {output}"
