# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands have, each declared once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Precision of the matrix products; int8 quantises the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class FloatDtype(StrEnum):
    """Precision of the matrix products, for models whose weights stay as they are."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class OverflowRule(StrEnum):
    """Choice of the genes of cells longer than the context."""

    sample = "sample"
    highest = "highest"
    first = "first"


class UnknownDrugsRule(StrEnum):
    """Rule for drugs that the drug table lacks."""

    pad = "pad"
    error = "error"


# Every command -------------------------------------------------------------------------------------------------------

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.", rich_help_panel="Messages")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print details, and where an error arose.", rich_help_panel="Messages"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Messages")]

# The model -----------------------------------------------------------------------------------------------------------

Model = Annotated[
    str, typer.Option(help="Folder or Hub repository of the model, converted or in the original layout.")
]
Size = Annotated[
    str | None, typer.Option(help="Size to take from a model that holds several: 70m, 1b or 3b.", show_default=False)
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the Hub repository.", show_default="main")
]

# The cells -----------------------------------------------------------------------------------------------------------

GeneIdColumn = Annotated[
    str | None, typer.Option(help="Column of var that holds the Ensembl ids.", show_default="found")
]
GeneSymbols = Annotated[
    Path | None,
    typer.Option(
        help="Table with a symbol and an Ensembl id per line, for cells whose genes are symbols.",
        show_default="the package's",
    ),
]


class Species(StrEnum):
    """Species of the cells."""

    human = "human"
    mouse = "mouse"


CellSpecies = Annotated[Species, typer.Option(help="Species of the cells; mouse needs --orthologs.")]
Orthologs = Annotated[
    Path | None, typer.Option(help="Table with a mouse gene and its human orthologue per line, for --species mouse.")
]
Layer = Annotated[
    str | None,
    typer.Option(
        help="Layer that holds the raw counts; raw for .raw, X for X.",
        show_default="X, or where that holds no counts the layer counts, raw_counts or raw, or .raw",
    ),
]
Drugs = Annotated[str | None, typer.Option(help="Column of obs that holds the drugs, or one drug for all cells.")]
UnknownDrugs = Annotated[
    UnknownDrugsRule,
    typer.Option(
        help="Drugs that the model's table lacks: pad counts their cells as cells without a drug, error refuses them."
    ),
]
DrugTable = Annotated[
    Path | None,
    typer.Option(
        metavar="SMILES.csv",
        help="Drugs that the model's table lacks: columns drug and canonical_smiles (or smiles). Each gets its "
        "fingerprint, so a similar compound gets a similar vector. The model saw 377 compounds; how well it does on "
        "others is not known.",
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(help="Largest number of tokens of a cell.", show_default="the model's context length")
]
Overflow = Annotated[
    OverflowRule | None,
    typer.Option(
        help="Genes taken of cells longer than the context: a random sample, by the cell's content alone; the highest "
        "counts; or the first columns.",
        show_default="the model's, sample",
    ),
]
Draws = Annotated[
    int,
    typer.Option(
        min=1,
        help="Samples of each cell longer than the context. What is written is their mean, and a column of obs that "
        "ends in _sd says how far one sample lies from it.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling of cells longer than the context.")]

# The work ------------------------------------------------------------------------------------------------------------

Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu.", show_default="the fastest there is")]
BatchTokens = Annotated[
    int | None,
    typer.Option(help="Most tokens of a batch; fewer need less memory.", show_default="suited to the device"),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard the files of an unfinished run with other settings.")
]
FullPaths = Annotated[bool, typer.Option("--full-paths", help="Name the sources in the output by their whole paths.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result that differs.")]
Private = Annotated[bool, typer.Option("--private", help="Create the Hub repository as a private one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Keys of the recipe to change, as in seed=1.")
]

Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Work on a Ray cluster: HOST:PORT, auto for one that runs on this machine, local to "
        "start one of this machine alone. The result is the same.",
    ),
]
MinWorkers = Annotated[
    int | None, typer.Option(help="Least workers on the cluster that hold the model.", show_default="1")
]
MaxWorkers = Annotated[
    int | None,
    typer.Option(help="Most workers on the cluster that hold the model.", show_default="all there is room for"),
]
MostTasks = Annotated[
    int | None,
    typer.Option("--max-workers", help="Most tasks at a time on the cluster.", show_default="all there is room for"),
]
