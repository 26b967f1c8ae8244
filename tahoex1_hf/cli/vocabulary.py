# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The commands `tahoex1 build-vocab` and `tahoex1 drug-fingerprints`."""

from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import NOTHING_WRITTEN, command, quick_imports


@command(interrupted=NOTHING_WRITTEN)
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
        typer.Option(help="Special token at the beginning. Can be repeated.", show_default="<pad>, <cls>, <eoc>"),
    ] = None,
    drug_token: Annotated[bool, typer.Option("--drug-token", help="Add <drug>, for models that take a drug.")] = False,
    pad_to_multiple_of: Annotated[
        int, typer.Option(help="Round the size up to a multiple of this with unused tokens.")
    ] = 64,
    overwrite: options.Overwrite = False,
) -> str:
    """Make a vocabulary from the genes of a reference file."""
    with quick_imports():
        from tahoex1_hf.data.vocabulary import SPECIAL_TOKENS, build_vocabulary

    vocabulary = build_vocabulary(
        reference,
        output,
        special_tokens=special_token or SPECIAL_TOKENS,
        gene_id_column=gene_id_column,
        pad_to_multiple_of=pad_to_multiple_of,
        drug_token=drug_token,
        overwrite=overwrite,
    )
    return f"{output}: {len(vocabulary)} tokens"


@command(extra="data,drugs", interrupted=NOTHING_WRITTEN)
def drug_fingerprints(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Drugs with SMILES: .csv, .tsv or .parquet.")],
    output: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder for drug_to_id_pad.json and drug_fps_pad.npy.")
    ],
    drug_column: Annotated[str, typer.Option(help="Column with the names of the drugs.")] = "drug",
    smiles_column: Annotated[str, typer.Option(help="Column with their SMILES.")] = "canonical_smiles",
    radius: Annotated[int, typer.Option(help="Radius of the Morgan fingerprints.")] = 2,
    num_bits: Annotated[int, typer.Option(help="Length of the fingerprints.")] = 2048,
    overwrite: options.Overwrite = False,
) -> str:
    """Make the drug table of a model: ids and Morgan fingerprints of the drugs."""
    with quick_imports():
        from tahoex1_hf.data.fingerprints import drug_fingerprints as make_table

    table_written = make_table(
        table,
        output,
        drug_column=drug_column,
        smiles_column=smiles_column,
        radius=radius,
        num_bits=num_bits,
        overwrite=overwrite,
    )
    return f"{output}: {len(table_written.drug_to_id)} rows, the first for no drug"
