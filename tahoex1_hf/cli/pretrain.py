# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import command, fail, quick_imports
from tahoex1_hf.common.recipes import packaged_recipes

CONFIGURATION_ERROR = 2


@command(
    extra="data,train",
    interrupted="Stopped. The same command resumes from the last checkpoint.",
    errors=(FloatingPointError,),
    timed=True,
)
def pretrain(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe of the package (tahoex1 recipes), or a YAML file.",
            autocompletion=lambda: list(packaged_recipes("pretrain")),
        ),
    ],
    overrides: options.Overrides = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the finished model, with a model card.")
    ] = None,
    private: options.Private = False,
) -> None:
    """Pretrain a model on a CPU, on one GPU, or on many with accelerate launch -m tahoex1_hf pretrain ...

    The same command resumes a run that was stopped. The exit code is 0 for a finished run, 75 where SIGTERM ended it
    after a checkpoint, and 2 for a recipe that cannot be used.
    """
    with quick_imports():
        from tahoex1_hf.training.config import read_pretrain_config

    try:
        config = read_pretrain_config(recipe, overrides or [])
    except (OSError, ValueError) as error:
        fail(error, CONFIGURATION_ERROR)

    with quick_imports():
        from accelerate import PartialState

        from tahoex1_hf.training.pretraining import pretrain as run

    code = run(config)
    if push_to_hub is not None and code == 0 and PartialState().is_main_process:
        _upload(Path(config.output_dir), push_to_hub, private)
    raise typer.Exit(code)


def _upload(folder: Path, repository: str, private: bool) -> None:
    """Build the repository beside the model, check that it loads without this package, and upload it."""
    from tahoex1_hf.hub.export import export_repository, push_repository

    name = repository.rpartition("/")[2]
    try:
        exported = export_repository(
            [f"{name}={folder}"], folder / "hub", card=folder / "card.yaml", repo_id=repository
        )
    except RuntimeError as error:
        fail(error)
    typer.echo(f"Uploaded: {push_repository(exported.folder, repository, private=private)}")
