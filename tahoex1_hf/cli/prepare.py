# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 prepare`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import command, quick_imports


class Format(StrEnum):
    """File format of the shards."""

    arrow = "arrow"
    parquet = "parquet"


@command(errors=(RuntimeError,))
def prepare(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help=".h5ad files, .zarr stores, 10x .h5 files or matrix folders; folders with such files; globs.",
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the dataset, or s3://, gs:// and the like.")] = None,
    vocab: Annotated[str | None, typer.Option(help="The model's vocab.json.")] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="YAML file that names sources and settings, in place of INPUT; or a recipe of the package "
            "(tahoex1 recipes).",
        ),
    ] = None,
    num_proc: Annotated[int, typer.Option(help="Processes; the result is the same for any number.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of shuffling and split.", show_default="0")] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of the cells to keep for validation.", show_default="0.01")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(help="Column of obs to keep, or NEW=OLD; _index is the cell's name. Can be repeated."),
    ] = None,
    gene_id_column: options.GeneIdColumn = None,
    gene_symbols: options.GeneSymbols = None,
    species: options.CellSpecies = options.Species.human,
    orthologs: options.Orthologs = None,
    layer: options.Layer = None,
    format: Annotated[Format | None, typer.Option(help="File format of the shards.", show_default="arrow")] = None,
    full_paths: options.FullPaths = False,
    ray: options.Ray = None,
    max_workers: options.MostTasks = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where the output folder holds a dataset.")
    ] = False,
) -> str:
    """Turn single-cell files into a shuffled Arrow dataset for training.

    The same command resumes a run that was stopped. With --ray, the machines of a Ray cluster do the work.
    """
    with quick_imports():
        from tahoex1_hf.common.cluster import cluster_options
        from tahoex1_hf.data.config import parse_config, read_config
        from tahoex1_hf.data.preparation import prepare as prepare_dataset

    simple: dict[str, Any] = {
        "metadata": metadata,
        "gene_id_column": gene_id_column,
        "gene_symbols": None if gene_symbols is None else str(gene_symbols),
        "species": None if species is options.Species.human else species.value,
        "orthologs": None if orthologs is None else str(orthologs),
        "layer": layer,
    }
    common = {
        "output": output,
        "vocab": vocab,
        "seed": seed,
        "format": format.value if format else None,
        "validation": None if validation_fraction is None else {"fraction": validation_fraction},
    }
    if config is not None:
        misplaced = ["INPUT"] if inputs else []
        misplaced += [f"--{name.replace('_', '-')}" for name, value in simple.items() if value]
        if misplaced:
            raise ValueError(f"{misplaced[0]} and --config exclude each other: name the sources in the file.")
        parsed = read_config(config, **common)
    else:
        given = {key: value for key, value in common.items() if value is not None}
        parsed = parse_config({**given, "sources": simple_sources(inputs or [], **simple)}, "tahoex1 prepare")
    cluster = cluster_options(ray, None, max_workers)
    try:
        manifest = prepare_dataset(parsed, num_proc, overwrite, full_paths, cluster)
    except (ValueError, FileNotFoundError) as error:
        if config is None or Path(config).name in str(error):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error}\nThe settings are those of {config}.") from error
    return _summary(parsed.output, manifest)


def simple_sources(
    inputs: list[str],
    metadata: list[str] | None = None,
    gene_id_column: str | None = None,
    gene_symbols: str | None = None,
    layer: str | None = None,
    species: str | None = None,
    orthologs: str | None = None,
) -> list[dict[str, Any]]:
    """Return the sources that a command line names; the kind of each follows from its name or its content.

    Raises:
        ValueError: If there is no input, or an input whose kind cannot be told.
        FileNotFoundError: If an input does not exist.
    """
    from tahoex1_hf.cells.opening import local_kind
    from tahoex1_hf.cells.readers.paths import expand_paths

    if not inputs:
        raise ValueError("name files to prepare, or --config.")
    names = [pair.partition("=") for pair in metadata or ()]
    options: dict[str, Any] = {"metadata": {new: old or new for new, _, old in names}}
    options |= {"gene_id_column": gene_id_column, "gene_symbols": gene_symbols}
    options |= {name: value for name, value in (("species", species), ("orthologs", orthologs)) if value is not None}
    found = expand_paths(
        inputs, lambda path: local_kind(path) is not None, ".h5ad, .zarr or 10x files (others need --config)"
    )
    kinds = {"anndata": [path for path in found if local_kind(Path(path)) == "anndata"]}
    kinds["10x"] = [path for path in found if path not in set(kinds["anndata"])]
    if layer is not None and kinds["10x"]:
        raise ValueError(f"layer={layer!r}: {kinds['10x'][0]} has no layers.")
    sources = []
    for kind, paths in kinds.items():
        if paths:
            layers = {"layer": layer} if kind == "anndata" else {}
            sources.append({"kind": kind, "paths": paths, **options, **layers})
    return sources


def _summary(output: str, manifest: dict[str, Any]) -> str:
    totals = manifest["totals"]
    dropped = ", ".join(f"{rule} {count:,}" for rule, count in totals["dropped"].items() if count)
    lines = [f"{totals['cells_in']:,} cells read from {totals['files_read']} files, {totals['cells_out']:,} kept"]
    if dropped:
        lines.append(f"dropped: {dropped}")
    if totals["files_skipped"]:
        lines.append(f"skipped: {totals['files_skipped']} files (reasons in manifest.json)")
    for split, part in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in part["shards"]) / 1e6
        lines.append(f"{split}: {part['cells']:,} cells in {len(part['shards'])} shards, {size:,.1f} MB")
    return "\n".join([*lines, f"Wrote {output}"])
