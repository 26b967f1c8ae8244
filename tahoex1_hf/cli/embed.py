# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 embed`."""

from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.options import Dtype, UnknownDrugsRule
from tahoex1_hf.cli.running import command, quick_imports


@command()
def embed(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="IN...",
            help="Cells with raw counts: .h5ad, .zarr, 10x files, folders of these, globs; datasets that tahoex1 "
            "prepare made, local or at hf:// or s3://; Hub datasets like tahoebio/Tahoe-100M.",
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help=".h5ad or .zarr (for a single input of that kind, the input with the embeddings added), .parquet or "
            ".npy (also at s3://).",
        ),
    ],
    model: options.Model,
    size: options.Size = None,
    revision: options.Revision = None,
    gene_id_column: options.GeneIdColumn = None,
    gene_symbols: options.GeneSymbols = None,
    species: options.CellSpecies = options.Species.human,
    orthologs: options.Orthologs = None,
    gene_metadata: Annotated[
        str | None,
        typer.Option(help="Gene table for files like those of Tahoe-100M.", show_default="Tahoe-100M's own"),
    ] = None,
    layer: options.Layer = None,
    drugs: options.Drugs = None,
    unknown_drugs: options.UnknownDrugs = UnknownDrugsRule.pad,
    drug_table: options.DrugTable = None,
    max_length: options.MaxLength = None,
    overflow: options.Overflow = None,
    draws: options.Draws = 1,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 where the hardware is faster at it. int8: weights of 8 bits.")
    ] = Dtype.auto,
    device: options.Device = None,
    batch_tokens: options.BatchTokens = None,
    hidden_layer: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Layer whose output is taken, without the final norm: 0 is what enters the first, -1 the last.",
            show_default="the last, with the norm",
        ),
    ] = None,
    score: Annotated[
        bool,
        typer.Option(
            "--score",
            help="Score how surprising each cell is to the model, in columns of obs that end in _score and _score_sd: "
            "the error at hidden genes, as a share of the cell's variance. Needs the pretraining head.",
        ),
    ] = False,
    score_masks: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Number of masks of --score, each a further pass.", show_default="4"),
    ] = None,
    gene_embeddings: Annotated[
        bool, typer.Option("--gene-embeddings", help="Write mean gene embeddings as well.")
    ] = False,
    gene_kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            help="Gene embeddings to write, with commas between: GE, the input table; TE, after the layers without "
            "any cell; EA, the mean over the cells, as --gene-embeddings.",
        ),
    ] = None,
    cell_gene_embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Table for every cell's gene embeddings: .parquet, a row for each of its genes."
        ),
    ] = None,
    obs: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMNS",
            help="Columns of obs for an output that is no copy of the input, with commas between.",
            show_default="none in .parquet, all in .h5ad and .zarr",
        ),
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="A column for each dimension in .parquet, instead of one column of lists.")
    ] = False,
    key_added: Annotated[
        str, typer.Option(help="Slot of obsm to write, or column of embeddings in .parquet.")
    ] = "X_tahoe_x1",
    seed: options.Seed = 0,
    restart: options.Restart = False,
    full_paths: options.FullPaths = False,
    ray: options.Ray = None,
    min_workers: options.MinWorkers = None,
    max_workers: options.MaxWorkers = None,
) -> str:
    """Embed the cells of files of any size.

    The same command resumes a run that was stopped. With `accelerate launch -m tahoex1_hf embed ...` several
    processes, or machines, share the work; with --ray, the machines of a Ray cluster, some of which may be lost.
    """
    with quick_imports():
        from tahoex1_hf.common.cuda_start import start_cuda

        start_cuda("cpu" if ray else device)  # beside the imports
        from tahoex1_hf.cells.opening import check_paths
        from tahoex1_hf.common.cluster import cluster_options, import_ray
        from tahoex1_hf.embedding.files import embed_files
        from tahoex1_hf.embedding.obs_columns import split_columns
        from tahoex1_hf.embedding.outputs import OutputOptions
        from tahoex1_hf.inference.encoder import choose_device
        from tahoex1_hf.inference.gene_embeddings import gene_kinds as kinds_of
        from tahoex1_hf.inference.scoring import num_masks

    kinds = kinds_of([*(["EA"] if gene_embeddings else []), *(gene_kinds.split(",") if gene_kinds else [])] or False)
    if score_masks is not None and not score:
        raise ValueError(f"score_masks={score_masks} (--score-masks) goes with --score: pass both, or leave it out.")
    masks = num_masks(score_masks or score)
    OutputOptions(
        output, key_added, kinds, draws, split_columns(obs), wide, cell_gene_embeddings, score_masks=masks
    ).check()
    check_paths(sources)
    cluster = cluster_options(ray, min_workers, max_workers)
    if cluster is None:
        choose_device(device)
    else:
        import_ray()
    embed_files(
        sources,
        output,
        model,
        size=size,
        revision=revision,
        key_added=key_added,
        layer=layer,
        gene_id_column=gene_id_column,
        gene_symbols=gene_symbols,
        species=species.value,
        orthologs=orthologs,
        gene_metadata=gene_metadata,
        drugs=drugs,
        unknown_drugs=unknown_drugs.value,
        drug_table=drug_table,
        gene_embeddings=kinds or False,
        cell_gene_embeddings=cell_gene_embeddings,
        obs=obs,
        wide=wide,
        max_length=max_length,
        overflow=overflow and overflow.value,
        draws=draws,
        seed=seed,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype.value,
        hidden_layer=hidden_layer,
        score=masks,
        restart=restart,
        full_paths=full_paths,
        cluster=cluster,
    )
    return f"Wrote {output}" if cell_gene_embeddings is None else f"Wrote {output} and {cell_gene_embeddings}"
