# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands that make a model's vocabulary and drug table; `cli.py` registers them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # ImportError: says which extra to install
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def build_vocab(
    reference: Annotated[
        Path,
        typer.Argument(metavar="REFERENCE", help="Genes: .h5ad (only var is read), .csv, .tsv or .parquet."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="vocab.json to write.")],
    gene_id_column: Annotated[
        str | None,
        typer.Option(help="Column with Ensembl ids.", show_default="var_names of .h5ad, ensembl_id of a table"),
    ] = None,
    special_token: Annotated[
        list[str] | None,
        typer.Option(help="A first token; give it once for each.", show_default="<pad>, <cls>, <eoc>"),
    ] = None,
    drug_token: Annotated[bool, typer.Option("--drug-token", help="Add <drug>, for models that take a drug.")] = False,
    pad_to_multiple_of: Annotated[int, typer.Option(help="Fillers round the size up to a multiple of this.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that holds something else.")] = False,
) -> None:
    """Make a vocabulary from the genes of a reference file."""
    # What a command needs is imported in it, so that --help answers at once.
    from tahoex1_hf.data.vocabulary import SPECIAL_TOKENS, build_vocabulary

    with _errors_as_messages():
        vocabulary = build_vocabulary(
            reference,
            output,
            special_tokens=special_token or SPECIAL_TOKENS,
            gene_id_column=gene_id_column,
            pad_to_multiple_of=pad_to_multiple_of,
            drug_token=drug_token,
            overwrite=overwrite,
        )
    typer.echo(f"{output}: {len(vocabulary)} tokens")


def drug_fingerprints_command(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Drugs with SMILES: .csv, .tsv or .parquet.")],
    output: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where drug_to_id_pad.json and drug_fps_pad.npy are written.")
    ],
    drug_column: Annotated[str, typer.Option(help="Column with the names of the drugs.")] = "drug",
    smiles_column: Annotated[str, typer.Option(help="Column with their SMILES.")] = "canonical_smiles",
    radius: Annotated[int, typer.Option(help="Radius of the Morgan fingerprints.")] = 2,
    num_bits: Annotated[int, typer.Option(help="Length of the fingerprints.")] = 2048,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that hold something else.")] = False,
) -> None:
    """Make the drug table of a model: numbers and Morgan fingerprints."""
    from tahoex1_hf.data.fingerprints import drug_fingerprints

    with _errors_as_messages():
        written = drug_fingerprints(
            table,
            output,
            drug_column=drug_column,
            smiles_column=smiles_column,
            radius=radius,
            num_bits=num_bits,
            overwrite=overwrite,
        )
    typer.echo(f"{output}: {len(written.drug_to_id)} rows, the first for no drug")
