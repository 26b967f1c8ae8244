# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 impute`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.options import Dtype, UnknownDrugsRule
from tahoex1_hf.cli.running import command, quick_imports


class Unit(StrEnum):
    """Unit of the layer."""

    model = "model"
    counts = "counts"


@command(extra="data,train")
def impute(
    cells: Annotated[Path, typer.Argument(metavar="CELLS.h5ad", help="Cells with raw counts.")],
    output: Annotated[
        Path, typer.Option(metavar="OUT.h5ad", help="The cells with the layer added; may be the cells' file.")
    ],
    model: options.Model,
    genes: Annotated[
        str | None,
        typer.Option(
            help="Genes to predict in every cell: names separated by commas, or a file with a name per line.",
            show_default="those that the cell expresses",
        ),
    ] = None,
    unit: Annotated[
        Unit,
        typer.Option(
            help="model: what the model predicts, in most models bins of the cell's own counts. counts: the count "
            "that stands at that place among the cell's own."
        ),
    ] = Unit.model,
    layer_added: Annotated[str, typer.Option(help="Name of the new layer.")] = "tahoe_x1_expected",
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for the report of the test.", show_default="OUT.h5ad.imputation"),
    ] = None,
    size: options.Size = None,
    revision: options.Revision = None,
    gene_id_column: options.GeneIdColumn = None,
    gene_symbols: options.GeneSymbols = None,
    species: options.CellSpecies = options.Species.human,
    orthologs: options.Orthologs = None,
    layer: options.Layer = None,
    drugs: options.Drugs = None,
    unknown_drugs: options.UnknownDrugs = UnknownDrugsRule.pad,
    max_length: options.MaxLength = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 where the hardware is faster at it. int8: weights of 8 bits.")
    ] = Dtype.auto,
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
    seed: options.Seed = 0,
    restart: options.Restart = False,
) -> str:
    """Write the expected expression of genes into a layer, and test it on genes that are held out.

    A gene is hidden from the model while it is predicted. A report says whether the model beats each gene's mean and
    kNN smoothing on these cells. The same command resumes a run that was stopped.
    """
    with quick_imports():
        from tahoex1_hf.cli.perturb import read_genes
        from tahoex1_hf.imputation.running import check_files, impute_file
        from tahoex1_hf.inference.encoder import choose_device

    check_files(cells, output, layer_added)
    choose_device(device)
    names = None if genes is None else read_genes(genes)
    if isinstance(names, str):
        raise ValueError("genes=all (--genes): name genes, or leave the option out for the genes of each cell.")
    test = impute_file(
        cells,
        output,
        model,
        genes=names,
        unit=unit.value,
        layer_added=layer_added,
        report=report,
        size=size,
        revision=revision,
        layer=layer,
        gene_id_column=gene_id_column,
        gene_symbols=gene_symbols,
        species=species.value,
        orthologs=orthologs,
        drugs=drugs,
        unknown_drugs=unknown_drugs.value,
        max_length=max_length,
        seed=seed,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype.value,
        restart=restart,
    )
    verdict = "It was not tested: too few cells." if test is None else " ".join(test.verdicts)
    return f"Wrote {output}: layers[{layer_added!r}]. {verdict}"
