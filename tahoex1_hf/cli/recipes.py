# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 recipes`."""

from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli.running import command
from tahoex1_hf.common.recipes import FOLDERS, packaged_recipes


@command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Recipe to print.", show_default=False)] = None,
) -> str:
    """List the recipes of pretrain, finetune and prepare, or print one to change: tahoex1 recipes NAME > FILE."""
    known = [(command, *item) for command in FOLDERS for item in packaged_recipes(command).items()]
    if name is None:
        width = max(len(recipe) for _, recipe, _ in known)
        return "\n".join(f"{command:8}  {recipe:{width}}  {_title(path)}" for command, recipe, path in known)
    for _, recipe, path in known:
        if recipe == name:
            return path.read_text(encoding="utf-8").rstrip("\n")
    raise ValueError(f"there is no recipe {name!r}: it is one of {', '.join(recipe for _, recipe, _ in known)}.")


def _title(path: Path) -> str:
    """Return the first line of a recipe, which is a comment."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()
