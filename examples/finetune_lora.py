"""Adapt a Tahoe-x1 model to your cells: LoRA and others, on a laptop's CPU, one GPU or several.

    accelerate launch examples/finetune_lora.py examples/configs/finetune/classification.yaml \
        data=FILE.h5ad label=COLUMN model=PATH output_dir=DIR

Any key of the recipe can be given as `key=value` behind it. The same command on the same `output_dir` goes on where
the run was; in the end `tahoex1_hf.load_adapter(output_dir)` loads what was learnt.
"""

import logging
import sys
from typing import Annotated

import typer

from tahoex1_hf.finetuning.config import read_finetune_config
from tahoex1_hf.finetuning.finetune import finetune


def main(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="See examples/configs/finetune.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")] = None,
) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        status = finetune(read_finetune_config(recipe, overrides or []))
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
