# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 perturb`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.options import Dtype, UnknownDrugsRule
from tahoex1_hf.cli.running import command, quick_imports


class Mode(StrEnum):
    """How the count of a perturbed gene changes."""

    delete = "delete"
    overexpress = "overexpress"
    percentile = "percentile"
    set = "set"


def read_genes(genes: str) -> list[str] | str:
    """Read the option `--genes`: `all`, names separated by commas, or a file with a name per line.

    Raises:
        ValueError: If it names no gene.
    """
    if genes == "all":
        return genes
    path = Path(genes)
    names = path.read_text(encoding="utf-8").split() if path.is_file() else genes.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f'genes={genes!r} names no gene: pass "all", names separated by commas, or a file of names.')
    return names


@command()
def perturb(
    source: Annotated[
        Path, typer.Argument(metavar="IN.h5ad", exists=True, dir_okay=False, help="Cells with raw counts.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The ranked table: .csv or .parquet.")],
    model: Annotated[
        str, typer.Option(help="Folder or Hub repository of the model, or a folder with an adapter of this package.")
    ],
    genes: Annotated[
        str, typer.Option(help='Names separated by commas, a file with a name per line, or "all" expressed genes.')
    ],
    size: options.Size = None,
    revision: options.Revision = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="New count: 0 (delete), the largest of the cell (overexpress), the percentile --value of the cell's "
            "counts where the gene's is lower (percentile), or --value (set)."
        ),
    ] = Mode.delete,
    value: Annotated[
        float | None, typer.Option(help="Raw count for --mode set, percentile for --mode percentile.")
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="Perturb all the genes at once.")] = False,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Perturb each two of the genes as well, and write here how far the two go beyond the sum of each: "
            ".csv or .parquet."
        ),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(
            help="Cells to perturb: a comparison over columns of obs, as in 'cell_type == \"B\"'; names with blanks "
            "stand between backticks.",
            show_default="all",
        ),
    ] = None,
    groupby: Annotated[str | None, typer.Option(help="Column of obs: rank the genes in each group.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Measure the shift toward the cells that a comparison like that of --cells selects."),
    ] = None,
    expression: Annotated[
        bool,
        typer.Option(
            "--expression", help="Measure the change of predicted expression as well, for four times the work."
        ),
    ] = False,
    affected: Annotated[
        Path | None,
        typer.Option(help="With --expression: file for the most affected genes, .csv or .parquet."),
    ] = None,
    num_affected: Annotated[int, typer.Option(help="Number of affected genes to list for each perturbation.")] = 20,
    plot: Annotated[Path | None, typer.Option(help="File for a picture of the ranking, .png.")] = None,
    heat_map: Annotated[
        Path | None,
        typer.Option(help="File for a heat map of genes and groups, or with --pairs of genes and genes, .png."),
    ] = None,
    null_genes: Annotated[
        int, typer.Option(help="Number of genes of similar expression to perturb for comparison; 0 for none.")
    ] = 50,
    most_null_genes: Annotated[
        int | None,
        typer.Option(
            help="Most such genes for a gene that few of them match; their number is doubled until ten do.",
            show_default="20 times --null-genes",
        ),
    ] = None,
    min_cells: Annotated[
        int, typer.Option(help="Fewest cells that express a gene; rarer genes are not compared, nor part of 'all'.")
    ] = 10,
    gene_id_column: options.GeneIdColumn = None,
    gene_symbols: options.GeneSymbols = None,
    species: options.CellSpecies = options.Species.human,
    orthologs: options.Orthologs = None,
    layer: options.Layer = None,
    drugs: options.Drugs = None,
    unknown_drugs: options.UnknownDrugs = UnknownDrugsRule.error,
    max_length: options.MaxLength = None,
    overflow: options.Overflow = None,
    dtype: Annotated[
        Dtype, typer.Option(help="bfloat16 moves the embeddings as far as many perturbations do.")
    ] = Dtype.float32,
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
    seed: options.Seed = 0,
    restart: options.Restart = False,
) -> str:
    """Delete, overexpress or set genes in cells, and rank the genes by how far the cells' embeddings move.

    Finished genes are kept in OUT.partial, from which the same command resumes after a stop.
    """
    with quick_imports():
        from tahoex1_hf.hub.models import model_and_tokenizer
        from tahoex1_hf.inference.encoder import choose_device
        from tahoex1_hf.perturbation.heat_map import plot_heat_map
        from tahoex1_hf.perturbation.plot import check_plot, plot_ranking
        from tahoex1_hf.perturbation.run import perturb_genes
        from tahoex1_hf.perturbation.tables import check_table, write_table

    partial = output.with_name(f"{output.name}.partial")
    for table in filter(None, (output, affected, pairs)):
        check_table(table)
    for figure in filter(None, (plot, heat_map)):
        check_plot(figure)
    if affected is not None and not expression:
        raise ValueError("--affected needs --expression.")
    choose_device(device)
    loaded, tokenizer = model_and_tokenizer(model, size=size, revision=revision, expression=expression)
    result = perturb_genes(
        source,
        loaded,
        tokenizer,
        read_genes(genes),
        mode=mode.value,
        value=value,
        together=together,
        pairs=pairs is not None,
        cells=cells,
        groupby=groupby,
        target=target,
        expression=expression,
        num_affected=num_affected,
        null_genes=null_genes,
        most_null_genes=most_null_genes,
        min_cells=min_cells,
        layer=layer,
        gene_id_column=gene_id_column,
        gene_symbols=gene_symbols,
        species=species.value,
        orthologs=orthologs,
        drugs=drugs,
        unknown_drugs=unknown_drugs.value,
        max_length=max_length,
        overflow=overflow and overflow.value,
        seed=seed,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype.value,
        partial=partial,
        restart=restart,
    )
    places = {output: result.table, affected: result.affected, pairs: result.interactions}
    for place, made in places.items():
        if place is not None and made is not None:
            write_table(made, place)
    if plot is not None:
        plot_ranking(result.table, plot)
    if heat_map is not None:
        plot_heat_map(result.table, heat_map, result.interactions)
    partial.unlink(missing_ok=True)
    return f"Wrote {', '.join(str(path) for path in (output, affected, pairs, plot, heat_map) if path is not None)}"
