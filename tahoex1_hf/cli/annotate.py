# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 annotate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.options import Dtype
from tahoex1_hf.cli.running import command, quick_imports


@command(extra="data,train")
def annotate(
    query: Annotated[Path, typer.Argument(metavar="QUERY.h5ad", help="Cells to annotate, with raw counts.")],
    label: Annotated[str, typer.Option(help="Column of the reference's obs, or of the index, with the labels.")],
    output: Annotated[
        Path,
        typer.Option(metavar="OUT.h5ad", help="The query with the labels added; may be the query's file."),
    ],
    model: options.Model,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="REF.h5ad",
            help="Annotated cells of the same tissue, with raw counts.",
            show_default="--index is given",
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Index of tahoex1 index build instead of a reference.", show_default="--reference"
        ),
    ] = None,
    query_label: Annotated[
        str | None,
        typer.Option(
            help="Column of the query's obs with labels, by which the annotation is scored.",
            show_default="that of --label, if the query has it",
        ),
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE",
            help="Table with the columns label and joined, which joins names of reference and query; cells of a "
            "label with an empty joined name are left out.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Column of obs with batches, studies or donors: the cross-validation leaves them out, and those that "
            "the query shares with the reference are told of."
        ),
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Number of cells of the reference that vote.")] = 15,
    unknown_share: Annotated[
        float,
        typer.Option(help="Share of the reference's cells that may be called unknown in the cross-validation."),
    ] = 0.05,
    min_cells: Annotated[int, typer.Option(min=2, help="Fewest cells of a class.")] = 5,
    drop_rare: Annotated[
        bool, typer.Option("--drop-rare", help="Leave out classes with fewer cells, instead of refusing them.")
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            help="Slot of obsm whose embeddings are used, such as X_tahoe_x1, if the same model made them with the "
            "same settings.",
            show_default="embed both files",
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="Fine-tuned classifier of cells (adapter, probe or model), whose classes are written beside, and "
            "which is scored in the same table.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for the report, tables and figures.", show_default="OUT.h5ad.annotation"),
    ] = None,
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
    """Annotate cells by the labels of the cells of a reference that are nearest by their embeddings.

    Nothing is trained. Writes obs["tahoex1_<label>"] (the label, or "unknown" far from the reference), its
    _probability, _distance and _nearest, and a report that compares with PCA and with logistic regression.
    """
    with quick_imports():
        from tahoex1_hf.annotation.annotating import annotate_files, check_files
        from tahoex1_hf.inference.encoder import choose_device

    if (reference is None) == (index is None):
        raise ValueError("Name a reference (--reference) or an index (--index), one of the two.")
    check_files(query, reference, output)
    choose_device(device)
    shared: dict[str, Any] = {
        "query_label": query_label,
        "label_map": label_map,
        "batch": batch,
        "neighbours": neighbours,
        "unknown_share": unknown_share,
        "min_cells": min_cells,
        "drop_rare": drop_rare,
        "key": key,
        "report": report,
        "size": size,
        "revision": revision,
        "layer": layer,
        "gene_id_column": gene_id_column,
        "gene_symbols": gene_symbols,
        "species": species.value,
        "orthologs": orthologs,
        "seed": seed,
        "batch_tokens": batch_tokens,
        "device": device,
        "dtype": dtype.value,
        "restart": restart,
    }
    own: dict[str, Any] = {"classifier": classifier, "max_length": max_length, "overflow": overflow and overflow.value}
    if reference is not None:
        found = annotate_files(query, reference, output, model, label, **own, **shared)
    elif index is not None:
        from tahoex1_hf.annotation.saved_index import annotate_from_index

        if given := [name for name, value in own.items() if value is not None]:
            options_given = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"{options_given}: not with --index, whose cells were embedded with settings of their own."
            )
        found = annotate_from_index(query, index, output, model, label, **shared)
    return f"Wrote {output}: obs[{found.column!r}]"
