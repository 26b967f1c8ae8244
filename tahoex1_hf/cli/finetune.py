# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 finetune`."""

from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import command, quick_imports
from tahoex1_hf.common.recipes import packaged_recipes


@command(
    extra="data,train",
    interrupted="Stopped. The same command resumes from the last checkpoint.",
    error_code=2,
    timed=True,
)
def finetune(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe of the package (tahoex1 recipes), or a YAML file.",
            autocompletion=lambda: list(packaged_recipes("finetune")),
        ),
    ],
    overrides: options.Overrides = None,
) -> None:
    """Fine-tune a model on your cells, with LoRA or another method, on a CPU, on one GPU or on several.

    The same command resumes a run that was stopped. The exit code is 0 for a finished run, 75 where SIGTERM ended it
    after a checkpoint, and 2 for settings or data that cannot be used. tahoex1 predict applies the trained model.
    """
    with quick_imports():
        from tahoex1_hf.finetuning.config import read_finetune_config

    config = read_finetune_config(recipe, overrides or [])

    with quick_imports():
        from tahoex1_hf.finetuning.running import finetune as run

    raise typer.Exit(run(config))
