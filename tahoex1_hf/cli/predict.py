# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 predict`."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Precision(StrEnum):
    """Precision of the matrix products."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def predict(
    source: Annotated[Path, typer.Argument(metavar="IN.h5ad", help="Cells with raw counts.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT.h5ad", help="The input plus the predictions; may be the same file.")
    ],
    adapter: Annotated[str | None, typer.Option(help="Folder or Hub repository of an adapter.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead: folder or Hub repository of a model fine-tuned as a whole.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the adapter's base is now.", show_default="where the adapter says")
    ] = None,
    gene_id_column: Annotated[
        str | None, typer.Option(help='Column of var with Ensembl ids; "" for var_names.', show_default="as trained")
    ] = None,
    gene_symbols: Annotated[
        Path | None, typer.Option(help="CSV with the columns symbol, Ensembl id, for genes named by symbol.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help='Layer with the counts; "" for X.', show_default="as trained")
    ] = None,
    drugs: Annotated[
        str | None,
        typer.Option(
            help='Column of obs with drugs, or one drug for all cells; "" for none.', show_default="as trained"
        ),
    ] = None,
    dtype: Annotated[
        Precision, typer.Option(help="auto: bfloat16 where the hardware is faster at it.")
    ] = Precision.auto,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.", show_default="the fastest there is")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per batch; less needs less memory.", show_default="fit for the device")
    ] = None,
) -> None:
    """Predict classes, or numbers, for the cells of a file with a fine-tuned model.

    Writes obs["tahoex1_<label>"]; for classes also obsm["tahoex1_<label>_probabilities"], whose columns are in the
    order of uns["tahoex1_<label>"]["classes"].
    """
    if (adapter is None) == (model is None):
        typer.echo("Error: pass --adapter, or --model for a model that was fine-tuned as a whole.", err=True)
        raise typer.Exit(1)
    if base is not None and adapter is None:
        typer.echo("Error: --base goes with --adapter.", err=True)
        raise typer.Exit(1)
    # What the command needs is imported here, so that --help answers at once.
    try:
        from tahoex1_hf.finetuning.cells.predicting import check_files, load_predictor, predict_file
    except ImportError as error:
        typer.echo(f"Error: {error.name} is missing: pip install 'tahoex1_hf[data,train]'.", err=True)
        raise typer.Exit(1) from None
    from tahoex1_hf.cells.gene_symbols import read_gene_symbols

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        check_files(source, output)
        column = predict_file(
            source,
            output,
            load_predictor(adapter or str(model), base),
            layer=layer,
            gene_id_column=gene_id_column,
            gene_symbols=read_gene_symbols(gene_symbols),
            drugs=drugs,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype.value,
        )
    except (ImportError, OSError, ValueError) as error:  # ImportError: names the extra
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("Stopped; nothing was written.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"Wrote {output}: obs[{column!r}]")
