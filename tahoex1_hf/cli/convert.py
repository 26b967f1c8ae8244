# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1 convert`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.cli import options
from tahoex1_hf.cli.running import NOTHING_WRITTEN, command, quick_imports


class WeightDtype(StrEnum):
    """Type of the weights that are written."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@command(interrupted=NOTHING_WRITTEN)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Checkpoint of the original program: a folder, a Composer *.pt or sharded checkpoint with its "
            "settings beside it, a Hub repository, or s3://bucket/prefix.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    size: options.Size = None,
    dtype: Annotated[WeightDtype | None, typer.Option(help="Type of the weights.", show_default="that of SRC")] = None,
    revision: options.Revision = None,
    to_original: Annotated[
        bool, typer.Option("--to-original", help="Convert back: SRC is a converted folder.")
    ] = False,
) -> str:
    """Convert a checkpoint of the original program into a folder that AutoModel and AutoTokenizer load, or back.

    The result is verified; DST/conversion.json records which files were read, written and compared.
    """
    with quick_imports():
        import torch

        from tahoex1_hf.hub.sources import convert_checkpoint
        from tahoex1_hf.original.restore import restore_original_folder

    torch_dtype = None if dtype is None else getattr(torch, dtype.value)
    if to_original:
        if size is not None or revision is not None:
            raise ValueError("--size and --revision do not go with --to-original: name the converted folder.")
        verification = restore_original_folder(source, destination, dtype=torch_dtype)
    else:
        verification = convert_checkpoint(source, destination, size=size, revision=revision, dtype=torch_dtype)
    return f"{destination}: {verification.summary()}"
