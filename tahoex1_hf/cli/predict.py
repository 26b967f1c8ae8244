# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 predict`."""

from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.options import FloatDtype, UnknownDrugsRule
from tahoex1_hf.cli.running import NOTHING_WRITTEN, command, quick_imports


@command(extra="data,train", interrupted=NOTHING_WRITTEN)
def predict(
    source: Annotated[Path, typer.Argument(metavar="IN.h5ad", help="Cells with raw counts.")],
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT.h5ad", help="The input with the predictions added; may be the same file."),
    ],
    adapter: Annotated[str | None, typer.Option(help="Folder or Hub repository of an adapter.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead: folder or Hub repository of a model fine-tuned as a whole.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or Hub repository of the adapter's base.", show_default="that of the adapter"),
    ] = None,
    size: options.Size = None,
    gene_id_column: Annotated[
        str | None,
        typer.Option(help='Column of var that holds the Ensembl ids; "" for var_names.', show_default="as trained"),
    ] = None,
    gene_symbols: options.GeneSymbols = None,
    species: options.CellSpecies = options.Species.human,
    orthologs: options.Orthologs = None,
    layer: Annotated[
        str | None, typer.Option(help='Layer that holds the raw counts; "" for X.', show_default="as trained")
    ] = None,
    drugs: Annotated[
        str | None,
        typer.Option(
            help='Column of obs that holds the drugs, or one drug for all cells; "" for none.',
            show_default="as trained",
        ),
    ] = None,
    unknown_drugs: Annotated[
        UnknownDrugsRule | None,
        typer.Option(
            help="Drugs that the model's table lacks: pad counts their cells as cells without a drug, error refuses "
            "them.",
            show_default="as trained",
        ),
    ] = None,
    drug_table: options.DrugTable = None,
    overflow: options.Overflow = None,
    draws: options.Draws = 1,
    dtype: Annotated[
        FloatDtype, typer.Option(help="auto: bfloat16 where the hardware is faster at it.")
    ] = FloatDtype.auto,
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
) -> str:
    """Predict classes, or numbers, for the cells of a file with a fine-tuned model.

    Writes obs["tahoex1_<label>"]; for classes also obsm["tahoex1_<label>_probabilities"], whose columns are in the
    order of uns["tahoex1_<label>"]["classes"].
    """
    if (adapter is None) == (model is None):
        raise ValueError("pass --adapter, or --model for a model that was fine-tuned as a whole.")
    if base is not None and adapter is None:
        raise ValueError("--base goes with --adapter.")
    with quick_imports():
        from tahoex1_hf.finetuning.cells.predicting import check_files, predict_files
        from tahoex1_hf.inference.encoder import choose_device

    check_files(source, output)
    choose_device(device)
    column = predict_files(
        source,
        output,
        adapter or str(model),
        base=base,
        size=size,
        layer=layer,
        gene_id_column=gene_id_column,
        gene_symbols=gene_symbols,
        species=species.value,
        orthologs=orthologs,
        drugs=drugs,
        unknown_drugs=unknown_drugs and unknown_drugs.value,
        drug_table=drug_table,
        overflow=overflow and overflow.value,
        draws=draws,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype.value,
    )
    return f"Wrote {output}: obs[{column!r}]"
