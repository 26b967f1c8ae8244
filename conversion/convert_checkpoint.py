"""Convert a checkpoint of the original program into a folder that AutoModel and AutoTokenizer load, or back.

    python conversion/convert_checkpoint.py SRC DST [--size 70m|1b|3b] [--dtype float32|bfloat16]
    python conversion/convert_checkpoint.py CONVERTED DST --to-original

SRC is a folder in the original's layout, a Composer *.pt (or sharded folder) with its settings beside it, the id of a
Hub repository, or s3://bucket/prefix. What was read, written and compared is recorded in DST/conversion.json.
"""

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from tahoex1_hf.hub.sources import convert_checkpoint
from tahoex1_hf.original.restore import restore_original_folder


class Dtype(str, Enum):  # noqa: UP042 - typer wants a str
    float32 = "float32"
    bfloat16 = "bfloat16"


def main(
    source: Annotated[str, typer.Argument(metavar="SRC", help="folder, file, Hub repository or s3://bucket/prefix")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="folder to make")],
    size: Annotated[str | None, typer.Option(help="which of several sizes: 70m, 1b or 3b")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="type of the weights; by default that of SRC")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a Hub repository")] = None,
    to_original: Annotated[bool, typer.Option("--to-original", help="SRC is a converted folder: go back")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    torch_dtype = None if dtype is None else getattr(torch, dtype.value)
    try:
        if to_original:
            if size is not None or revision is not None:
                raise ValueError("--size and --revision do not go with --to-original: name the converted folder.")
            verification = restore_original_folder(source, destination, dtype=torch_dtype)
        else:
            verification = convert_checkpoint(source, destination, size=size, revision=revision, dtype=torch_dtype)
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{destination}: {verification.summary()}")


if __name__ == "__main__":
    typer.run(main)
