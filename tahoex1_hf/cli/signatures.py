# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The commands `tahoex1 signatures` and `tahoex1 signatures query`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import command, quick_imports


class _BuildByDefault(TyperGroup):
    """A group whose command `build` need not be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the command before arguments that begin with none."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["build", *args]
        return super().parse_args(ctx, args)


signatures = typer.Typer(
    cls=_BuildByDefault,
    help="Make the signatures of a screen of drugs, and find those that new cells are like.",
    no_args_is_help=True,
)


class Space(StrEnum):
    """Values in which shifts are measured."""

    embeddings = "embeddings"
    expression = "expression"
    both = "both"


class OneSpace(StrEnum):
    """Values in which shifts are measured."""

    embeddings = "embeddings"
    expression = "expression"


Mechanisms = Annotated[
    Path | None,
    typer.Option(metavar="TABLE", help="Table with the columns drug and --mechanism-column: .parquet, .csv or .tsv."),
]
MechanismColumn = Annotated[str, typer.Option(help="Column with the mechanisms of action.")]
MinCells = Annotated[
    int, typer.Option(min=4, help="Fewest cells of a drug on a plate, and of the controls of a line on a plate.")
]
DropFew = Annotated[
    bool, typer.Option("--drop-few", help="Leave out lines on plates with fewer controls, instead of refusing them.")
]
Permutations = Annotated[int, typer.Option(min=19, help="Permutations of which cells are the drug's.")]
Seed = Annotated[int, typer.Option(help="Seed of halves, resamples and permutations.")]


@signatures.command("build")
@command(extra="data,train")
def build(
    cells: Annotated[
        Path,
        typer.Argument(
            metavar="CELLS", help=".parquet, .h5ad or .zarr with embeddings; for expression .h5ad with raw counts."
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for signatures, tables, report and maps.")],
    drug: Annotated[str, typer.Option(help="Column of obs with the drugs.")] = "drug",
    dose: Annotated[str | None, typer.Option(help="Column of obs with the doses.")] = None,
    line: Annotated[str | None, typer.Option(help="Column of obs with the cell lines.")] = None,
    plate: Annotated[str | None, typer.Option(help="Column of obs with the plates.")] = None,
    control: Annotated[str, typer.Option(help="Name of the controls among the drugs.")] = "DMSO_TF",
    space: Annotated[
        Space, typer.Option(help="Values in which shifts are measured; expression: log-normalised counts.")
    ] = Space.embeddings,
    key: Annotated[str, typer.Option(help="Slot of obsm, or column of embeddings.")] = "X_tahoe_x1",
    mechanisms: Mechanisms = None,
    mechanism_column: MechanismColumn = "moa-fine",
    min_cells: MinCells = 20,
    drop_few: DropFew = False,
    permutations: Permutations = 999,
    seed: Seed = 0,
    restart: options.Restart = False,
) -> str:
    """Make the signatures of a screen: each drug's shift from the controls of the same line and plate.

    With the size of each shift and its bootstrap interval, its reliability by split halves, the number of cells
    needed, the drugs that are alike, and a map. The same command resumes a run that was stopped. The word build may be
    left out.
    """
    with quick_imports():
        from tahoex1_hf.signatures.building import make_signatures

    made = make_signatures(
        cells,
        output,
        drug=drug,
        dose=dose,
        line=line,
        plate=plate,
        control=control,
        space=space.value,
        key=key,
        mechanisms=mechanisms,
        mechanism_column=mechanism_column,
        min_cells=min_cells,
        drop_few=drop_few,
        permutations=permutations,
        seed=seed,
        restart=restart,
    )
    return f"{made.text}\n\nWrote {output}"


@signatures.command("query")
@command(extra="data,train")
def query(
    cells: Annotated[
        Path, typer.Argument(metavar="CELLS", help="Cells of one or more drugs, with controls of their own.")
    ],
    signatures: Annotated[Path, typer.Option(metavar="DIR", help="Folder that tahoex1 signatures has written.")],
    output: Annotated[Path, typer.Option(metavar="OUT", help="Folder for tables and report.")],
    drug: Annotated[
        str | None, typer.Option(help="Column of obs with the drugs.", show_default="that of the signatures")
    ] = None,
    dose: Annotated[str | None, typer.Option(help="Column with the doses.", show_default="likewise")] = None,
    line: Annotated[str | None, typer.Option(help="Column with the cell lines.", show_default="likewise")] = None,
    plate: Annotated[str | None, typer.Option(help="Column with the plates.", show_default="likewise")] = None,
    control: Annotated[str | None, typer.Option(help="Name of the controls.", show_default="likewise")] = None,
    space: Annotated[
        OneSpace | None,
        typer.Option(help="Values in which shifts are measured.", show_default="what is there, embeddings first"),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Slot of obsm, or column of embeddings.", show_default="that of the signatures")
    ] = None,
    mechanisms: Mechanisms = None,
    mechanism_column: MechanismColumn = "moa-fine",
    min_cells: MinCells = 20,
    drop_few: DropFew = False,
    permutations: Permutations = 1999,
    seed: Seed = 0,
    restart: options.Restart = False,
) -> str:
    """Find the signatures that new cells are like, with permutation q values and enriched mechanisms."""
    with quick_imports():
        from tahoex1_hf.signatures.querying import query_signatures

    answer = query_signatures(
        cells,
        signatures,
        output,
        drug=drug,
        dose=dose,
        line=line,
        plate=plate,
        control=control,
        space=space and space.value,
        key=key,
        mechanisms=mechanisms,
        mechanism_column=mechanism_column,
        min_cells=min_cells,
        drop_few=drop_few,
        permutations=permutations,
        seed=seed,
        restart=restart,
    )
    return f"{answer.text}\n\nWrote {output}"
